"""One training of an arm of a trial, and one look at the test rows. All use one loaded model.

What is finished is kept in the folder of the training (result.json, test.json) and is not done again.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from ..data.example import Example
from ..lora.injection import unload
from ..lora.peft_files import load_adapter, save_adapter
from ..lora.placement import Placement
from ..models.running import device_of
from ..models.streaming import plain_copy
from ..report import kinds
from ..run.apply import trainer_for
from ..run.folder import EVA
from ..run.general import GeneralText
from ..run.run import Run
from ..support import files, memory
from ..support.config import RunConfig
from ..support.errors import TrainingError
from ..support.inputs import check_same
from ..support.ledger import Ledger
from ..support.progress import Work
from ..training.evaluate import choices_of, evaluate
from ..training.job import Job, TrainResult
from ..training.state import CHECKPOINTS, checkpoints
from .side_by_side import saves_time, train_at_once
from .sweep import Sweep

WEIGHTS = "model.safetensors"
MADE_BY = "plopfast trial"


@dataclass(frozen=True)
class Arm:
    """One placement of a trial. `placement` is None where all weights are trained; `lrs`: peak learning rates to try."""

    name: str
    placement: Placement | None
    lrs: list[float]


@dataclass(frozen=True)
class Trained:
    """An arm after its training: the chosen rate, the validation loss of each rate at the first seed (None: not finite), the
    folders of the seeds at the chosen rate and what their result.json hold, and what those of the other rates hold."""

    arm: Arm
    lr: float
    losses: dict[float, float | None]
    folders: list[Path]
    results: list[dict[str, Any]]
    others: list[dict[str, Any]]

    def add(self, result: dict[str, Any], folder: Path) -> None:
        """Takes another seed at the rate. Raises TrainingError where it did not train."""
        if result["valid_loss"] is None:
            raise TrainingError(
                f"arm {self.arm.name!r} does not train with seed {result['seed']}, lower --lrs: {result['error']}"
            )
        self.results.append(result)
        self.folders.append(folder)

    @property
    def valid_loss(self) -> float:
        """The mean of the seeds."""
        return math.fsum(result["valid_loss"] for result in self.results) / len(self.results)


@dataclass(frozen=True)
class Training:
    """What the trainings of a trial share."""

    run: Run
    seeds: list[int]
    finalists: int  # arms that get all seeds
    vectors: dict[str, torch.Tensor] | None
    work: Work

    def all(self, arms: list[Arm], folder: Path) -> list[Trained]:
        """Sweeps every arm's rates at the first seed, trains the best two of several at the second seed, and the other seeds at the
        one of lower mean validation loss: near the highest rate that trains at all, a single seed says little.

        With fewer `finalists` than arms, each further seed is for the better half of those that had the one before (successive
        halving: Jamieson and Talwalkar 2016), the first arm among them, until the finalists are left. Raises TrainingError
        where no rate gives a finite loss, or a seed does not train at the chosen rate.
        """
        sweeps = {arm.name: Sweep(arm.lrs) for arm in arms}
        while wanted := [(arm, lr, self.seeds[0]) for arm in arms for lr in sweeps[arm.name].wanted()]:
            for (arm, lr, _), result in self._each(wanted, folder):
                sweeps[arm.name].tried[lr] = result
                _check_trains(arm, sweeps[arm.name])
            self.work.grow(sum(len(sweep.further()) for sweep in sweeps.values()))
        again: dict[str, dict[float, dict[str, Any]]] = {arm.name: {} for arm in arms}
        seeds = self.seeds[1:]
        if len(arms[0].lrs) > 1:
            wanted = [(arm, lr, seeds[0]) for arm in arms for lr in sweeps[arm.name].leaders()]
            self.work.grow(len(wanted) - 2 * len(arms))  # a single rate may have trained
            for (arm, lr, _), result in self._each(wanted, folder):
                again[arm.name][lr] = result
            seeds = seeds[1:]
        trained = [self._chosen(arm, sweeps[arm.name], again[arm.name], folder / arm.name) for arm in arms]
        going = trained
        for some in [[seed] for seed in seeds] if self.finalists < len(arms) else [seeds]:
            going = self._halved(going)
            by_name = {one.arm.name: one for one in going}
            for (arm, lr, seed), result in self._each([(t.arm, t.lr, seed) for t in going for seed in some], folder):
                by_name[arm.name].add(result, folder_of(folder / arm.name, lr, seed))
        return trained

    def _each(self, wanted: list[tuple[Arm, float, int]], folder: Path) -> Iterator[tuple[tuple[Arm, float, int], Any]]:
        """Trains each (arm, rate, seed), at once where that saves time, and yields it with what its result.json holds."""
        todo = [(arm, lr, seed, folder_of(folder / arm.name, lr, seed)) for arm, lr, seed in wanted]
        self._at_once(todo)
        for one in todo:
            yield one[:3], self.once(*one)

    def _chosen(self, arm: Arm, sweep: Sweep, again: dict[float, dict[str, Any]], folder: Path) -> Trained:
        """The arm at its rate, with the seeds that it has there. `again`: the leading rates at the second seed."""
        both = {lr: [sweep.tried[lr], result] for lr, result in again.items()} or {
            lr: [sweep.tried[lr]] for lr in sweep.leaders()
        }
        best = min(both, key=lambda lr: math.fsum(_or_inf(result["valid_loss"]) for result in both[lr]))
        if edge := sweep.edge():
            self.run.say(
                f"{arm.name}: the best rate, {sweep.best():g}, is the {edge} of {len(sweep.tried)}: a better one may lie beyond"
            )
        losses = {lr: result["valid_loss"] for lr, result in sweep.tried.items()}
        found = Trained(arm, best, losses, [], [], [])
        for lr, results in (both | {lr: [sweep.tried[lr]] for lr in losses.keys() - both}).items():
            for result, seed in zip(results, self.seeds, strict=False):
                out = folder_of(folder, lr, seed)
                if lr == best:
                    found.add(result, out)
                else:
                    found.others.append(result)
                    (out / WEIGHTS).unlink(missing_ok=True)  # as large as the model
        return found

    def _halved(self, going: list[Trained]) -> list[Trained]:
        """The better half by the mean validation loss of the seeds so far, in their order: the first arm and, with it, `finalists`
        at least."""
        count = going_on(len(going), self.finalists)
        first, *others = going
        best = {one.arm.name for one in sorted(others, key=lambda one: one.valid_loss)[: count - 1]}
        if dropped := [one.arm.name for one in others if one.arm.name not in best]:
            self.run.say(f"no further seed for {', '.join(dropped)}")
        return [first, *(one for one in others if one.arm.name in best)]

    def once(self, arm: Arm, lr: float, seed: int, out: Path) -> dict[str, Any]:
        """Trains once, and keeps the result in out/result.json; its "valid_loss" is None where the loss was not finite."""
        done = out / "result.json"
        if done.exists():
            Ledger(out).clear(CHECKPOINTS)  # a kill can have left them
            self.work.skip()
            return kinds.read(done, MADE_BY)
        config = self._config(lr, seed)
        with self.work.piece(f"{arm.name}, learning rate {lr:g}, seed {seed}"):
            value = {"seed": seed, "lr": lr} | self._fit(arm, config, out)
            files.write_json(done, value)
            Ledger(out).clear(CHECKPOINTS)
        return value

    def _config(self, lr: float, seed: int) -> RunConfig:
        return dataclasses.replace(self.run.config, lr=lr, seed=seed)

    def _fit(self, arm: Arm, config: RunConfig, out: Path) -> dict[str, Any]:
        run = self.run
        trainer = trainer_for(run, arm.placement, self.vectors, config=config, out=out, copied=True)
        memory.reset_peak(device_of(run.model))
        result: TrainResult | TrainingError
        try:
            result = trainer.fit(resume=run.resume and bool(checkpoints(out / CHECKPOINTS)))
        except TrainingError as error:
            result = error
        return self._value(trainer, result, out, whole=arm.placement is None)

    def _at_once(self, wanted: list[tuple[Arm, float, int, Path]]) -> None:
        todo = [
            (arm.placement, self._config(lr, seed), out)
            for arm, lr, seed, out in wanted
            if arm.placement is not None and not (out / "result.json").exists()
        ]
        if not saves_time(self.run, todo):
            return
        self.run.say(f"{len(todo)} trainings at once, as their steps are small")
        memory.reset_peak(device_of(self.run.model))

        def done(name: str, job: Job, result: TrainResult | TrainingError, out: Path) -> None:
            value = {"seed": job.config.seed, "lr": job.config.lr} | self._value(job, result, out, name)
            files.write_json(out / "result.json", value)
            Ledger(out).clear(CHECKPOINTS)

        train_at_once(self.run, self.vectors, todo, done)

    def _value(
        self, trainer: Job, result: TrainResult | TrainingError, out: Path, name: str | None = None, whole: bool = False
    ) -> dict[str, Any]:
        """Keeps what was trained, and returns what result.json holds of it. Raises TrainingError where it did not begin."""
        run = self.run
        value: dict[str, Any] = {"valid_loss": None}
        if isinstance(result, TrainingError):
            if not trainer.step:  # it did not begin: no matter of the rate
                raise result
            run.say(f"{result}")
            value["error"] = str(result)
        else:
            value |= {"valid_loss": result.valid_loss, "best_step": result.best_step, "steps": result.steps}
            if whole:
                with files.replacing(out / WEIGHTS) as scratch:
                    save_model(trainer.model, str(scratch))
            else:
                save_adapter(run.model, out / "adapter", overwrite=True, name=name)
        seconds = math.fsum(record["seconds"] for record in trainer.history)  # before an interruption too
        value |= {"seconds": round(seconds, 2), "tokens_per_s": round(trainer.state.tokens / seconds, 1)}
        return value | {"peak_mib": round(memory.peak_mib(device_of(run.model)), 1)}


def _check_trains(arm: Arm, sweep: Sweep) -> None:
    """Raises TrainingError where all given rates were tried in vain: nobody waits for the other arms."""
    if sweep.best() is None and len(sweep.tried) == len(arm.lrs):
        error = sweep.tried[arm.lrs[-1]]["error"]
        raise TrainingError(f"arm {arm.name!r} trains at none of its rates, lower --lrs: {error}")


def going_on(arms: int, finalists: int) -> int:
    """How many of the arms get a further seed: half of them, but no fewer than the finalists."""
    return min(arms, max(finalists, math.ceil(arms / 2)))


def trainings(arms: int, lrs: int, seeds: int, finalists: int) -> int:
    """How many trainings `Training.all` does, without rates beyond the given ones."""
    twice = lrs > 1
    count, going = arms * (lrs + 2 * twice), arms
    for _ in range(1 + twice, seeds):
        going = going_on(going, finalists)
        count += going
    return count


def _or_inf(loss: float | None) -> float:
    return math.inf if loss is None else loss


def folder_of(folder: Path, lr: float, seed: int) -> Path:
    """Where a training of the arm in `folder` is kept."""
    return folder / f"lr-{lr:g}-seed-{seed}"


def look(run: Run, arm: Arm | None, out: Path, general: list[Example], work: Work) -> dict[str, Any]:
    """Evaluates one trained model (`arm` None: the base) on the test rows and the general text, kept in out/test.json."""
    done = out / "test.json"
    if done.exists():
        (out / WEIGHTS).unlink(missing_ok=True)  # a kill can have left them
        work.skip()
        return kinds.read(done, MADE_BY)
    with work.piece(f"{arm.name}, {out.name}" if arm else "base"):
        began = time.perf_counter()
        unload(run.model)
        model = run.model
        if arm and arm.placement is None:
            model = plain_copy(run.model).float()
            load_model(model, out / WEIGHTS)
        elif arm:
            load_adapter(model, out / "adapter", backend=run.config.backend)
        examples = run.examples("test")
        label = "test" if run.progress else ""
        metrics = evaluate(model, examples, choices=choices_of(examples), progress=label)
        value = {
            "accuracy": metrics.accuracy, "loss": metrics.loss, "general_loss": evaluate(model, general).loss,
            "metric": metrics.metric, "right": metrics.right, "nats": [row.nats for row in metrics.rows],
            "tokens": [row.tokens for row in metrics.rows], "seconds": time.perf_counter() - began,
        }  # fmt: skip
        files.write_json(done, value)
        (out / WEIGHTS).unlink(missing_ok=True)
    return value


def check_inputs(run: Run, arms: list[Arm], general: GeneralText, folder: Path) -> None:
    """Keeps in inputs.json what the trainings and evaluations rest on.

    Raises ConfigError where `run.resume` meets other inputs than the trial began with.
    """
    now = run.inputs() | {"the general text": general.facts["sha256"]}
    for placement, name in ((arm.placement, arm.name) for arm in arms if arm.placement):
        now[f"the placement of {name}"] = {module: list(pair) for module, pair in placement.modules.items()}
    if run.config.init == "eva":
        now["EVA's vectors"] = files.sha256(run.folder / EVA)
    path = folder / "inputs.json"
    if run.resume and path.exists():
        check_same(kinds.read(path, MADE_BY), now, path)
    files.write_json(path, now)
