"""Trainings of a study at once on one base, where that is measured to save at least a fifth of the time.

On a CPU that is so for four or more of about one short row a step: of SmolLM2 on 2 cores, 4, 8 and 16 trainings of one row a step (20
tokens) took 0.78, 0.57 and 0.55 of the time of one after the other, but 2 took 0.82, and those of four rows a step 0.91 to 0.95
(`python bench/together.py`, bench/results/together.json). Other devices have not been measured: there a study trains one after the
other.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..lora.injection import unload
from ..lora.placement import Placement
from ..models.running import device_of
from ..run.apply import job_for
from ..run.run import Run
from ..support.config import RunConfig
from ..support.errors import TrainingError
from ..training.job import Job, TrainResult
from ..training.plan import Plan
from ..training.state import CHECKPOINTS, checkpoints
from ..training.together import CANNOT, Together

FEW_TOKENS, LEAST = 32, 4  # of a step, and trainings
Todo = Sequence[tuple[Placement, RunConfig, Path]]  # what is trained, how, and in which folder


def saves_time(run: Run, todo: Todo) -> bool:
    """Whether these trainings are to be done at once."""
    if len(todo) < LEAST or device_of(run.model).type != "cpu" or any(placement.experts for placement, *_ in todo):
        return False
    if any(getattr(config, name) for _, config, _ in todo for name in CANNOT):
        return False
    rows = run.examples("train"), run.examples("unlabeled")
    return all(Plan(*rows, config.training).facts()["tokens_per_step"] <= FEW_TOKENS for _, config, _ in todo)


def train_at_once(
    run: Run, vectors: dict[str, torch.Tensor] | None, todo: Todo,
    done: Callable[[str, Job, TrainResult | TrainingError, Path], None],
) -> None:  # fmt: skip
    """Trains all of `todo`, each from its checkpoint where there is one. `done` gets the adapter's name, the training, how it ended
    and its folder, while the adapter is in the model."""
    unload(run.model)
    folders = {str(number): out for number, (*_, out) in enumerate(todo)}
    jobs = {
        name: job_for(run, placement, vectors, name, config=config, out=out)
        for name, (placement, config, out) in zip(folders, todo, strict=True)
    }
    resumed = [name for name, out in folders.items() if run.resume and checkpoints(out / CHECKPOINTS)]
    together = Together(
        run.model, list(jobs.values()), progress=run.progress,
        on_end=lambda name, result: done(name, jobs[name], result, folders[name]),
    )  # fmt: skip
    try:
        together.fit(resume=resumed)
    finally:
        unload(run.model)
