"""A small trainer for the parameters of a causal language model that require a gradient: AdamW on label tokens."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from ..data.batches import collate, collate_packed, group_by_length
from ..data.example import Example
from ..lora.layer import adapters
from ..lora.replaced import replaced_values
from ..lora.shared import Prepared, find_shared_inputs
from ..models.running import check_packing, device_of, evaluating, modes_kept
from ..support import machine, ranks
from ..support.config import TrainConfig
from ..support.errors import Interrupted, TrainingError
from ..support.ledger import Ledger
from ..support.lock import locked
from ..support.progress import bar
from . import census, parallel
from .blocks import prepared_blocks
from .first_step import make_ready
from .identity import check_same_run, identity_of
from .interrupt import interruptible
from .logs import open_log, targets
from .loss import Objective
from .neftune import neftune
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


class Trainer:
    """Trains the parameters of `model` that require a gradient (after `inject`, the adapters) on `train`.

    A micro-batch holds examples of similar length, at most `config.batch_tokens` tokens. The loss of a step is the mean
    over all its label tokens, however many micro-batches they came in. `unlabeled` examples come first, or are mixed in as
    `config.unlabeled_share` says. The parameters with the lowest loss on `valid` are kept. `on_valid` is called after each
    validation with the step and the loss; an exception that it raises ends the training. `history` holds the records of
    metrics.jsonl, one for each step and each validation; `state` what was reached (`state.tokens`, `state.best_step`, ...).

    With `out` (a folder), metrics.jsonl and the newest `config.keep` checkpoints are written there, also on Ctrl-C.
    `fit(resume=True)` then continues from the newest good checkpoint as if nothing had happened (bit for bit on the CPU).

    On N ranks (see support/ranks.py; each rank makes a trainer and fits it) a step takes `config.accumulate` micro-batches
    on each rank, dealt out from one stream. So it is the step of one process that accumulates N times as many.

        result = Trainer(model, TrainConfig(lr=2e-4), train, valid, out="run").fit()

    Raises ConfigError for settings that the data or the model cannot take, TrainingError where there is nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train: Sequence[Example],
        valid: Sequence[Example] = (),
        *,
        unlabeled: Sequence[Example] = (),
        out: str | Path | None = None,
        progress: bool = False,
        on_valid: Callable[[int, float], None] | None = None,
    ) -> None:
        self.model, self.config, self.progress, self.on_valid = model, config, progress, on_valid
        self.valid = valid[: config.eval_rows]
        self.out = Path(out) if out is not None else None
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise TrainingError("nothing to train: no parameter requires a gradient; inject(model, placement) first")
        self.plan = Plan(train, unlabeled, config)
        self.rows, self.max_steps = self.plan.rows, self.plan.max_steps
        if machine.launch().size > ranks.size():
            raise TrainingError("torchrun started several processes, but ranks.init was not called in this one")
        targets(config.log_to)  # a wrong name should stop the run now
        if config.packing:
            check_packing(model)
        self.objective = Objective(model, recomputed=config.checkpointing)
        self.shared = find_shared_inputs(model)
        self.prepared = Prepared(model)
        self.parallel = parallel.averaged(self.objective)
        self.optimizer = make_optimizer(self.parameters, config)
        self.identity = identity_of(model, config, self.plan, self.valid, self.optimizer)
        self.state = TrainState(
            self.parameters,
            self.optimizer,
            validated=bool(valid),
            averaged=bool(config.ema),
            best_on_cpu=config.keep_best == "cpu",
        )
        self.records = Records(self.out)
        self.history = self.records.history
        self.notes: list[str] = []
        self.last_loss = math.nan

    @property
    def step(self) -> int:
        """Steps done, those before an interruption included."""
        return self.state.step

    def fit(self, resume: bool = False) -> TrainResult:
        """Trains to the last step, or until the validation loss has not improved `patience` times. All but the trained
        parameters is as before, the modules' modes and torch's generators too; gradients are freed.

        Raises TrainingError for a loss that is not finite (the model then holds the best parameters so far), Interrupted
        after Ctrl-C.
        """
        if self.state.step:
            raise TrainingError("this trainer has been fitted already: make another one")
        lock = locked(self.out) if self.out is not None and ranks.is_main() else contextlib.nullcontext()
        with lock, self.state.generators_kept():
            return self._fit(resume)

    def _fit(self, resume: bool) -> TrainResult:
        state, config = self.state, self.config
        torch.manual_seed((config.seed + 1_000_003 * ranks.rank()) % 2**63)  # dropout differs between ranks
        self._begin(resume)
        began, before, computed = time.perf_counter(), state.tokens, state.positions
        groups = self.plan.groups(state.step)
        with self._training(), interruptible() as noted, bar("train", self.max_steps, "steps", self.progress) as meter:
            meter.update(state.step)
            # a signal reaches the ranks at different times, but they stop together
            while not (number := ranks.largest(noted.number)):
                if state.step >= self.max_steps or state.worse >= config.patience:
                    break
                self._train_step(list(islice(groups, self.plan.groups_in_step)))
                rate = (state.tokens - before) / (time.perf_counter() - began)
                meter.set_postfix_str(f"loss {self.last_loss:.3f}, {rate:.0f} tokens/s")
                meter.update()
                last = state.step == self.max_steps
                if self.valid and (last or state.step % self.plan.eval_every == 0):
                    self._validate()
                if last or state.step % (config.save_every or self.plan.eval_every) == 0:
                    self._save()
            if number:
                where = f"; the state is in {self._save()}" if self.out else ""
                raise Interrupted(f"stopped after step {state.step} of {self.max_steps}{where}", number)
        return self._finish(state.tokens - before, state.positions - computed, time.perf_counter() - began)

    def paths(self) -> list[str]:
        """Says how the steps are computed, a line for each choice; what was done to the blocks is known after `fit`."""
        loss = f"all label tokens' logits at once: {why}" if (why := self.objective.why) else "chunks of logits"
        more = f" and {len(self.shared) - 1} more such groups" if len(self.shared) > 1 else ""
        groups = [f"computed together: {', '.join(names)}{more}" for names in self.shared[:1]]
        return [f"loss: {loss}", *groups, *self.notes]

    def _train_step(self, groups: list[list[int]]) -> None:
        """Takes one optimizer step: forward and backward of this rank's micro-batches, clip, update, record."""
        began, state, config = time.perf_counter(), self.state, self.config
        examples = [[self.rows[i] for i in group] for group in groups]
        label_tokens = sum(e.label_tokens for group in examples for e in group)
        lr = config.lr * lr_factor(state.step, self.max_steps, config.warmup, config.schedule)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device_of(self.model))
        positions = 0
        mine = examples[ranks.rank() :: ranks.size()]
        with self.prepared:
            for number, group in enumerate(mine, 1):
                batch = self._collate(group, self.config.packing)
                positions += batch["input_ids"].numel()
                with parallel.held(self.parallel) if number < len(mine) else contextlib.nullcontext():
                    loss = self.parallel(batch) / (label_tokens / ranks.size())  # the ranks' mean is the loss
                    loss.backward()
                total += loss.detach()
        grad_norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), config.clip or math.inf))
        loss_sum, positions_sum = ranks.total([float(total), positions]).tolist()
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
            "step": state.step, "loss": self.last_loss if finite else None, "lr": lr,
            "grad_norm": grad_norm if finite else None, "tokens": tokens, "positions": positions,
            "seconds": round(time.perf_counter() - began, 4), **({} if finite else {"skipped": True}),
        })  # fmt: skip

    def _validate(self) -> None:
        """Looks at the validation loss, and keeps the parameters where it is the lowest so far."""
        began, state = time.perf_counter(), self.state
        self.optimizer.zero_grad(set_to_none=True)  # makes room for the copy in `averaged`
        with state.averaged():
            loss = self._valid_loss()
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
    def _valid_loss(self) -> float:
        """Returns the mean loss of a label token of the validation rows."""
        total, labels = 0.0, sum(e.label_tokens for e in self.valid)
        groups = group_by_length([len(e.tokens) for e in self.valid], self.plan.batch_tokens)
        with evaluating(self.model):
            for index, counts in ranks.share(len(groups)):
                rows = [self.valid[i] for i in groups[index]]
                total += counts * float(self.objective(self._collate(rows, packed=False)))
        return float(ranks.total([total])) / labels

    def _census(self, when: str) -> dict[str, int]:
        """Warns of modules that no gradient reached, and returns how many there are of each type."""
        at_end = when == ANY_STEP  # in one step, most experts of a large mixture have no token
        found = census.census(self.model, self.parameters, self.optimizer, each_expert=at_end)
        if found and ranks.is_main():
            full, dtype = not adapters(self.model), next(self.model.parameters()).dtype
            warnings.warn(census.warning(found, when, full=full, dtype=dtype), stacklevel=3)
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

    def _finish(self, tokens: int, positions: int, seconds: float) -> TrainResult:
        """Puts the best parameters (without validation, the average) into the model."""
        state = self.state
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

    def _collate(self, rows: list[Example], packed: bool) -> dict[str, torch.Tensor]:
        return (collate_packed if packed else collate)(rows, device_of(self.model))

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """Puts the model into training mode, the settings' choices in force and the log open, while it lasts."""
        with contextlib.ExitStack() as stack:
            if ranks.is_main():
                name = self.out.name if self.out else None
                self.records.log = open_log(self.out, self.config.log_to, name, self.state.step + 1)
            stack.callback(self.records.log.close)
            stack.callback(self.optimizer.zero_grad)
            stack.enter_context(modes_kept(self.model))
            # autograd's thread for a GPU hands Python's lock over at each of our functions: a fifth of a short step
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            self.model.train()
            self.notes = stack.enter_context(prepared_blocks(self.model, self.config))
            self.notes += make_ready(self.objective, self.prepared, self.plan.batch_tokens, self.progress)
            if whole := replaced_values(self.model):
                self.notes.append(f"what the loaded adapter replaces whole stays as it is: {', '.join(whole)}")
            stack.enter_context(neftune(self.model, self.config.neftune))
            yield

    def _begin(self, resume: bool) -> None:
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

    def _save(self) -> Path | None:
        """Writes a checkpoint, where there is a folder for it."""
        if self.out is None:
            return None
        folder, state = self.out / CHECKPOINTS, self.state.state_dict()
        ranks.on_main(lambda: save_state(folder, self.identity, state, self.config.keep))
        return checkpoint_path(folder, self.state.step)
