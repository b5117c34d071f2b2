"""Memory and FLOPs of a training step before any training, from a run without values.

A copy of the model made of torch's fake tensors (shapes, dtypes and devices, but no memory and no arithmetic) takes the
forward and backward passes of one optimizer step, as trainer.py does. Meanwhile every storage that comes and goes is
counted, and the FLOPs of every product are added up. So a model that would not fit can be estimated, and full
fine-tuning too.

Counted: the tensors that this process allocates for the step, and the optimizer's state. Not counted: what libraries and
the allocator take for themselves. liger-kernel and torch.compile are not modelled: plopfast's own operations are.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from ..lora.layer import inject
from ..lora.placement import Placement
from ..lora.shared import Prepared
from ..models.frozen import make_dense
from ..models.lean import lean_modules
from ..models.running import device_of
from ..models.streaming import unstream
from ..models.tiles import TOKENS, token_wise
from ..support.config import TrainConfig
from ..support.errors import ModelError, PlopfastError
from ..support.progress import bar
from .blocks import prepared_blocks
from .loss import Objective
from .meter import Meter
from .moments import bytes_of_moments

MIB = 2**20


@dataclass(frozen=True)
class Estimate:
    """What a step costs with one choice of what is trained. `total_mib` is the peak; its parts need not be alive at the
    same time: `weights_mib` of the base model, `adapters_mib` for what is trained (values, where they are not base
    weights, gradients, AdamW's two moments, the best values so far, the moving average), `activations_mib` saved for the
    backward pass of a micro-batch, `logits_mib` beside them in the loss."""

    name: str
    types: list[str]
    parameters: int
    weights_mib: float
    adapters_mib: float
    activations_mib: float
    logits_mib: float
    total_mib: float
    tflops_per_step: float


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
    objective, lean = Objective(model, recomputed=config.checkpointing), recognised(model, config)
    labels = row_tokens - 1 if label_tokens is None else label_tokens
    step = Step(objective, lean, config, rows, row_tokens, labels, best)
    found = []
    try:
        with bar("estimate", len(placements), "placements", progress) as meter:
            for name, placement in placements.items():
                found.append(step.estimate(name, placement))
                meter.update()
    except PlopfastError:
        raise
    except Exception as error:  # a model's own code, and torch's formulas, may raise anything without values
        first = str(error).strip().splitlines()[:1] or [""]
        raise ModelError(
            f"{type(model).__name__}: no estimate is possible, as what it computes depends on its values, or its "
            f"FLOPs are unknown ({type(error).__name__}: {first[0]})"
        ) from error
    return found


def recognised(model: nn.Module, config: TrainConfig) -> dict[str, str]:
    """Returns the kinds of the modules that `prepared_blocks` would give another forward, by name; it takes them where the
    tensors have no values. `model` stays as it is."""
    lean = lean_modules(model)
    kinds = {name: str(module.forward.kind) for name, module in lean.items()}  # type: ignore[attr-defined]
    try:
        alone = token_wise(model)[0] if config.mlp_rows else {}
    finally:
        for module in lean.values():
            del module.forward
    return dict.fromkeys(alone, TOKENS) | kinds


def as_rows(estimates: Sequence[Estimate]) -> list[dict[str, Any]]:
    """For JSON, each with its share of the memory and FLOPs of full fine-tuning, the last one."""
    full = estimates[-1]
    return [
        dataclasses.asdict(e)
        | {"memory_of_full": e.total_mib / full.total_mib, "flops_of_full": e.tflops_per_step / full.tflops_per_step}
        for e in estimates
    ]


@dataclass(frozen=True)
class Step:
    """A step to estimate: all but the placement.

    `lean` tells what `lean_modules` and `token_wise` found in the real model: name -> kind. A micro-batch has `rows` of `tokens` tokens, of
    which the last `labels` have a label.
    """

    objective: Objective
    lean: dict[str, str]
    config: TrainConfig
    rows: int
    tokens: int
    labels: int
    best: bool

    def estimate(self, name: str, placement: Placement | None) -> Estimate:
        """Runs the step on a copy of the model without values."""
        mode, live = FakeTensorMode(), Meter()
        with FakeCopyMode(mode):
            objective = copy.deepcopy(self.objective)
        model = objective.model
        _without_mask(model, self.tokens)
        config = dataclasses.replace(self.config, liger=False, compile=False)
        with mode:
            if placement is None:
                unstream(model)
                make_dense(model)
                _widen(model)
                model.requires_grad_(True)
            else:  # torch's operations stand for the kernels, which need a GPU's tensors and allocate the same results
                inject(model, placement, dropout=getattr(config, "dropout", 0.0), backend="torch")
            batch = self._batch(device_of(model))
            streaming: Any = getattr(model, "streaming", None)
            for tensor in (*model.parameters(), *model.buffers(), *(streaming.streamer.slots if streaming else ())):
                live.add(tensor)
            trained = [p for p in model.parameters() if p.requires_grad]
            values = sum(p.nbytes for p in trained)
            weights = live.now - (values if placement is not None else 0)
            model.train()
            passes = min(config.accumulate, 2)  # a third one finds what the second one found
            with prepared_blocks(model, config, self.lean), Prepared(model), live:
                for _ in range(passes):
                    before = live.now
                    loss = objective(batch)
                    saved, logits = live.now - before, live.peak - live.now
                    loss.backward()
                    del loss
        best = self.best and (config.keep_best == "device" or device_of(model).type == "cpu")
        # the moments, the best values and the moving average
        kept = bytes_of_moments(trained, config.optimizer) + values * (best + bool(config.ema))
        return Estimate(
            name=name,
            types=placement.types if placement is not None else [],
            parameters=sum(p.numel() for p in trained),
            weights_mib=weights / MIB,
            adapters_mib=(kept + values + (values if placement is not None else 0)) / MIB,
            activations_mib=saved / MIB,
            logits_mib=logits / MIB,
            total_mib=(live.peak + kept) / MIB,
            tflops_per_step=live.flops / passes * config.accumulate / 1e12,
        )

    def _batch(self, device: torch.device) -> dict[str, Any]:
        """Returns what `Objective` takes; the places of the labels are indices, as fake labels cannot be read."""
        ids = torch.zeros(self.rows, self.tokens, dtype=torch.long, device=device)
        columns = torch.arange(self.tokens - 1 - self.labels, self.tokens - 1, device=device)
        row = torch.arange(self.rows, device=device)
        row = row.repeat_interleave(self.labels, output_size=self.rows * self.labels)
        return {"input_ids": ids, "labels": ids, "at": (row, columns.repeat(self.rows))}


def _widen(model: nn.Module) -> None:
    """Makes all parameters float32, as full fine-tuning has them; Module.float cannot change tensors without values."""
    wide: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, wide.setdefault(p, nn.Parameter(p.detach().float())))


def _without_mask(model: Any, tokens: int) -> None:
    """Makes attention run without a mask where training has none. transformers builds no mask where no row is packed, but
    it cannot see that in tensors without values; for an attention that it does not know, it never builds one."""
    config = getattr(model, "config", None)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "_attn_implementation", None) == "sdpa" and (window is None or window >= tokens):
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register("plopfast_sdpa", sdpa_attention_forward)
        model.set_attn_implementation("plopfast_sdpa")
