"""What makes two trainings the same run: a checkpoint is gone on with by a training of the same identity alone."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.example import Example, digest
from ..lora.layer import adapters
from ..models.fingerprints import fingerprint
from ..models.linears import linear_modules
from ..support import ranks
from ..support.config import FREE, TrainConfig
from ..support.errors import TrainingError
from ..support.inputs import check_same
from .moments import maker_of
from .plan import Plan


def identity_of(
    model: nn.Module, config: TrainConfig, plan: Plan, valid: Sequence[Example], optimizer: torch.optim.Optimizer,
    name: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns what must be the same when a run is resumed: settings, data, base model, placement, ranks."""
    lora = adapters(model, name)
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig) if f.name not in FREE}
    return {
        **settings,
        "optimizer": f"{maker_of(optimizer)}'s {config.optimizer}",
        "max_steps": plan.max_steps,
        "batch_tokens": plan.batch_tokens,
        "batch_rows": plan.batch_rows,
        "eval_every": plan.eval_every,
        "examples": plan.labelled,
        "unlabeled": len(plan.rows) - plan.labelled,
        "data": digest(plan.rows),
        "validation data": digest(valid),
        "ranks": ranks.size(),
        "placement": {name: [m.rank, m.scaling, m.dropout] for name, m in lora.items()},
        "base model": fingerprint(model, list(lora) or [info.name for info in linear_modules(model)][:8]),
    }


def check_same_run(path: Path, kept: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises TrainingError where the run that a checkpoint belongs to (its identity is `kept`) is not this one (`now`)."""
    count = kept.get("ranks")
    if count != now["ranks"]:
        raise TrainingError(
            f"{path}: belongs to a training on {count} ranks, this one has {now['ranks']}: resume it under torchrun with "
            f"nodes x --nproc-per-node = {count}, or start anew with --overwrite"
        )
    kept = {"optimizer": "torch's adamw"} | kept  # before there was a choice
    check_same({name: kept.get(name) for name in now}, now, path, TrainingError)  # older ones kept more settings
