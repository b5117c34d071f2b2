"""Trainings of a study at once on one base, where that is measured to save at least a fifth of the time.

On a CPU that is so for steps of about one short row: of SmolLM2 on 2 cores, 2 to 16 trainings of one row a step (20 tokens) took 0.5 to
0.8 of the time of one after the other, and 4 of four rows a step 0.9 (`python bench/together.py`, bench/results/together.json). Other
devices have not been measured, so there a study trains one after the other.
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

FEW_TOKENS = 32  # a step


def saves_time(run: Run, placement: Placement | None, configs: Sequence[RunConfig]) -> bool:
    """Whether these trainings of a placement are to be done at once."""
    if placement is None or placement.experts or len(configs) < 2 or device_of(run.model).type != "cpu":
        return False
    if any(getattr(config, name) for config in configs for name in CANNOT):
        return False
    rows = run.examples("train"), run.examples("unlabeled")
    return all(Plan(*rows, config.training).facts()["tokens_per_step"] <= FEW_TOKENS for config in configs)


def train_at_once(
    run: Run, placement: Placement, vectors: dict[str, torch.Tensor] | None, todo: Sequence[tuple[RunConfig, Path]],
    done: Callable[[str, Job, TrainResult | TrainingError, Path], None],
) -> None:  # fmt: skip
    """Trains the placement with each of these settings, in these folders, from a checkpoint where there is one. `done` gets the
    adapter's name, the training and how it ended, while its adapters are in the model."""
    unload(run.model)
    folders = {str(number): out for number, (_, out) in enumerate(todo)}
    jobs = {
        name: job_for(run, placement, vectors, name, config=config, out=out)
        for (name, out), (config, _) in zip(folders.items(), todo, strict=True)
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
