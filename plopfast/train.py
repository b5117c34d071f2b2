"""A lightweight trainer for what requires a gradient in a causal language model: AdamW on label tokens."""

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import files
from .checkpoint import load_state, save_state
from .config import TrainConfig
from .data import Example, collate, epochs_of_batches, group_by_length
from .errors import Interrupted, TrainingError
from .evaluate import evaluate, label_loss
from .models import device_of
from .progress import bar

BATCH_TOKENS = 1024


@dataclass(frozen=True)
class TrainResult:
    """`stopped` says why training ended; the model holds the parameters of `best_step`."""

    steps: int
    best_step: int
    valid_loss: float | None
    stopped: str
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Trainer:
    """Trains the parameters of `model` that require a gradient (after `inject`, the adapters) on `train`.

    Batches hold examples of like length up to `config.batch_tokens`; the loss of a step is the mean over all its label
    tokens, however many micro-batches they came in. The parameters with the lowest validation loss are kept. With
    `out` (a folder), metrics.jsonl and checkpoint.safetensors are written there, also on Ctrl-C, and `fit(resume=True)` goes on exactly
    where it stopped (bit for bit on the CPU).
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train: Sequence[Example],
        valid: Sequence[Example] = (),
        *,
        out: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        self.model, self.config, self.train, self.progress = model, config, train, progress
        self.valid = valid[: config.eval_rows]
        self.out = Path(out) if out is not None else None
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise TrainingError("nothing to train: no parameter requires a gradient; inject(model, placement) first")
        if not train:
            raise TrainingError("nothing to train on: the training data is empty")
        self.lengths = [len(example.tokens) for example in train]
        self.batch_tokens = config.batch_tokens or BATCH_TOKENS
        one_epoch = math.ceil(len(group_by_length(self.lengths, self.batch_tokens, config.seed)) / config.accumulate)
        self.max_steps = config.max_steps or one_epoch
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
        self.step = self.tokens = self.worse = 0
        self.best_step, self.best_loss = 0, math.inf
        self.best = self._copy()
        self.history: list[dict[str, Any]] = []

    def fit(self, resume: bool = False) -> TrainResult:
        """Trains to the end, or until the validation loss has not improved `patience` times. Raises TrainingError for
        a loss that is not finite (the model then holds the best adapters so far), Interrupted after Ctrl-C."""
        torch.manual_seed(self.config.seed)
        if resume:
            self._resume()
        began, before = time.perf_counter(), self.tokens
        batches = islice(
            epochs_of_batches(self.lengths, self.batch_tokens, self.config.seed),
            self.step * self.config.accumulate,
            None,
        )
        stopped = "max_steps"
        self.model.train()
        try:
            with self._interruptible() as interrupted, bar("train", self.max_steps, "steps", self.progress) as meter:
                meter.update(self.step)
                while self.step < self.max_steps and not interrupted:
                    self._train_step([next(batches) for _ in range(self.config.accumulate)])
                    meter.update()
                    meter.set_postfix_str(f"loss {self.history[-1]['loss']:.3f}")
                    if self.valid and (self.step % self.config.eval_every == 0 or self.step == self.max_steps):
                        self._validate()
                        if self.worse >= self.config.patience:
                            stopped = "early: the validation loss stopped improving"
                            break
                if interrupted:
                    self._save()
                    where = f"; the state is in {self._checkpoint()}" if self.out else ""
                    raise Interrupted(f"stopped after step {self.step} of {self.max_steps}{where}", interrupted[0])
        finally:
            self.model.eval()
            self._write_metrics()
        if self.valid:
            self._take_best()
        else:
            self.best_step = self.step
        loss = self.best_loss if self.valid else None
        return TrainResult(self.step, self.best_step, loss, stopped, self.tokens - before, time.perf_counter() - began)

    def _train_step(self, groups: list[list[int]]) -> None:
        """One optimizer step: forward and backward of each micro-batch, clip, step, log."""
        began = time.perf_counter()
        examples = [[self.train[i] for i in group] for group in groups]
        label_tokens = sum(len(e.tokens) - e.start for group in examples for e in group)
        lr = self.config.lr * lr_factor(self.step, self.max_steps, self.config.warmup, self.config.schedule)
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for group in examples:
            batch = collate([e.tokens for e in group], [e.start for e in group], device_of(self.model))
            losses, _, _ = label_loss(self.model, batch)
            part = losses.sum() / label_tokens
            part.backward()
            loss += float(part.detach())
        clip = self.config.clip or math.inf
        grad_norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), clip))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._stop_not_finite(loss, grad_norm, examples)
        self.optimizer.step()
        tokens = sum(len(e.tokens) for group in examples for e in group)
        self.step += 1
        self.tokens += tokens
        self.history.append({
            "step": self.step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": tokens,
            "seconds": round(time.perf_counter() - began, 4),
        })  # fmt: skip

    def _validate(self) -> None:
        metrics = evaluate(self.model, self.valid)
        self.history.append({"step": self.step, "valid_loss": metrics.loss, "seconds": round(metrics.seconds, 4)})
        if metrics.loss < self.best_loss:
            self.best_loss, self.best_step, self.worse = metrics.loss, self.step, 0
            self.best = self._copy()
        else:
            self.worse += 1
        self._save()

    def _stop_not_finite(self, loss: float, grad_norm: float, examples: list[list[Example]]) -> None:
        if self.best_step:  # nothing since then was checked; the checkpoint on disk is from then too
            self._take_best()
        rows = ", ".join(e.where for group in examples for e in group[:2])
        raise TrainingError(
            f"step {self.step + 1}: loss {loss}, gradient norm {grad_norm}: training stopped, the adapters are those of "
            f"step {self.best_step or self.step}. Start anew with --overwrite and a lower --lr, or look at the rows of this "
            f"step ({rows}, ...)"
        )

    @torch.no_grad()
    def _take_best(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _checkpoint(self) -> Path:
        assert self.out is not None
        return self.out / "checkpoint.safetensors"

    def _identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        config = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(TrainConfig)}
        resolved = {"max_steps": self.max_steps, "batch_tokens": self.batch_tokens}
        return {**config, **resolved, "examples": len(self.train), "tokens": sum(self.lengths)}

    def _save(self) -> None:
        if self.out is None:
            return
        tensors = {"rng": torch.get_rng_state()}
        for name, parameter in self.parameters.items():
            tensors |= {f"now/{name}": parameter, f"best/{name}": self.best[name]}
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        facts = {key: getattr(self, key) for key in ("step", "tokens", "worse", "best_step", "best_loss")}
        save_state(self._checkpoint(), tensors, {**facts, "identity": self._identity(), "history": self.history})
        self._write_metrics()

    def _resume(self) -> None:
        if self.out is None:
            raise TrainingError("resume needs the folder `out` that holds the checkpoint")
        tensors, facts = load_state(self._checkpoint())
        changed = {
            k: (facts["identity"].get(k), v) for k, v in self._identity().items() if facts["identity"].get(k) != v
        }
        if changed:
            what = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
            raise TrainingError(f"{self._checkpoint()}: belongs to another run: {what}; give the same options and data")
        for name, parameter in self.parameters.items():
            if f"now/{name}" not in tensors or tensors[f"now/{name}"].shape != parameter.shape:
                raise TrainingError(f"{self._checkpoint()}: belongs to another placement: no {name} of this shape")
            with torch.no_grad():
                parameter.copy_(tensors[f"now/{name}"])
            self.best[name] = tensors[f"best/{name}"].to(parameter.device)
            moments = {key: tensors.get(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq")}
            if all(value is not None for value in moments.values()):
                device_moments = {k: v.to(parameter.device) for k, v in moments.items() if v is not None}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(facts["step"])), **device_moments}
        torch.set_rng_state(tensors["rng"])
        for key in ("step", "tokens", "worse", "best_step", "best_loss", "history"):
            setattr(self, key, facts[key])

    def _write_metrics(self) -> None:
        if self.out is not None:
            files.write_text(self.out / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.history))

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[list[int]]:
        """While it lasts, SIGINT and SIGTERM are only noted in the list it yields, so that no step is torn; a second
        one acts at once. (Python allows handlers in the main thread alone: elsewhere the list stays empty.)"""
        noted: list[int] = []
        if threading.current_thread() is not threading.main_thread():
            yield noted
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, _frame: Any) -> None:
            if noted:
                raise KeyboardInterrupt
            noted.append(number)

        for number in before:
            signal.signal(number, note)
        try:
            yield noted
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def lr_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The share of the peak learning rate at a step (from 0): linear warmup, then cosine, linear or constant."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]
