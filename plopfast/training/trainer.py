"""A small trainer for the parameters of a causal language model that require a gradient: AdamW on label tokens."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from ..data.example import Example
from ..lora.replaced import replaced_values
from ..lora.shared import Prepared, find_shared_inputs
from ..models.running import check_packing, device_of, modes_kept
from ..support import ranks
from ..support.config import TrainConfig
from ..support.errors import Interrupted, TrainingError
from ..support.lock import locked
from ..support.progress import bar
from . import parallel
from .blocks import prepared_blocks
from .first_step import make_ready
from .interrupt import interruptible
from .job import Job, TrainResult
from .loss import Objective
from .neftune import neftune

SKIPS_IN_A_ROW = 10  # so many steps without a finite loss, one after the other, end a training even if it skips them
ANY_STEP = "in any step"


class Trainer(Job):
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

    >>> placement = pf.place(pf.score(model, batches), rank=4)
    >>> names = pf.inject(model, placement)
    >>> result = pf.Trainer(model, pf.TrainConfig(max_steps=2), examples, progress=False).fit()
    >>> result.steps
    2
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
        progress: bool = True,
        on_valid: Callable[[int, float], None] | None = None,
    ) -> None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, parameters, config, train, valid, unlabeled=unlabeled, out=out, on_valid=on_valid)
        self.progress = progress
        if config.packing:
            check_packing(model)
        self.objective = Objective(model, recomputed=config.checkpointing)
        self.shared = find_shared_inputs(model)
        self.prepared = Prepared(model)
        self.parallel = parallel.averaged(self.objective)
        self.notes: list[str] = []

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
        state = self.state
        torch.manual_seed(self.seed)
        self.begin(resume)
        began, before = time.perf_counter(), state.tokens
        groups = self.plan.groups(state.step)
        with self._training(), interruptible() as noted, bar("train", self.max_steps, "steps", self.progress) as meter:
            meter.update(state.step)
            # a signal reaches the ranks at different times, but they stop together
            while not (number := ranks.largest(noted.number)):
                if self.is_over:
                    break
                self._train_step(list(islice(groups, self.plan.groups_in_step)))
                rate = (state.tokens - before) / (time.perf_counter() - began)
                meter.set_postfix_str(f"loss {self.last_loss:.3f}, {rate:.0f} tokens/s")
                meter.update()
                self.look_and_save(self.objective)
            if number:
                where = f"; the state is in {self.save()}" if self.out else ""
                raise Interrupted(f"stopped after step {state.step} of {self.max_steps}{where}", number)
        return self.finish()

    def paths(self) -> list[str]:
        """Says how the steps are computed, a line for each choice; what was done to the blocks is known after `fit`."""
        loss = f"all label tokens' logits at once: {why}" if (why := self.objective.why) else "chunks of logits"
        more = f" and {len(self.shared) - 1} more such groups" if len(self.shared) > 1 else ""
        groups = [f"computed together: {', '.join(names)}{more}" for names in self.shared[:1]]
        return [f"loss: {loss}", *groups, *self.notes]

    def _train_step(self, groups: list[list[int]]) -> None:
        """Takes one optimizer step: forward and backward of this rank's micro-batches, clip, update, record."""
        step = self.begin_step(groups)
        total = torch.zeros((), device=device_of(self.model))
        positions, mine = 0, step.mine
        with self.prepared:
            for number, group in enumerate(mine, 1):
                batch = self.collate(group, self.config.packing)
                positions += batch["input_ids"].numel()
                with parallel.held(self.parallel) if number < len(mine) else contextlib.nullcontext():
                    loss = self.parallel(batch) / (step.label_tokens / ranks.size())  # the ranks' mean is the loss
                    loss.backward()
                total += loss.detach()
        self.end_step(step, float(total), positions)

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """Puts the model into training mode, the settings' choices in force and the log open, while it lasts."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.logged())
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
