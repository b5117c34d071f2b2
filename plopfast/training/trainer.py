"""A lightweight trainer for what requires a gradient in a causal language model: AdamW on label tokens."""

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import collate, collate_packed, group_by_length, groups_in_epoch, micro_batches
from ..data.rows import Example
from ..lora.layer import adapters
from ..lora.shared import find_shared_inputs, prepared
from ..models.frozen import fingerprint
from ..models.linears import linear_modules
from ..models.running import check_packing, device_of
from ..support import files, machine, ranks
from ..support.config import FREE, TrainConfig
from ..support.errors import ConfigError, FileError, Interrupted, TrainingError
from ..support.progress import bar
from . import parallel
from .blocks import prepared_blocks
from .logs import Log, open_log, targets
from .loss import Objective
from .neftune import neftune
from .schedule import lr_factor
from .state import checkpoint_path, load_state, save_state

BATCH_TOKENS = 1024
SKIPS_IN_A_ROW = 10  # steps without a finite loss, one after the other, that end a training even if it skips them
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainResult:
    """`stopped` says why training ended; the model holds the parameters of `best_step`. `tokens` are real ones,
    `padding` is the share of the computed positions that were not."""

    steps: int
    best_step: int
    valid_loss: float | None
    stopped: str
    tokens: int
    padding: float
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Trainer:
    """Trains the parameters of `model` that require a gradient (after `inject`, the adapters) on `train`.

    Micro-batches hold examples of like length up to `config.batch_tokens`; the loss of a step is the mean over all its
    label tokens, however many micro-batches they came in. `unlabeled` examples come first, or mixed in as
    `config.unlabeled_share` says. The parameters with the lowest validation loss are kept. With `out` (a folder),
    metrics.jsonl and the newest `config.keep` checkpoints are written there, also on Ctrl-C, and `fit(resume=True)`
    goes on exactly where the newest good one stopped (bit for bit on the CPU). `on_valid` is told of each look at the
    validation loss (step, loss); what it raises ends the training.

    On N ranks (see `distributed`; all of them make a trainer and fit it) a step takes `config.accumulate` micro-batches
    on each, dealt out from one stream, so that it is the step of one process that accumulates N times as many.

    Raises ConfigError for a budget below the longest row, TrainingError where there is nothing to train.
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
        if not train:
            raise TrainingError("nothing to train on: the training data is empty")
        self.rows, self.labelled = [*train, *unlabeled], len(train)
        self.lengths = [len(example.tokens) for example in self.rows]
        longest = max(self.rows, key=lambda example: len(example.tokens))
        self.batch_tokens = config.batch_tokens or max(BATCH_TOKENS, len(longest.tokens))
        if len(longest.tokens) > self.batch_tokens:
            raise ConfigError(
                f"batch_tokens: {self.batch_tokens} is below the longest row, {len(longest.tokens)} tokens "
                f"({longest.where}): raise it, or shorten or split the row"
            )
        if config.unlabeled_share and not unlabeled:
            raise ConfigError("unlabeled_share: there are no unlabelled examples to mix in; give some, or leave it out")
        if machine.launch().size > ranks.size():
            raise TrainingError("torchrun started several processes, but ranks.init was not called in this one")
        targets(config.log_to)  # a name that is wrong should stop the run now
        if config.packing:
            check_packing(model)
        self.first_stage, epoch = self._stages()
        self.max_steps = config.max_steps or epoch
        if self.max_steps <= self.first_stage:
            raise ConfigError(
                f"max_steps: the unlabelled text takes {self.first_stage} steps, so {self.max_steps} would end before the "
                "labelled rows: raise --max-steps, or mix the text in with --unlabeled-share"
            )
        self.data = sha256(repr([(example.tokens, example.start) for example in self.rows]).encode()).hexdigest()
        self.base = fingerprint(model, list(adapters(model)) or [info.name for info in linear_modules(model)][:8])
        self.objective = Objective(model, recomputed=config.checkpointing)
        self.shared = find_shared_inputs(model)
        self.parallel = parallel.averaged(self.objective)
        self.optimizer = self._make_optimizer()
        self.step = self.tokens = self.positions = self.worse = self.skipped = 0
        self.best_step, self.best_loss = 0, math.inf
        self.best = self._copy() if valid else {}
        self.average = self._copy() if config.ema else {}
        self.history: list[dict[str, Any]] = []
        self.log = Log()
        self.notes: list[str] = []

    def fit(self, resume: bool = False) -> TrainResult:
        """Trains to the end, or until the validation loss has not improved `patience` times. Raises TrainingError for
        a loss that is not finite (the model then holds the best adapters so far), Interrupted after Ctrl-C."""
        if self.step:
            raise TrainingError("this trainer has been fitted already: make another one")
        torch.manual_seed((self.config.seed + 1_000_003 * ranks.rank()) % 2**63)  # a rank's own dropout
        self._begin_log(resume)
        began, before, computed = time.perf_counter(), self.tokens, self.positions
        groups_in_step = self.config.accumulate * ranks.size()
        batches = islice(self._micro_batches(), self.step * groups_in_step, None)
        self.model.train()
        with contextlib.ExitStack() as stack:
            name = self.out.name if self.out else None
            if ranks.is_main():
                self.log = open_log(self.out, self.config.log_to, name, self.step + 1)
            stack.callback(self.log.close)
            stack.callback(self.model.eval)
            self.notes = stack.enter_context(prepared_blocks(self.model, self.config))
            stack.enter_context(neftune(self.model, self.config.neftune))
            interrupted = stack.enter_context(self._interruptible())
            meter = stack.enter_context(bar("train", self.max_steps, "steps", self.progress))
            meter.update(self.step)
            # the ranks stop together, although a signal reaches them at different times
            while not (number := ranks.largest(interrupted[0] if interrupted else 0)):
                if self.step >= self.max_steps or self.worse >= self.config.patience:
                    break
                self._train_step(list(islice(batches, groups_in_step)))
                rate = (self.tokens - before) / (time.perf_counter() - began)
                meter.set_postfix_str(f"loss {self.last_loss:.3f}, {rate:.0f} tokens/s")
                meter.update()
                if self.valid and (self.step % self.config.eval_every == 0 or self.step == self.max_steps):
                    self._validate()
                if self.step % (self.config.save_every or self.config.eval_every) == 0 or self.step == self.max_steps:
                    self._save()
            if number:
                where = f"; the state is in {self._save()}" if self.out else ""
                raise Interrupted(f"stopped after step {self.step} of {self.max_steps}{where}", number)
        self._take(self.best if self.valid else self.average)
        if not self.valid:
            self.best_step = self.step
        early = "early: the validation loss stopped improving"
        tokens, positions = self.tokens - before, self.positions - computed
        return TrainResult(
            steps=self.step,
            best_step=self.best_step,
            valid_loss=self.best_loss if self.valid else None,
            stopped=early if self.worse >= self.config.patience else "max_steps",
            tokens=tokens,
            padding=1 - tokens / positions if positions else 0.0,
            seconds=time.perf_counter() - began,
        )

    def paths(self) -> list[str]:
        """How the steps are computed, a line each; what was done to the blocks is known after `fit`."""
        loss = (
            "chunks of logits" if self.objective.chunked else f"all label tokens' logits at once: {self.objective.why}"
        )
        lines = [f"loss: {loss}", *(f"one shrink for {', '.join(names)}" for names in self.shared[:1])]
        if len(self.shared) > 1:
            lines[-1] += f" and {len(self.shared) - 1} more such groups"
        return lines + self.notes

    def _train_step(self, groups: list[list[int]]) -> None:
        """One optimizer step: forward and backward of this rank's share of the micro-batches, clip, step, log."""
        began = time.perf_counter()
        examples = [[self.rows[i] for i in group] for group in groups]
        label_tokens = sum(len(e.tokens) - e.start for group in examples for e in group)
        lr = self.config.lr * lr_factor(self.step, self.max_steps, self.config.warmup, self.config.schedule)
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr * settings["ratio"]
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device_of(self.model))
        positions = 0
        mine = examples[ranks.rank() :: ranks.size()]
        with prepared(self.model):
            for number, group in enumerate(mine, 1):
                batch = self._collate(group)
                positions += batch["input_ids"].numel()
                with parallel.held(self.parallel) if number < len(mine) else contextlib.nullcontext():
                    loss = self.parallel(batch) / (label_tokens / ranks.size())  # the ranks' mean is the loss
                    loss.backward()
                total += loss.detach()
        clip = self.config.clip or math.inf
        grad_norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), clip))
        loss_sum, positions_sum = ranks.total([float(total), positions]).tolist()
        self.last_loss, positions = loss_sum / ranks.size(), int(positions_sum)
        finite = math.isfinite(self.last_loss) and math.isfinite(grad_norm)
        if not finite:
            self._not_finite(self.last_loss, grad_norm, examples)
        else:
            self.optimizer.step()
            self.skipped = 0
            if self.average:
                torch._foreach_lerp_(
                    list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - self.config.ema
                )
        tokens = sum(len(e.tokens) for group in examples for e in group)
        self.step += 1
        self.tokens += tokens
        self.positions += positions
        self._record({
            "step": self.step, "loss": self.last_loss if finite else None, "lr": lr,
            "grad_norm": grad_norm if finite else None, "tokens": tokens, "positions": positions,
            "seconds": round(time.perf_counter() - began, 4), **({} if finite else {"skipped": True}),
        })  # fmt: skip

    def _validate(self) -> None:
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)  # room for the copy that `_averaged` makes
        with self._averaged():
            loss = self._valid_loss()
            if loss < self.best_loss:
                self.best_loss, self.best_step, self.worse = loss, self.step, 0
                for name, value in self.best.items():  # in place: a second copy would be the peak of a full fine-tuning
                    value.copy_(self.parameters[name].detach())
            elif self.step > self.first_stage:
                self.worse += 1
        if not math.isfinite(loss):  # outside, so that the best values are not overwritten when the context ends
            self._stop(f"step {self.step}: validation loss {loss}")
        self._record({"step": self.step, "valid_loss": loss, "seconds": round(time.perf_counter() - began, 4)})
        if self.on_valid:
            self.on_valid(self.step, loss)

    @torch.no_grad()
    def _valid_loss(self) -> float:
        self.model.eval()
        total, labels = 0.0, sum(len(e.tokens) - e.start for e in self.valid)
        groups = group_by_length([len(e.tokens) for e in self.valid], self.batch_tokens)
        for index, counts in ranks.share(len(groups)):
            rows = [self.valid[i] for i in groups[index]]
            total += counts * float(self.objective(self._collate(rows, packed=False)))
        self.model.train()
        return float(ranks.total([total])) / labels

    def _not_finite(self, loss: float, grad_norm: float, examples: list[list[Example]]) -> None:
        rows = ", ".join(e.where for group in examples for e in group[:2])
        what = f"step {self.step + 1}: loss {loss}, gradient norm {grad_norm}"
        self.skipped += 1
        if self.config.nonfinite == "stop" or self.skipped >= SKIPS_IN_A_ROW:
            self._stop(what, f", or look at the rows of this step ({rows}, ...)")

    def _stop(self, what: str, remedy: str = "") -> None:
        if self.best_step:  # nothing since then was checked
            self._take(self.best)
        raise TrainingError(
            f"{what}: training stopped, the adapters are those of step {self.best_step or self.step}. Start anew with "
            f"--overwrite and a lower --lr{remedy}"
        )

    def _collate(self, rows: list[Example], packed: bool | None = None) -> dict[str, torch.Tensor]:
        packed = self.config.packing if packed is None else packed
        arrange = collate_packed if packed else collate
        return arrange([e.tokens for e in rows], [e.start for e in rows], device_of(self.model))

    def _micro_batches(self) -> Iterator[list[int]]:
        config = self.config
        return micro_batches(
            self.lengths, self.labelled, self.batch_tokens, config.seed, config.unlabeled_share, config.packing
        )

    def _stages(self) -> tuple[int, int]:
        """Steps of unlabelled rows before the others, and those in which every labelled row comes once."""
        config, parts = self.config, (self.lengths[: self.labelled], self.lengths[self.labelled :])
        ours, others = (groups_in_epoch(n, self.batch_tokens, config.seed, config.packing) if n else 0 for n in parts)
        first = 0 if config.unlabeled_share else others
        groups_in_step = config.accumulate * ranks.size()
        return first // groups_in_step, math.ceil((first + ours / (1 - config.unlabeled_share)) / groups_in_step)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; with LoRA+ (Hayou et al., arXiv 2402.12354) the lora_B learn faster than the rest."""
        in_b = {name: name.endswith("lora_B") for name in self.parameters}
        groups = [
            {"params": [p for name, p in self.parameters.items() if in_b[name] == is_b], "ratio": ratio}
            for is_b, ratio in ((False, 1.0), (True, self.config.lora_plus))
        ]
        used = [group for group in groups if group["params"]]
        fused = device_of(self.model).type in ("cpu", "cuda")
        return torch.optim.AdamW(used, lr=self.config.lr, weight_decay=self.config.weight_decay, fused=fused)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The moving average in the model's place, where there is one."""
        now = self._copy() if self.average else {}
        self._take(self.average)
        try:
            yield
        finally:
            self._take(now)

    @torch.no_grad()
    def _take(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        names = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in FREE]
        resolved = {"max_steps": self.max_steps, "batch_tokens": self.batch_tokens}
        data = {"examples": self.labelled, "unlabeled": len(self.rows) - self.labelled, "data": self.data}
        lora = {name: [m.rank, m.scaling, m.dropout] for name, m in adapters(self.model).items()}
        rest = {"ranks": ranks.size(), "placement": lora, "base model": self.base}
        return {**{name: getattr(self.config, name) for name in names}, **resolved, **data, **rest}

    def _save(self) -> Path | None:
        if self.out is None:
            return None
        tensors = {f"rng/{rank}": state for rank, state in enumerate(ranks.gather(torch.get_rng_state()))}
        if device_of(self.model).type == "cuda":
            states = ranks.gather(torch.cuda.get_rng_state(device_of(self.model)))
            tensors |= {f"rng_cuda/{rank}": state for rank, state in enumerate(states)}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            held = {"now": parameter, "best": self.best.get(name), "average": self.average.get(name), **state}
            tensors |= {f"{key}/{name}": held[key] for key in STATES if held.get(key) is not None}
        facts = {"identity": self._identity(), **{key: getattr(self, key) for key in COUNTERS}}
        folder, keep = self.out / CHECKPOINTS, self.config.keep
        ranks.on_main(lambda: save_state(folder, self.step, tensors, facts, keep))
        return checkpoint_path(folder, self.step)

    def _resume(self) -> None:
        if self.out is None:
            raise TrainingError("resume needs the folder `out` that holds the checkpoints")
        tensors, facts, path = load_state(self.out / CHECKPOINTS)
        before = facts["identity"]["ranks"]
        if before != ranks.size():
            raise TrainingError(
                f"{path}: belongs to a training on {before} ranks, this one has {ranks.size()}: resume it under "
                f"torchrun with nodes x --nproc-per-node = {before}, or start anew with --overwrite"
            )
        changed = {
            k: (facts["identity"].get(k), v) for k, v in self._identity().items() if facts["identity"].get(k) != v
        }
        if changed:
            what = ", ".join(
                f"another {key}" if key in ("data", "base model", "placement") else f"{key} was {old}, is {new}"
                for key, (old, new) in changed.items()
            )
            raise TrainingError(f"{path}: belongs to another run: {what}; give the same options and data")
        for name, parameter in self.parameters.items():
            if f"now/{name}" not in tensors or tensors[f"now/{name}"].shape != parameter.shape:
                raise TrainingError(f"{path}: belongs to another placement: no {name} of this shape")
            of = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in STATES if f"{key}/{name}" in tensors}
            self._take({name: of["now"]})
            if self.best:
                self.best[name] = of["best"]
            if self.average:
                self.average[name] = of["average"]
            if "exp_avg" in of:
                step = of["step"] if self.optimizer.defaults["fused"] else of["step"].cpu()
                self.optimizer.state[parameter] = {"step": step, **{key: of[key] for key in ("exp_avg", "exp_avg_sq")}}
        torch.set_rng_state(tensors[f"rng/{ranks.rank()}"])
        cuda = f"rng_cuda/{ranks.rank()}"
        if cuda in tensors and device_of(self.model).type == "cuda":
            torch.cuda.set_rng_state(tensors[cuda], device_of(self.model))
        for key in COUNTERS:
            setattr(self, key, facts[key])

    def _begin_log(self, resume: bool) -> None:
        """Starts metrics.jsonl anew, or cuts it back to the checkpoint that is resumed."""
        if resume:
            self._resume()
        self.history = []
        if self.out is None:
            return
        path = self.out / "metrics.jsonl"
        if resume and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line may have been cut short by a kill
                    self.history.append(json.loads(line))
            self.history = [record for record in self.history if record["step"] <= self.step]
        if ranks.is_main():
            if not resume:
                shutil.rmtree(self.out / CHECKPOINTS, ignore_errors=True)
            files.write_text(path, "".join(json.dumps(record) + "\n" for record in self.history))

    def _record(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        self.log.write({key: value for key, value in record.items() if isinstance(value, int | float)})
        if self.out is not None and ranks.is_main():
            try:
                with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise FileError(
                    f"{self.out / 'metrics.jsonl'}: writing failed ({error}); make room and --resume"
                ) from None

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


COUNTERS = ("step", "tokens", "positions", "worse", "skipped", "best_step", "best_loss")
STATES = ("now", "best", "average", "step", "exp_avg", "exp_avg_sq")
