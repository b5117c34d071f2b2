"""Settings applied: the one call of `inject` and of `Trainer`, whoever asks (run, trial, search)."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..lora.injection import inject, unload
from ..lora.placement import Placement
from ..models.streaming import plain_copy
from ..support.config import RunConfig
from ..support.errors import ConfigError
from ..training.job import Job
from ..training.together import job_of
from ..training.trainer import Trainer
from .run import Run


def trainer_for(
    run: Run, placement: Placement | None, vectors: dict[str, torch.Tensor] | None, *, config: RunConfig | None = None,
    out: Path | None = None, copied: bool = False, on_valid: Callable[[int, float], None] | None = None,
) -> Trainer:  # fmt: skip
    """Makes the trainer of a run's model and rows: of adapters on the placement, or of all weights where it is None.

    `vectors` are EVA's, None for another init. `config`: instead of the run's own. `copied`: all weights are trained in a
    float32 copy of the model, which stays as it is. `out` and `on_valid` as for `Trainer`.
    """
    config = config or run.config
    train, valid, unlabeled = (run.examples(split) for split in ("train", "valid", "unlabeled"))
    model = run.model
    unload(model)
    if placement is None and hasattr(model, "computes_on"):
        raise ConfigError(
            "--embedding cpu keeps a frozen embedding in CPU memory, and here all weights are trained: leave one of them out"
        )
    if placement is None:
        model = (plain_copy(model).float() if copied else model).requires_grad_(True)
    else:
        _inject(run, placement, vectors, config)
    return Trainer(
        model, config.training, train, valid, unlabeled=unlabeled, out=out, progress=run.progress, on_valid=on_valid
    )


def job_for(
    run: Run, placement: Placement, vectors: dict[str, torch.Tensor] | None, name: str, *, config: RunConfig | None = None,
    out: Path | None = None,
) -> Job:  # fmt: skip
    """As `trainer_for`, one of several trainings at once: the adapters of the placement have the name of the job."""
    config = config or run.config
    _inject(run, placement, vectors, config, name)
    rows = run.examples("train"), run.examples("valid")
    return job_of(run.model, name, config.training, *rows, unlabeled=run.examples("unlabeled"), out=out)


def _inject(
    run: Run, placement: Placement, vectors: dict[str, torch.Tensor] | None, config: RunConfig, name: str | None = None
) -> None:
    inject(
        run.model, placement, dropout=config.dropout, rslora=config.rslora, dora=config.dora, backend=config.backend,
        seed=config.seed, init=config.init, eva=vectors, name=name,
    )  # fmt: skip
