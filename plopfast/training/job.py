"""One training: its rows, its optimizer, what it has reached and its files. Who runs the model is another's business:
`Trainer` for one training, `Together` for several on one base.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..data.batches import collate, collate_packed, group_by_length
from ..data.example import Example
from ..lora.layer import every_adapter
from ..lora.many import named_places
from ..models.running import device_of, evaluating
from ..support import machine, ranks
from ..support.config import TrainConfig
from ..support.errors import TrainingError
from ..support.ledger import Ledger
from . import census
from .identity import check_same_run, identity_of
from .logs import open_log, targets
from .optimizer import lr_factor, make_optimizer, set_lr
from .plan import Plan
from .records import Records
from .state import CHECKPOINT_FILES, CHECKPOINTS, TrainState, checkpoint_path, load_state, save_state

SKIPS_IN_A_ROW = 10  # so many steps without a finite loss, one after the other, end a training even if it skips them
ANY_STEP = "in any step"


@dataclass(frozen=True)
class TrainResult:
    """How a training ended. `stopped` says why; the model holds the parameters of `best_step`. `tokens` and `seconds` are
    those of this call of `fit`, `padding` is the share of the computed positions that held no token, `unmoved` says how many
    modules of a type no gradient ever reached (see census.py)."""

    steps: int
    best_step: int
    valid_loss: float | None
    stopped: str
    tokens: int
    padding: float
    seconds: float
    unmoved: dict[str, int] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Step:
    """An optimizer step that has begun: the rows of its micro-batches on all ranks, and their label tokens."""

    examples: list[list[Example]]
    label_tokens: int
    lr: float
    began: float

    @property
    def mine(self) -> list[list[Example]]:
        """The micro-batches of this rank."""
        return self.examples[ranks.rank() :: ranks.size()]


class Job:
    """A training of `parameters` (by name), which are some of `model`'s, up to what runs the model.

    `name`: of the adapter that is trained, where the model has several. Other arguments as for `Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        config: TrainConfig,
        train: Sequence[Example],
        valid: Sequence[Example] = (),
        *,
        unlabeled: Sequence[Example] = (),
        out: str | Path | None = None,
        on_valid: Callable[[int, float], None] | None = None,
        name: str | None = None,
    ) -> None:
        self.model, self.config, self.on_valid, self.name = model, config, on_valid, name
        self.valid = valid[: config.eval_rows]
        self.out = Path(out) if out is not None else None
        self.parameters = dict(parameters)
        if not self.parameters:
            raise TrainingError("nothing to train: no parameter requires a gradient; inject(model, placement) first")
        if merged := next((place.merged for place in named_places(model) if place.merged), None):
            raise TrainingError(f"the adapter {merged!r} is merged into the weights: unmerge_adapter(model) first")
        self.plan = Plan(train, unlabeled, config)
        self.rows, self.max_steps = self.plan.rows, self.plan.max_steps
        if machine.launch().size > ranks.size():
            raise TrainingError("torchrun started several processes, but ranks.init was not called in this one")
        targets(config.log_to)  # a wrong name should stop the run now
        self.optimizer = make_optimizer(self.parameters, config)
        self.identity = identity_of(model, config, self.plan, self.valid, self.optimizer, name)
        self.state = TrainState(
            self.parameters,
            self.optimizer,
            validated=bool(valid),
            averaged=bool(config.ema),
            best_on_cpu=config.keep_best == "cpu",
        )
        self.records = Records(self.out)
        self.history = self.records.history
        self.last_loss = math.nan
        self._began = (0.0, 0, 0)  # seconds, tokens and positions when this call of fit began

    @property
    def step(self) -> int:
        """Steps done, those before an interruption included."""
        return self.state.step

    @property
    def is_over(self) -> bool:
        """Whether the last step is done, or validation has not improved for long enough."""
        return self.state.step >= self.max_steps or self.state.worse >= self.config.patience

    @property
    def seed(self) -> int:
        """That of this rank's random numbers: dropout differs between ranks."""
        return (self.config.seed + 1_000_003 * ranks.rank()) % 2**63

    def begin_step(self, groups: list[list[int]]) -> Step:
        """Sets the learning rate and frees the gradients; `groups` are the step's micro-batches."""
        began, state, config = time.perf_counter(), self.state, self.config
        examples = [[self.rows[i] for i in group] for group in groups]
        label_tokens = sum(e.label_tokens for group in examples for e in group)
        lr = config.lr * lr_factor(state.step, self.max_steps, config.warmup, config.schedule)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        return Step(examples, label_tokens, lr, began)

    def end_step(self, step: Step, total: float, positions: int, seconds: float | None = None) -> None:
        """Clips, updates and records, now that the gradients are there. `total` is this rank's loss, `positions` what it
        computed, and `seconds` its time (None: since the step began)."""
        state, config, examples = self.state, self.config, step.examples
        grad_norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), config.clip or math.inf))
        loss_sum, positions_sum = ranks.total([total, positions]).tolist()
        self.last_loss, positions = loss_sum / ranks.size(), int(positions_sum)
        finite = math.isfinite(self.last_loss) and math.isfinite(grad_norm)
        if finite:
            first = not self.optimizer.state
            self.optimizer.step()
            if first:
                self._census("in the first step")
            state.skipped = 0
            state.update_average(config.ema)
        else:
            self._not_finite(grad_norm, examples)
        tokens = sum(len(e.tokens) for group in examples for e in group)
        state.step += 1
        state.tokens += tokens
        state.positions += positions
        self.records.add({
            "step": state.step, "loss": self.last_loss if finite else None, "lr": step.lr,
            "grad_norm": grad_norm if finite else None, "rows": sum(map(len, examples)), "tokens": tokens,
            "positions": positions,
            "seconds": round(time.perf_counter() - step.began if seconds is None else seconds, 4), **({} if finite else {"skipped": True}),
        })  # fmt: skip

    def look_and_save(self, objective: nn.Module) -> None:
        """Validates and writes a checkpoint, where it is time for it."""
        state, last = self.state, self.state.step == self.max_steps
        if self.valid and (last or state.step % self.plan.eval_every == 0):
            self._validate(objective)
        if last or state.step % (self.config.save_every or self.plan.eval_every) == 0:
            self.save()

    def _validate(self, objective: nn.Module) -> None:
        """Looks at the validation loss, and keeps the parameters where it is the lowest so far."""
        began, state = time.perf_counter(), self.state
        self.optimizer.zero_grad(set_to_none=True)  # makes room for the copy in `averaged`
        with state.averaged():
            loss = self._valid_loss(objective)
            if loss < state.best_loss:
                state.keep_best(loss)
            elif state.step > self.plan.first_stage:
                state.worse += 1
        if not math.isfinite(loss):  # out here, as the end of the context would overwrite the best values
            self._stop(f"step {state.step}: validation loss {loss}")
        self.records.add({"step": state.step, "valid_loss": loss, "seconds": round(time.perf_counter() - began, 4)})
        if self.on_valid:
            self.on_valid(state.step, loss)

    @torch.no_grad()
    def _valid_loss(self, objective: nn.Module) -> float:
        """Returns the mean loss of a label token of the validation rows."""
        total, labels = 0.0, sum(e.label_tokens for e in self.valid)
        groups = group_by_length([len(e.tokens) for e in self.valid], self.plan.batch_tokens)
        with evaluating(self.model):
            for index, counts in ranks.share(len(groups)):
                rows = [self.valid[i] for i in groups[index]]
                total += counts * float(objective(self.collate(rows, packed=False)))
        return float(ranks.total([total])) / labels

    def _census(self, when: str) -> dict[str, int]:
        """Warns of modules that no gradient reached, and returns how many there are of each type."""
        at_end = when == ANY_STEP  # in one step, most experts of a large mixture have no token
        found = census.census(self.model, self.parameters, self.optimizer, each_expert=at_end)
        if found and ranks.is_main():
            full, dtype = not every_adapter(self.model), next(self.model.parameters()).dtype
            who = f"{self.name}: " if self.name else ""
            warnings.warn(who + census.warning(found, when, full=full, dtype=dtype), stacklevel=3)
        return {one.type: one.count for one in found}

    def _not_finite(self, grad_norm: float, examples: list[list[Example]]) -> None:
        """Counts a step whose loss or gradient is not finite; stops where the settings, or too many of them, say so."""
        self.state.skipped += 1
        if self.config.nonfinite == "stop" or self.state.skipped >= SKIPS_IN_A_ROW:
            rows = ", ".join(e.where for group in examples for e in group[:2])
            what = f"step {self.state.step + 1}: loss {self.last_loss}, gradient norm {grad_norm}"
            self._stop(what, f", or look at the rows of this step ({rows}, ...)")

    def _stop(self, what: str, remedy: str = "") -> None:
        """Raises TrainingError, with the best parameters in place: no later ones were validated."""
        if self.state.best_step:
            self.state.take(self.state.best)
        raise TrainingError(
            f"{what}: training stopped, the adapters are those of step {self.state.best_step or self.state.step}. Start "
            f"anew with --overwrite and a lower --lr{remedy}"
        )

    def finish(self) -> TrainResult:
        """Puts the best parameters (without validation, the average) into the model."""
        state = self.state
        began, before, computed = self._began
        seconds, tokens, positions = time.perf_counter() - began, state.tokens - before, state.positions - computed
        state.take(state.best if self.valid else state.average)
        if not self.valid:
            state.best_step = state.step
        return TrainResult(
            steps=state.step,
            best_step=state.best_step,
            valid_loss=state.best_loss if self.valid else None,
            stopped="max_steps" if state.step >= self.max_steps else "early: the validation loss stopped improving",
            tokens=tokens,
            padding=1 - tokens / positions if positions else 0.0,
            seconds=seconds,
            unmoved=self._census(ANY_STEP),
        )

    def collate(self, rows: list[Example], packed: bool) -> dict[str, torch.Tensor]:
        return (collate_packed if packed else collate)(rows, device_of(self.model))

    def begin(self, resume: bool) -> None:
        """Takes over the newest checkpoint's state, or removes what an earlier training left.

        Raises FileError where a file that plopfast did not write is in the way.
        """
        out = self.out
        if out is not None:
            logs = {"tensorboard": ("events.*",)} if "tensorboard" in targets(self.config.log_to) else {}
            names = {"metrics.jsonl": (), CHECKPOINTS: CHECKPOINT_FILES, **logs}
            ranks.on_main(lambda: Ledger(out).claim_once(names))
        if resume:
            if out is None:
                raise TrainingError("resume needs the folder `out` that holds the checkpoints")
            path, identity, state = load_state(out / CHECKPOINTS)
            check_same_run(path, identity, self.identity)
            self.state.load_state_dict(state)
        elif out is not None:
            ranks.on_main(lambda: Ledger(out).clear(CHECKPOINTS))
        self.records.begin(self.state.step)
        self._began = time.perf_counter(), self.state.tokens, self.state.positions

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Keeps the log open while it lasts, and frees the gradients at its end."""
        if ranks.is_main():
            name = self.out.name if self.out else None
            self.records.log = open_log(self.out, self.config.log_to, name, self.state.step + 1)
        try:
            yield
        finally:
            self.optimizer.zero_grad()
            self.records.log.close()

    def save(self) -> Path | None:
        """Writes a checkpoint, where there is a folder for it."""
        if self.out is None:
            return None
        folder, state = self.out / CHECKPOINTS, self.state.state_dict()
        ranks.on_main(lambda: save_state(folder, self.identity, state, self.config.keep))
        return checkpoint_path(folder, self.state.step)
