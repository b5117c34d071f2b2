"""Which rows a training takes, in which micro-batches, and for how many steps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ..data.batches import groups_in_epoch, micro_batches
from ..data.rows import Example
from ..support import ranks
from ..support.config import TrainConfig
from ..support.errors import ConfigError, TrainingError

BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Plan:
    """The rows of a training and how its steps take them. Made by `make_plan`.

    `rows` are the `labelled` ones and then the unlabelled ones. A step takes `groups_in_step` micro-batches over all
    ranks, each of at most `batch_tokens` tokens. The first `first_stage` of the `max_steps` steps hold unlabelled rows.
    """

    rows: list[Example]
    labelled: int
    config: TrainConfig
    batch_tokens: int
    groups_in_step: int
    first_stage: int
    max_steps: int

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


def make_plan(train: Sequence[Example], unlabeled: Sequence[Example], config: TrainConfig) -> Plan:
    """Plans a training: one epoch of `train`, unless the settings say how many steps. `unlabeled` rows come first, once,
    or are mixed in as `config.unlabeled_share` says.

    Raises TrainingError without training rows, ConfigError where the settings do not fit the rows.
    """
    if not train:
        raise TrainingError("nothing to train on: the training data is empty")
    rows = [*train, *unlabeled]
    longest = max(rows, key=lambda example: len(example.tokens))
    batch_tokens = batch_tokens_for(config, len(longest.tokens))
    if len(longest.tokens) > batch_tokens:
        raise ConfigError(
            f"batch_tokens: {batch_tokens} is below the longest row, {len(longest.tokens)} tokens "
            f"({longest.where}): raise it, or shorten or split the row"
        )
    if config.unlabeled_share and not unlabeled:
        raise ConfigError("unlabeled_share: there are no unlabelled examples to mix in; give some, or leave it out")

    def in_epoch(examples: Sequence[Example]) -> int:
        lengths = [len(example.tokens) for example in examples]
        return groups_in_epoch(lengths, batch_tokens, config.seed, config.packing) if lengths else 0

    groups_in_step = config.accumulate * ranks.size()
    first = 0 if config.unlabeled_share else in_epoch(unlabeled)
    first_stage = first // groups_in_step
    epoch = math.ceil((first + in_epoch(train) / (1 - config.unlabeled_share)) / groups_in_step)
    max_steps = config.max_steps or epoch
    if max_steps <= first_stage:
        raise ConfigError(
            f"max_steps: the unlabelled text takes {first_stage} steps, so {max_steps} would end before the labelled "
            "rows: raise --max-steps, or mix the text in with --unlabeled-share"
        )
    return Plan(rows, len(train), config, batch_tokens, groups_in_step, first_stage, max_steps)
