"""Which rows a training takes, in which micro-batches, and for how many steps."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice

from ..data.batches import groups_in_epoch, micro_batches
from ..data.example import Example
from ..support import ranks
from ..support.config import TrainConfig
from ..support.errors import ConfigError, TrainingError

BATCH_TOKENS = 1024


class Plan:
    """The rows of a training and how its steps take them: one epoch of `train`, unless the settings say how many steps.

    `unlabeled` rows come first, once, or are mixed in as `config.unlabeled_share` says. `rows` are the `labelled` ones and
    then the unlabelled ones. A step takes `groups_in_step` micro-batches over all ranks, each of at most `batch_tokens`
    tokens. The first `first_stage` of the `max_steps` steps hold unlabelled rows.

    Raises TrainingError without training rows, ConfigError where the settings do not fit the rows.
    """

    def __init__(self, train: Sequence[Example], unlabeled: Sequence[Example], config: TrainConfig) -> None:
        if not train:
            raise TrainingError("nothing to train on: the training data is empty")
        self.config, self.rows, self.labelled = config, [*train, *unlabeled], len(train)
        longest = max(self.rows, key=lambda example: len(example.tokens))
        self.batch_tokens = batch_tokens_for(config, len(longest.tokens))
        if len(longest.tokens) > self.batch_tokens:
            raise ConfigError(
                f"batch_tokens: {self.batch_tokens} is below the longest row, {len(longest.tokens)} tokens "
                f"({longest.where}): raise it, or shorten or split the row"
            )
        if config.unlabeled_share and not unlabeled:
            raise ConfigError("unlabeled_share: there are no unlabelled examples to mix in; give some, or leave it out")
        self.groups_in_step = config.accumulate * ranks.size()
        first = 0 if config.unlabeled_share else self._in_epoch(unlabeled)
        self.first_stage = first // self.groups_in_step
        epoch = math.ceil((first + self._in_epoch(train) / (1 - config.unlabeled_share)) / self.groups_in_step)
        self.max_steps = config.max_steps or epoch
        if self.max_steps <= self.first_stage:
            raise ConfigError(
                f"max_steps: the unlabelled text takes {self.first_stage} steps, so {self.max_steps} would end before the "
                "labelled rows: raise --max-steps, or mix the text in with --unlabeled-share"
            )

    def _in_epoch(self, examples: Sequence[Example]) -> int:
        """Returns the micro-batches of an epoch of `examples`."""
        lengths = [len(example.tokens) for example in examples]
        return groups_in_epoch(lengths, self.batch_tokens, self.config.seed, self.config.packing) if lengths else 0

    def groups(self, first_step: int = 0) -> Iterator[list[int]]:
        """Yields micro-batches without end, as indices of `rows`, beginning with those of `first_step` (from 0)."""
        config, lengths = self.config, [len(example.tokens) for example in self.rows]
        stream = micro_batches(
            lengths, self.labelled, self.batch_tokens, config.seed, config.unlabeled_share, config.packing
        )
        return islice(stream, first_step * self.groups_in_step, None)


def batch_tokens_for(config: TrainConfig, longest: int) -> int:
    """Returns the tokens of a micro-batch: the settings', else 1024 or the longest row's."""
    return config.batch_tokens or max(BATCH_TOKENS, longest)
