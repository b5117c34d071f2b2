"""Memory and FLOPs of a training step before any training, from a run without values.

A copy of the model made of torch's fake tensors (shapes, dtypes and devices, no memory and no arithmetic) takes one
optimizer step's forward and backward passes as train.py does, while every storage that comes and goes is counted and every
product's FLOPs are added up. So a model that would not fit can be asked about, and full fine-tuning too.

Counted: the tensors that this process allocates for the step, and the optimizer's state. Not counted: what libraries and
the allocator take for themselves. liger-kernel, torch.compile and offload are not modelled: plopfast's own operations are.
"""

import copy
import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop, shape_wrapper

from ..lora.layer import inject
from ..lora.placement import Placement
from ..lora.shared import prepared
from ..models.running import device_of
from ..support.config import TrainConfig
from ..support.errors import ModelError
from .blocks import lean_modules, prepared_blocks
from .loss import Objective

MIB = 2**20


@dataclass(frozen=True)
class Estimate:
    """One choice's cost of a step. `total_mib` is the peak; its parts need not be alive at one time: `weights_mib` those of
    the base model, `adapters_mib` what is trained (values, where they are not base weights, gradients, AdamW's two moments,
    the best values so far, the moving average), `activations_mib` saved for a micro-batch's backward pass, `logits_mib`
    beside them in the loss."""

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
) -> list[Estimate]:
    """The cost of a step of `config` for each of `placements` (None: all weights are trained), as `Trainer` takes it on
    micro-batches of `rows` rows of `row_tokens` tokens, the last `label_tokens` of each with a label (None: all but the
    first). `best`: a validated training keeps the best values. Packed batches count as rows whose tokens see all earlier
    ones. `model` has no adapters and stays as it is.

    Raises ConfigError for settings that the model cannot take, ModelError where it needs values (as some mixtures of
    experts and kernels of others do).
    """
    objective, lean = Objective(model, recomputed=config.checkpointing), lean_modules(model)
    for module in lean.values():
        del module.forward
    batch = rows, row_tokens, row_tokens - 1 if label_tokens is None else label_tokens
    try:
        return [_one(objective, set(lean), name, p, config, batch, best) for name, p in placements.items()]
    except RuntimeError as error:  # which operations raise that need values, or know nothing of tensors without
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ModelError(
            f"{type(model).__name__}: no estimate is possible, as what it computes depends on its values ({first[0]})"
        ) from error


def as_rows(estimates: Sequence[Estimate]) -> list[dict[str, Any]]:
    """Return the rows of estimate.json, each compared in memory and FLOPs with full fine-tuning, the last estimate."""
    full = estimates[-1]
    return [
        dataclasses.asdict(e)
        | {"memory_of_full": e.total_mib / full.total_mib, "flops_of_full": e.tflops_per_step / full.tflops_per_step}
        for e in estimates
    ]


def _one(
    real: Objective,
    lean: set[str],
    name: str,
    placement: Placement | None,
    config: TrainConfig,
    batch: tuple[int, int, int],
    best: bool,
) -> Estimate:
    mode, live = FakeTensorMode(), Meter()
    with FakeCopyMode(mode):
        objective = copy.deepcopy(real)
    model = objective.model
    rows, tokens, labels = batch
    _without_mask(model, tokens)
    config = dataclasses.replace(config, liger=False, compile=False, offload=False)
    with mode:
        if placement is None:
            _widen(model)
            model.requires_grad_(True)
        else:  # torch's operations stand for the kernels, which need a GPU's tensors and allocate the same results
            inject(model, placement, dropout=getattr(config, "dropout", 0.0), backend="torch")
        device = device_of(model)
        ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        columns = torch.arange(tokens - 1 - labels, tokens - 1, device=device)
        at = (
            torch.arange(rows, device=device).repeat_interleave(labels, output_size=rows * labels),
            columns.repeat(rows),
        )
        full = {"input_ids": ids, "labels": ids, "at": at}
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        trained = [p for p in model.parameters() if p.requires_grad]
        values = sum(p.nbytes for p in trained)
        weights = live.now - (values if placement is not None else 0)
        model.train()
        with prepared_blocks(model, config, lean), prepared(model), live:
            for _ in range(min(config.accumulate, 2)):  # a third one finds what the second one found
                before = live.now
                loss = objective(full)
                saved, logits = live.now - before, live.peak - live.now
                loss.backward()
                del loss
    kept = values * (2 + best + bool(config.ema))  # AdamW's moments, the best values and the moving average
    return Estimate(
        name=name,
        types=placement.types if placement is not None else [],
        parameters=sum(p.numel() for p in trained),
        weights_mib=weights / MIB,
        adapters_mib=(kept + values + (values if placement is not None else 0)) / MIB,
        activations_mib=saved / MIB,
        logits_mib=logits / MIB,
        total_mib=(live.peak + kept) / MIB,
        tflops_per_step=live.flops / min(config.accumulate, 2) * config.accumulate / 1e12,
    )


def _widen(model: nn.Module) -> None:
    """All parameters in float32, as full fine-tuning has them (Module.float cannot change tensors without values)."""
    wide: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, wide.setdefault(p, nn.Parameter(p.detach().float())))


def _without_mask(model: Any, tokens: int) -> None:
    """Lets attention go without a mask where it does in training. transformers builds none where no row is packed, which
    it cannot read from tensors without values; for an attention that it does not know, it never builds one."""
    config = getattr(model, "config", None)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "_attn_implementation", None) == "sdpa" and (window is None or window >= tokens):
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register("plopfast_sdpa", sdpa_attention_forward)
        model.set_attn_implementation("plopfast_sdpa")


class Meter(TorchDispatchMode):
    """Bytes of the storages that operations made, or that `add` was given, and that are still alive, `now` and at their
    `peak`; and `flops` of the products, a multiplication with its addition being two."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known: set[int] = set()
        self._formulas = flop_registry | {op: shape_wrapper(formula) for op, formula in FORMULAS.items()}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        if formula := self._formulas.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _lora_forward(x: Any, w: Any, a: Any, *_: Any, **__: Any) -> int:
    (m, k), n, r = x, w[0], a[0]
    return 2 * m * (k * r + n * k + r * n)  # S, X W^T, S B^T


def _lora_backward(dy: Any, x: Any, s: Any, w: Any, a: Any, *rest: Any, **__: Any) -> int:
    (m, k), n, r = x, w[0], a[0]
    need_x, need_a, need_b = map(bool, rest[5:8])
    return 2 * m * (r * n * (need_b + (need_a or need_x)) + r * k * (need_a + need_x) + n * k * need_x)


_OPS, _ATEN = torch.ops.plopfast, torch.ops.aten
FORMULAS = {  # of shapes; torch 2.13 knows neither its products in place nor the CPU's attention
    _OPS.lora_forward: _lora_forward,
    _OPS.lora_backward: _lora_backward,
    _ATEN.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1],
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(q, k, v),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda dy, q, k, v, *_, **__: sdpa_backward_flop(dy, q, k, v)
    ),
}
