"""Several trainings at once on one base: each step computes batches that hold a micro-batch of every training.

    for name, placement in placements.items():
        inject(model, placement, name=name)
    jobs = [job_of(model, name, configs[name], rows[name]) for name in placements]
    results = Together(model, jobs).fit()

The frozen products, the norms and the attention of a batch are computed once for all of its rows, and the base is in memory once
(as in mLoRA, arXiv 2312.02515, and LoRAFusion, arXiv 2510.00206). Each training is the one that it would be alone: its own rows in
their order, steps, schedule, seeds, validation, early stop and files. Its losses and adapters differ from those by roundings alone,
as the products are of other sizes. Only with LoRA dropout the masks are others where a batch is padded to the rows of another
training, as they are functions of the place in the batch; packed batches have no padding.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..data.example import Example
from ..lora.active import chosen, known_routing
from ..lora.layer import adapters
from ..lora.many import Use, adapter_names
from ..lora.shared import Prepared
from ..models.frozen import is_sharded
from ..models.running import check_packing, device_of, modes_kept
from ..support import ranks
from ..support.config import TrainConfig
from ..support.errors import ConfigError, Interrupted, TrainingError
from ..support.lock import locked
from ..support.progress import bar
from . import parallel
from .blocks import prepared_blocks
from .interrupt import interruptible
from .job import Job, Step, TrainResult
from .loss import Objective

# settings of the pass that all trainings share; each has the others for itself
OF_THE_PASS = ("packing", "checkpointing", "offload", "mlp_rows", "compile", "liger", "neftune")
CANNOT = {
    "mlp_rows": "computes some tokens at a time, whatever rows they are of",
    "compile": "would compile a batch's adapters anew at each step",
    "neftune": "draws one noise for the whole batch",
}
# trainings whose rows are of other lengths share a batch where it is at most so much larger than their own
SLACK = 0.25


def job_of(
    model: nn.Module,
    name: str,
    config: TrainConfig,
    train: Sequence[Example],
    valid: Sequence[Example] = (),
    **options: Any,
) -> Job:
    """The training of the adapter `name` of `model`; `options` are those of `Job`. Raises what `Trainer` raises."""
    members = adapters(model, name)
    parameters = {
        f"{place}.{key}": p for place, one in members.items() for key, p in one.named_parameters(recurse=False)
    }
    return Job(model, parameters, config, train, valid, name=name, **options)


class Together:
    """Trains `jobs` (see `job_of`) on one model. `at_once`: at most so many at a time; the others wait for one to end. `on_end` is
    called when a training ends, with its name and its result, or the TrainingError that ended it: the others go on. The best
    adapters of a training that has ended stay in the model.

    A training's time is its share of the steps that it took part in. Where the base has dropout of its own, its masks are those of
    the whole batch, so other ones than alone; `notes` say so.

    Raises ConfigError for settings of the pass that differ, and for those that a batch of several adapters cannot have.
    """

    def __init__(
        self,
        model: nn.Module,
        jobs: Sequence[Job],
        *,
        at_once: int | None = None,
        progress: bool = False,
        on_end: Callable[[str, TrainResult | TrainingError], None] | None = None,
    ) -> None:
        self.model, self.progress, self.on_end = model, progress, on_end
        self.jobs = {str(job.name): job for job in jobs}
        self.at_once = at_once or len(jobs)
        if not jobs:
            raise TrainingError("nothing to train: no jobs")
        unknown = [name for name in self.jobs if name not in adapter_names(model)]
        if unknown or len(self.jobs) < len(jobs):
            raise TrainingError(
                "each job trains an adapter of its own, which inject(model, placement, name=...) has put in"
            )
        self.config = _shared(self.jobs)
        self.routing = known_routing(model)
        with self._base():
            if self.config.packing:
                check_packing(model)
            self.objective = Objective(model, recomputed=self.config.checkpointing)
        self.prepared = Prepared(model)
        # sharded weights have to be gathered equally often on all ranks, whose rows are of other lengths
        self._in_one = self.config.packing or any(is_sharded(parameter) for parameter in model.parameters())
        self.notes: list[str] = []
        self._running: dict[str, contextlib.ExitStack] = {}
        self._groups: dict[str, Iterator[list[int]]] = {}
        self._results: dict[str, TrainResult | TrainingError] = {}

    def fit(self, resume: Collection[str] = ()) -> dict[str, TrainResult | TrainingError]:
        """Trains each job to its end; those in `resume` go on from their newest checkpoints. Returns how each ended.

        Raises Interrupted after Ctrl-C, with a checkpoint of each training that has a folder.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(next(iter(self.jobs.values())).state.generators_kept())
            stack.callback(self._leave)
            stack.enter_context(modes_kept(self.model))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # as in Trainer
            self.model.train()
            with self._base():  # what is replaced is compared with what it replaces, on the base alone
                self.notes = stack.enter_context(prepared_blocks(self.model, self.config))
            if own := _own_dropout(self.model):
                self.notes.append(f"the base has dropout of its own ({own}), whose masks are other ones than alone")
            noted = stack.enter_context(interruptible())
            meter = stack.enter_context(
                bar("train", sum(j.max_steps for j in self.jobs.values()), "steps", self.progress)
            )
            while not (number := ranks.largest(noted.number)):
                self._enter(resume, meter)
                if not self._running:
                    return {name: self._results[name] for name in self.jobs}
                self._step(meter)
            said = [
                f"{name} after step {self.jobs[name].step} of {self.jobs[name].max_steps}" for name in self._running
            ]
            for name in self._running:
                self.jobs[name].save()
            raise Interrupted(f"stopped: {', '.join(said)}", number)

    def paths(self) -> list[str]:
        """Says how the steps are computed, a line for each choice; what was done to the blocks is known after `fit`."""
        loss = f"all label tokens' logits at once: {why}" if (why := self.objective.why) else "chunks of logits"
        together = f"computed together: {len(self.jobs)} adapters, at most {self.at_once} at a time"
        return [f"loss: {loss}", together, *self.notes]

    def _base(self) -> contextlib.AbstractContextManager[None]:
        return chosen(self.model, self.routing, [(Use(None), 1)])

    def _enter(self, resume: Collection[str], meter: Any) -> None:
        """Lets waiting trainings in, while there is room."""
        for name, job in self.jobs.items():
            if name in self._running or name in self._results or len(self._running) >= self.at_once:
                continue
            while_it_runs = contextlib.ExitStack()
            if job.out is not None and ranks.is_main():
                while_it_runs.enter_context(locked(job.out))
            self._running[name] = while_it_runs
            generator = torch.Generator().manual_seed(job.seed)
            job.state.generator = generator
            for one in adapters(self.model, name).values():
                one.generator = generator
                while_it_runs.callback(setattr, one, "generator", None)
            try:
                job.begin(name in resume)
            except TrainingError as error:
                self._end(name, error)
                continue
            while_it_runs.enter_context(job.logged())
            self._groups[name] = job.plan.groups(job.step)
            meter.update(job.step)
            if job.is_over:
                self._end(name, job.finish())

    def _step(self, meter: Any) -> None:
        """Takes one optimizer step of each training that runs."""
        began = time.perf_counter()
        running = [self.jobs[name] for name in self._running]
        steps = {
            job: job.begin_step(list(islice(self._groups[str(job.name)], job.plan.groups_in_step))) for job in running
        }
        found = {job: (torch.zeros((), device=device_of(self.model)), 0) for job in running}
        with self.prepared:
            for number in range(max(len(step.mine) for step in steps.values())):
                due = {job: step.mine[number] for job, step in steps.items() if number < len(step.mine)}
                for part in _batches(due, self._in_one):
                    for job, (loss, positions) in self._pass(part, steps).items():
                        found[job] = found[job][0] + loss, found[job][1] + positions
        for job in running:
            parallel.average(list(job.parameters.values()))
        seconds = (time.perf_counter() - began) / len(running)
        ended: dict[str, TrainingError] = {}
        for job, step in steps.items():
            try:
                loss, positions = found[job]
                job.end_step(step, float(loss), positions, seconds)
            except TrainingError as error:
                ended[str(job.name)] = error
        meter.set_postfix_str(
            ", ".join(f"{job.name} {job.last_loss:.3f}" for job in running[:4]) + ", ..." * (len(running) > 4)
        )
        meter.update(len(running))
        for job in running:
            name = str(job.name)
            if name not in ended:
                try:
                    with chosen(self.model, self.routing, [(Use(name), 1)]):
                        job.look_and_save(self.objective)
                except TrainingError as error:
                    ended[name] = error
            if name in ended or job.is_over:
                self._end(name, ended[name] if name in ended else job.finish())

    def _pass(
        self, part: Mapping[Job, list[Example]], steps: Mapping[Job, Step]
    ) -> dict[Job, tuple[torch.Tensor, int]]:
        """Forward and backward of one batch; returns each training's summed loss over its label tokens in the step, and the positions
        that were computed for it."""
        rows = [example for group in part.values() for example in group]
        packing = self.config.packing
        batch: dict[str, Any] = next(iter(part)).collate(rows, packing)
        batch["parts"] = [sum(example.label_tokens for example in group) for group in part.values()]
        if packing:  # one row, whose last token is only predicted
            sizes = [sum(len(example.tokens) for example in group) for group in part.values()]
            runs = [(Use(job.name), size) for job, size in zip(part, [*sizes[:-1], sizes[-1] - 1], strict=True)]
        else:
            sizes = [len(group) * batch["input_ids"].shape[1] for group in part.values()]
            runs = [(Use(job.name), len(group)) for job, group in part.items()]
        with chosen(self.model, self.routing, runs, rows=None if packing else len(rows)):
            losses = self.objective(batch).unbind()
            each = [loss / (steps[job].label_tokens / ranks.size()) for job, loss in zip(part, losses, strict=True)]
            torch.stack(each).sum().backward()
        return {job: (loss.detach(), size) for job, loss, size in zip(part, each, sizes, strict=True)}

    def _end(self, name: str, result: TrainResult | TrainingError) -> None:
        self._results[name] = result
        self._running.pop(name).close()
        self._groups.pop(name, None)
        if self.on_end:
            self.on_end(name, result)

    def _leave(self) -> None:
        """Ends what is held for trainings that run."""
        while self._running:
            self._running.popitem()[1].close()


def _shared(jobs: Mapping[str, Job]) -> TrainConfig:
    """The settings of the pass. Raises ConfigError where they differ or cannot be."""
    first, config = next(iter(jobs.items())), next(iter(jobs.values())).config
    plain = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for name, job in jobs.items():
        for setting in OF_THE_PASS:
            value = getattr(job.config, setting)
            if value != getattr(config, setting):
                raise ConfigError(
                    f"{name}: {setting} is {value!r}, and {getattr(config, setting)!r} in {first[0]}: all jobs are computed in one "
                    "pass, so give it once for all"
                )
            if setting in CANNOT and value != plain[setting]:
                raise ConfigError(f"{setting} {CANNOT[setting]}, which several jobs at once cannot have: leave it out")
    return config


def _batches(due: Mapping[Job, list[Example]], in_one: bool) -> list[dict[Job, list[Example]]]:
    """Splits micro-batches into batches: those of like length together, as short rows would be padded to the longest."""
    if in_one:
        return [dict(due)]
    width = {job: max(len(example.tokens) for example in group) for job, group in due.items()}
    found: list[dict[Job, list[Example]]] = []
    for job in sorted(due, key=lambda job: width[job]):
        if found:
            both = {**found[-1], job: due[job]}
            own = sum(len(group) * width[one] for one, group in both.items())
            if sum(map(len, both.values())) * width[job] <= (1 + SLACK) * own:
                found[-1] = both
                continue
        found.append({job: due[job]})
    return found


def _own_dropout(model: nn.Module) -> str:
    """What the base drops by itself, if anything."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    rate = getattr(getattr(model, "config", None), "attention_dropout", 0.0)
    return names[0] if names else "attention_dropout" if isinstance(rate, float) and rate > 0 else ""
