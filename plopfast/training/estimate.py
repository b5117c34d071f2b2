"""Memory and FLOPs of a training step before any training: for a model as it is loaded, or for its configuration alone.

dry.py runs the step without values.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..lora.placement import Placement
from ..support.config import TrainConfig
from ..support.errors import ModelError, PlopfastError, first_line
from ..support.progress import bar
from .dry import MIB, Estimate, Step

__all__ = ["MIB", "Estimate", "as_rows", "estimate", "estimate_shapes"]


def estimate(
    model: nn.Module,
    placements: Mapping[str, Placement | None],
    config: TrainConfig,
    *,
    rows: int,
    row_tokens: int,
    label_tokens: int | None = None,
    best: bool = True,
    progress: bool = False,
) -> list[Estimate]:
    """Estimates a step of `config` for each of `placements` (None: all weights are trained), as `Trainer` takes it.

    A micro-batch has `rows` rows of `row_tokens` tokens, of which the last `label_tokens` have a label (None: all but the
    first). Packed batches count as rows whose tokens see all earlier ones. `best`: a training with validation keeps the
    best values. `model` has no adapters and stays as it is.

        estimate(model, {"mine": placement, "full": None}, TrainConfig(), rows=8, row_tokens=512)

    Raises ConfigError for settings that the model cannot take, ModelError where no estimate is possible: some mixtures of
    experts, and kernels that torch does not know, need values.
    """
    labels = row_tokens - 1 if label_tokens is None else label_tokens
    step = Step.of_model(model, config, rows=rows, tokens=row_tokens, labels=labels, best=best)
    return _of(step, placements, progress)


def estimate_shapes(
    model: nn.Module,
    placements: Mapping[str, Placement | None],
    config: TrainConfig,
    *,
    rows: int,
    row_tokens: int,
    label_tokens: int | None = None,
    best: bool = True,
    device: str | torch.device = "meta",
    resident_share: float | None = None,
    embedding: str = "device",
    progress: bool = False,
) -> list[Estimate]:
    """As `estimate`, for a model without values, as `models.shapes.model_of` builds it. `device` "meta" stands for a card;
    "cpu" counts a training on the CPU. With `resident_share` all other blocks are streamed from CPU memory, and with
    `embedding="cpu"` rows are looked up there.

        estimate_shapes(model_of("meta-llama-3-8b", quantize="nf4"), {"mine": placement}, config, rows=1, row_tokens=2048)
    """
    labels = row_tokens - 1 if label_tokens is None else label_tokens
    of: dict[str, Any] = {"rows": rows, "tokens": row_tokens, "labels": labels, "best": best}
    of |= {"resident_share": resident_share, "embedding": embedding}
    step = Step.of_shapes(model, config, device=torch.device(device), **of)
    return _of(step, placements, progress)


def _of(step: Step, placements: Mapping[str, Placement | None], progress: bool) -> list[Estimate]:
    found = []
    try:
        with bar("estimate", len(placements), "placements", progress) as meter:
            for name, placement in placements.items():
                found.append(step.estimate(name, placement))
                meter.update()
    except PlopfastError:
        raise
    except Exception as error:  # a model's own code, and torch's formulas, may raise anything without values
        raise ModelError(
            f"{type(step.objective.model).__name__}: no estimate is possible, as what it computes depends on its values, or its "
            f"FLOPs are unknown ({type(error).__name__}: {first_line(error)})"
        ) from error
    return found


def as_rows(estimates: Sequence[Estimate]) -> list[dict[str, Any]]:
    """For JSON, each with its share of the memory and FLOPs of full fine-tuning, the last one."""
    full = estimates[-1]
    return [
        dataclasses.asdict(e)
        | {"memory_of_full": e.total_mib / full.total_mib, "flops_of_full": e.tflops_per_step / full.tflops_per_step}
        for e in estimates
    ]
