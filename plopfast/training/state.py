"""What a training has reached, and its checkpoints: one safetensors file a step.

A checkpoint holds the tensors of `TrainState.state_dict`, and, as JSON in the file's metadata, its counters and the
identity of the run.
"""

import contextlib
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from typing_extensions import TypedDict

from ..support import files, ranks
from ..support.errors import FileError, TrainingError
from ..support.schema import Count, checked
from ..support.strict_json import dumps
from .moments import CODED, PLAIN, moments_of, put_moments, shapes_of

CHECKPOINTS = "checkpoints"  # their folder within a run's folder
CHECKPOINT_FILES = ("step-*.safetensors", "step-*.damaged", f".step-*{files.SCRATCH}/*")
COUNTERS = ("step", "tokens", "positions", "worse", "skipped", "best_step", "best_loss")
VALUES = ("now", "best", "average")
KINDS = (*VALUES, *dict.fromkeys((*PLAIN, *CODED)))  # a parameter's tensors; all but its values are the optimizer's


class TrainState:
    """What a training has reached. All that a step changes is here, and `state_dict` holds all of it.

    `parameters` are the model's own, by name. `best` are the values of `best_step`, which had the lowest validation loss,
    `best_loss` (empty without validation); `average` is their moving average (empty without one). `tokens` and
    `positions` are the tokens learned from and the positions computed for them. `worse` counts the validations since the
    best one, `skipped` the last steps without a finite loss. `best_on_cpu` keeps `best` in CPU memory.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        validated: bool,
        averaged: bool,
        best_on_cpu: bool = False,
    ) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        self.generator: torch.Generator | None = None  # of the random numbers, where it isn't torch's own
        self.step = self.tokens = self.positions = self.worse = self.skipped = 0
        self.best_step, self.best_loss = 0, math.inf
        self.best = self.copy("cpu" if best_on_cpu else None) if validated else {}
        self.average = self.copy() if averaged else {}

    @torch.no_grad()
    def take(self, values: dict[str, torch.Tensor]) -> None:
        """Copies values into the parameters of the same names."""
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def copy(self, device: str | None = None) -> dict[str, torch.Tensor]:
        """Returns a copy of the parameters' values, on their own device or on another."""
        return {name: p.detach().to(device or p.device, copy=True) for name, p in self.parameters.items()}

    def keep_best(self, loss: float) -> None:
        """Notes that the parameters are the best so far."""
        self.best_loss, self.best_step, self.worse = loss, self.step, 0
        for name, value in self.best.items():  # in place: a second copy would be the peak of a full fine-tuning
            value.copy_(self.parameters[name].detach())

    def update_average(self, decay: float) -> None:
        """Moves the average, where there is one, towards the parameters: average = decay average + (1 - decay) now."""
        if self.average:
            now = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the moving average, where there is one, in the parameters' place while it lasts."""
        now = self.copy() if self.average else {}
        self.take(self.average)
        try:
            yield
        finally:
            self.take(now)

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def generators_kept(self) -> Any:
        """Returns a context at whose end torch's generators are as before it."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def state_dict(self) -> dict[str, Any]:
        """Returns all of the state in one flat dict; every rank must call it.

        Counters have their own names. Tensors are under KIND/PARAMETER, with the kinds in `KINDS`; the random generators
        of all ranks are under rng/RANK and rng_cuda/RANK.
        """
        state: dict[str, Any] = {f"rng/{rank}": kept for rank, kept in enumerate(ranks.gather(self._random()))}
        if self.device.type == "cuda":
            generators = ranks.gather(torch.cuda.get_rng_state(self.device))
            state |= {f"rng_cuda/{rank}": kept for rank, kept in enumerate(generators)}
        for name, parameter in self.parameters.items():
            moments = moments_of(self.optimizer, parameter)
            held = {"now": parameter, "best": self.best.get(name), "average": self.average.get(name), **moments}
            state |= {f"{kind}/{name}": held[kind] for kind in KINDS if held.get(kind) is not None}
        return state | {name: getattr(self, name) for name in COUNTERS}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state that `state_dict` gave. Raises TrainingError where its parameters are others, before
        anything is changed."""
        self._check(state)
        for name, parameter in self.parameters.items():
            of = {kind: state[f"{kind}/{name}"] for kind in KINDS if f"{kind}/{name}" in state}
            self.take({name: of["now"]})
            if self.best:
                self.best[name].copy_(of.get("best", of["now"]))  # there is no best where nothing was validated
            if self.average:
                self.average[name].copy_(of["average"])
            if "step" in of:
                put_moments(self.optimizer, parameter, {key: of[key] for key in of if key not in VALUES})
        if self.generator is None:
            torch.set_rng_state(state[f"rng/{ranks.rank()}"])
        else:
            self.generator.set_state(state[f"rng/{ranks.rank()}"])
        generator = state.get(f"rng_cuda/{ranks.rank()}")
        if generator is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(generator, self.device)
        for name in COUNTERS:
            setattr(self, name, state[name])

    def _random(self) -> torch.Tensor:
        """The state of the random generator."""
        return torch.get_rng_state() if self.generator is None else self.generator.get_state()

    def _check(self, state: dict[str, Any]) -> None:
        """Raises TrainingError for a state that lacks a tensor, or has one of another shape."""
        for name, parameter in self.parameters.items():
            has = {kind: state[key] for kind in KINDS if (key := f"{kind}/{name}") in state}
            moments = shapes_of(self.optimizer, parameter)
            values = {kind: (tuple(parameter.shape), False) for kind in VALUES}
            needed = (
                {"now"} | ({"average"} if self.average else set()) | (set() if has.keys() <= {*VALUES} else {*moments})
            )
            for kind in sorted(needed | has.keys()):
                shape, coded = (values | moments).get(kind, ("none", False))
                got = tuple(has[kind].shape) if kind in has else "none"
                if got != shape or coded != (has[kind].dtype == torch.uint8):
                    raise TrainingError(
                        f"expected {kind}/{name} of shape {shape}{' as codes' if coded else ''}, got {got}: another placement or "
                        "optimizer, or damaged"
                    )
        own, now = state.get(f"rng/{ranks.rank()}"), self._random()
        if own is None or (own.shape, own.dtype) != (now.shape, now.dtype):
            raise TrainingError(
                f"rng/{ranks.rank()}: expected {len(now)} bytes of torch's random generator, got others"
            )


class _Facts(TypedDict):
    """The counters of a checkpoint, and the identity of its run. `best_loss` is null before the first validation."""

    identity: dict[str, Any]
    step: Count
    tokens: Count
    positions: Count
    worse: Count
    skipped: Count
    best_step: Count
    best_loss: float | None


def save_state(folder: Path, identity: dict[str, Any], state: dict[str, Any], keep: int) -> None:
    """Writes a checkpoint, step-N.safetensors, as a whole or not at all, and then removes all but the newest `keep`.

    Raises FileError; earlier checkpoints are intact then.
    """
    path = checkpoint_path(folder, state["step"])
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
    facts = {"identity": identity, **{k: v for k, v in state.items() if k not in tensors}}
    with files.replacing(path) as scratch:
        save_file(tensors, scratch, {"facts": dumps(facts)})
        with scratch.open("rb") as file:
            os.fsync(file.fileno())  # the data must reach the disk before the new name does
    for old in checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """Lists the checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def load_state(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Reads the newest good checkpoint: its path, the identity of its run, and what `TrainState.load_state_dict` takes.

    Damaged ones are skipped with a warning, and renamed, so that they are not counted among those to keep. What killed
    writes left behind is removed.

    Raises FileError where there is no good one.
    """
    for scratch in folder.glob(f".step-*{files.SCRATCH}"):
        shutil.rmtree(scratch, ignore_errors=True)
    problems: dict[Path, str] = {}
    for path in checkpoints(folder):
        try:
            tensors, metadata = files.read_tensors(path, "plopfast train")
            facts = checked(_Facts, files.parse_json(path, metadata.get("facts", "")), path, "it is left out")
            if odd := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
                raise FileError(f"{path}: {odd[0]!r:.80} is NaN or infinite")
        except FileError as error:
            problems[path] = f"{path}: not a readable training checkpoint ({error})"
            continue
        for damaged, problem in problems.items():
            warnings.warn(f"{problem}; going on from {path.name}", stacklevel=2)
            with contextlib.suppress(FileNotFoundError):  # another rank was quicker
                damaged.rename(damaged.with_suffix(".damaged"))
        best = math.inf if facts["best_loss"] is None else facts["best_loss"]
        return path, facts["identity"], {**tensors, **{name: facts[name] for name in COUNTERS}, "best_loss": best}  # type: ignore[literal-required]
    found = "; ".join(problems.values()) or f"{folder}: no training checkpoint"
    raise FileError(f"{found}; start anew without --resume")
