"""Which rows a training takes, in which micro-batches, and for how many steps.

A few rows are soon passed over: one epoch of 60 chat rows is 3 steps of 1024 tokens, which change next to nothing. So
where an epoch is fewer than 60 steps, and the settings say nothing else, steps take fewer rows (not below 8) and training
takes several epochs (at most 10) until there are about 60 steps. bench/small_data.py measures what that brings.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from ..data.batches import groups_in_epoch, micro_batches
from ..data.example import Example
from ..support import ranks
from ..support.config import TrainConfig
from ..support.errors import ConfigError, TrainingError

BATCH_TOKENS = 1024
EVAL_EVERY = 30
FEW_STEPS, FEW_ROWS, MOST_EPOCHS = 60, 8, 10  # little data: an epoch of fewer steps, rows of a step, epochs


class Plan:
    """The rows of a training and how its steps take them: one epoch of `train`, unless the settings say how many epochs or
    steps, or the data is little (`little`, see above).

    `unlabeled` rows come first, once, or are mixed in as `config.unlabeled_share` says. `rows` are the `labelled` ones and
    then the unlabelled ones. A step takes `groups_in_step` micro-batches over all ranks, each of at most `batch_tokens`
    tokens and `batch_rows` rows (None: any number). The first `first_stage` of the `max_steps` steps hold unlabelled rows.
    The labelled ones come `epochs` times. `eval_every` steps lie between two validations.

    Raises TrainingError without training rows, ConfigError where the settings do not fit the rows.
    """

    def __init__(self, train: Sequence[Example], unlabeled: Sequence[Example], config: TrainConfig) -> None:
        if not train:
            raise TrainingError("nothing to train on: the training data is empty")
        self.config, self.rows, self.labelled = config, [*train, *unlabeled], len(train)
        longest = max(self.rows, key=lambda example: len(example.tokens))
        self.batch_tokens = config.batch_tokens or max(BATCH_TOKENS, len(longest.tokens))
        if len(longest.tokens) > self.batch_tokens:
            raise ConfigError(
                f"batch_tokens: {self.batch_tokens} is below the longest row, {len(longest.tokens)} tokens "
                f"({longest.where}): raise it, or shorten or split the row"
            )
        if config.unlabeled_share and not unlabeled:
            raise ConfigError("unlabeled_share: there are no unlabelled examples to mix in; give some, or leave it out")
        self.groups_in_step = config.accumulate * ranks.size()
        self.batch_rows = config.batch_rows
        in_epoch = self._in_epoch(train)
        self.little = not (config.max_steps or config.epochs) and in_epoch < FEW_STEPS * self.groups_in_step
        if self.little and not (config.batch_tokens or config.batch_rows):
            rows_in_step = max(FEW_ROWS, len(train) // FEW_STEPS)
            self.batch_rows = max(1, rows_in_step // self.groups_in_step)
            in_epoch = self._in_epoch(train)
        most = max(1, in_epoch // ranks.size())
        if config.accumulate > most:
            raise ConfigError(
                f"accumulate: a step of {config.accumulate} micro-batches is more than an epoch has: give {most} at most, or a "
                "lower --batch-tokens or --batch-rows"
            )
        epochs = config.epochs or 1.0
        if self.little:
            epochs = min(MOST_EPOCHS, max(1.0, round(FEW_STEPS * self.groups_in_step / in_epoch)))
        first = 0 if config.unlabeled_share else self._in_epoch(unlabeled)
        self.first_stage = first // self.groups_in_step
        whole = in_epoch / (1 - config.unlabeled_share)  # an epoch with the unlabelled micro-batches mixed in
        self.max_steps = config.max_steps or math.ceil((first + epochs * whole) / self.groups_in_step)
        if self.max_steps <= self.first_stage:
            raise ConfigError(
                f"max_steps: the unlabelled text takes {self.first_stage} steps, so {self.max_steps} would end before the "
                "labelled rows: raise --max-steps, or mix the text in with --unlabeled-share"
            )
        self.epochs = (self.max_steps * self.groups_in_step - first) / whole if config.max_steps else epochs
        once_an_epoch = EVAL_EVERY if config.max_steps else math.ceil(whole / self.groups_in_step)
        self.eval_every = config.eval_every or min(EVAL_EVERY, once_an_epoch)
        self._rows_in_group = len(train) / in_epoch

    def _in_epoch(self, examples: Sequence[Example]) -> int:
        """Returns the micro-batches of an epoch of `examples`."""
        lengths = [len(example.tokens) for example in examples]
        config = self.config
        return (
            groups_in_epoch(lengths, self.batch_tokens, config.seed, config.packing, self.batch_rows) if lengths else 0
        )

    def groups(self, first_step: int = 0) -> Iterator[list[int]]:
        """Yields micro-batches without end, as indices of `rows`, beginning with those of `first_step` (from 0)."""
        config, lengths = self.config, [len(example.tokens) for example in self.rows]
        stream = micro_batches(
            lengths, self.labelled, self.batch_tokens, config.seed, config.unlabeled_share, config.packing,
            self.batch_rows,
        )  # fmt: skip
        return islice(stream, first_step * self.groups_in_step, None)

    def facts(self) -> dict[str, Any]:
        """Returns what training.json keeps of the plan; rows and tokens a step are means over the labelled rows."""
        labelled, unlabeled = self.rows[: self.labelled], self.rows[self.labelled :]
        tokens = sum(len(example.tokens) for example in labelled)
        rows_per_step = self._rows_in_group * self.groups_in_step
        return {
            "rows": self.labelled,
            "row_tokens": tokens,
            "learned_share": sum(example.label_tokens for example in labelled) / tokens,
            "unlabeled_rows": len(unlabeled),
            "unlabeled_tokens": sum(len(example.tokens) for example in unlabeled),
            "steps": self.max_steps,
            "epochs": self.epochs,
            "rows_per_step": rows_per_step,
            "tokens_per_step": rows_per_step * tokens / self.labelled,
            "eval_every": self.eval_every,
            "little_data": self.little,
        }

    def __str__(self) -> str:
        """Says the plan in a line.

        57 rows, 3,420 tokens (31% learned): 64 steps, 8 epochs, 7.1 rows and 428 tokens a step
        """
        facts = self.facts()
        text = ""
        if facts["unlabeled_rows"]:
            when = "mixed in" if self.config.unlabeled_share else f"first, in {_some(self.first_stage, 'step')}"
            text = f"; {_some(facts['unlabeled_rows'], 'row')} of text, {facts['unlabeled_tokens']:,} tokens, {when}"
        little = "; chosen for little data, --epochs and --batch-rows choose otherwise" if self.little else ""
        return (
            f"{_some(facts['rows'], 'row')}, {facts['row_tokens']:,} tokens ({facts['learned_share']:.0%} learned): "
            f"{_some(facts['steps'], 'step')}, {_some(facts['epochs'], 'epoch')}, {facts['rows_per_step']:.3g} rows and "
            f"{facts['tokens_per_step']:,.0f} tokens a step{text}{little}"
        )


def _some(count: float, what: str) -> str:
    number = f"{count:,}" if isinstance(count, int) else f"{count:.3g}"
    return f"{number} {what}{'s' * (number != '1')}"
