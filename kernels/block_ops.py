"""RMSNorm and gated MLPs with their gradients: the Triton kernels where they run, plain torch elsewhere.

    y = rms_norm(x, weight, 1e-6)
    h, y = add_rms_norm(x, attention(x), weight, 1e-6)
    y = gate(gate_proj(x), up_proj(x), "silu")

Tensors have any shape [..., K]. The backward pass keeps x and 1 / rms(x), or g and u. Weights are frozen.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from . import dispatch, philox, torch_blocks
from .autograd import once


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, mode: str = "narrow", backend: str = "auto"
) -> torch.Tensor:
    """y = w x / rms(x) over the last dimension. `mode`: how the weight [K] multiplies.

    "narrow": w * x_hat.to(dtype), as in Llama. "wide": (w * x_hat).to(dtype), computed in float32. "offset":
    ((1 + w) * x_hat).to(dtype), as in Gemma. Raises ValueError for a weight that is trained or has another dtype than x.
    """
    _check_weight(x, weight)
    return _RMSNorm.apply(x, weight, eps, mode, backend)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    mode: str = "narrow",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, y): h = x + residual, and y = rms_norm(h) in the same pass, as is their gradient. Raises as `rms_norm` does,
    and ValueError for a residual of another shape or dtype than x.
    """
    _check_weight(x, weight)
    _check_pair("x and residual", x, residual)
    return _AddRMSNorm.apply(x, residual, weight, eps, mode, backend)


def rms_norm_shrink(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    mode: str,
    adapters: Sequence[torch.Tensor],
    c: float,
    p: float = 0.0,
    seeds: Sequence[philox.Seed] = (0, 0, 0),
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, S [G, M, R]): `rms_norm`, and S = c drop(y) A^T of up to three adapters A [R, K] of y's readers, in one read of x.

    S is for those who compute its gradients themselves, as lora/grouped.py does: it has none here. Raises as `rms_norm` does.
    """
    _check_weight(x, weight)
    return _RMSNormShrink.apply(x, weight, eps, mode, adapters, c, p, seeds, backend)


def gate(gate: torch.Tensor, up: torch.Tensor, act: str, backend: str = "auto") -> torch.Tensor:
    """act(gate) up. `act` is "silu" (SwiGLU), "gelu_tanh" or "gelu" (GeGLU by tanh or by erf). Raises ValueError unless both
    have one shape and dtype."""
    _check_pair("gate and up", gate, up)
    return _Gate.apply(gate, up, act, backend)


def merged_gate(gate_up: torch.Tensor, act: str, backend: str = "auto") -> torch.Tensor:
    """`gate` of the two halves of the last dimension, whose gradients are written as one tensor."""
    return _MergedGate.apply(gate_up, act, backend)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float, mode: str, backend: str
    ) -> torch.Tensor:
        ops = _ops(x, backend)
        y, rstd, _ = ops.rms_norm(_rows(ops, x), weight, eps, mode)
        ctx.save_for_backward(x, weight, rstd)
        ctx.ops, ctx.mode = ops, mode
        return y.view(x.shape)

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (x, weight, rstd), ops = ctx.saved_tensors, ctx.ops
        dx = ops.rms_norm_grad(_rows(ops, dy), _rows(ops, x), weight, rstd, ctx.mode)
        return dx.view(x.shape), None, None, None, None


class _RMSNormShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps, mode, adapters, c, p, seeds, backend):
        ops = _ops(x, backend)
        y, rstd, s = ops.rms_norm_shrink(_rows(ops, x), weight, eps, mode, adapters, c, p, seeds)
        ctx.save_for_backward(x, weight, rstd)
        ctx.ops, ctx.mode = ops, mode
        ctx.mark_non_differentiable(s)
        return y.view(x.shape), s

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor, _):
        (x, weight, rstd), ops = ctx.saved_tensors, ctx.ops
        dx = ops.rms_norm_grad(_rows(ops, dy), _rows(ops, x), weight, rstd, ctx.mode)
        return dx.view(x.shape), None, None, None, None, None, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        mode: str,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ops = _ops(x, backend)
        y, rstd, h = ops.rms_norm(_rows(ops, x), weight, eps, mode, _rows(ops, residual))
        h = h.view(x.shape)
        ctx.save_for_backward(h, weight, rstd)
        ctx.ops, ctx.mode = ops, mode
        ctx.set_materialize_grads(False)
        return h, y.view(x.shape)

    @staticmethod
    @once
    def backward(ctx: Any, dh: torch.Tensor | None, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (h, weight, rstd), ops = ctx.saved_tensors, ctx.ops
        if dy is not None:
            other = None if dh is None else _rows(ops, dh)
            dh = ops.rms_norm_grad(_rows(ops, dy), _rows(ops, h), weight, rstd, ctx.mode, other).view(h.shape)
        return dh, dh, None, None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: str, backend: str) -> torch.Tensor:
        ops = _ops(gate, backend)
        ctx.save_for_backward(gate, up)
        ctx.ops, ctx.act = ops, act
        return ops.gate(_rows(ops, gate), _rows(ops, up), act).view(gate.shape)

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (gate, up), ops = ctx.saved_tensors, ctx.ops
        d_gate, d_up = ops.gate_grad(_rows(ops, dy), _rows(ops, gate), _rows(ops, up), ctx.act)
        return d_gate.view(gate.shape), d_up.view(up.shape), None, None


class _MergedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, act: str, backend: str) -> torch.Tensor:
        ops = _ops(gate_up, backend)
        ctx.save_for_backward(gate_up)
        ctx.ops, ctx.act = ops, act
        y = ops.gate(*_rows(ops, gate_up).chunk(2, dim=-1), act)
        return y.view(*gate_up.shape[:-1], y.shape[-1])

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gate_up,), ops = ctx.saved_tensors, ctx.ops
        gradient = gate_up.new_empty(gate_up.shape)
        halves = _rows(ops, gradient).chunk(2, dim=-1)
        ops.gate_grad(_rows(ops, dy), *_rows(ops, gate_up).chunk(2, dim=-1), ctx.act, halves)
        return gradient, None, None


def _ops(x: torch.Tensor, backend: str) -> ModuleType:
    """triton_blocks, or torch_blocks. Tensors without values and those that are traced take torch's operations."""
    real = type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta and not torch.compiler.is_compiling()
    if not (real and dispatch.runs_kernels(x.device, x.dtype, backend)):
        return torch_blocks
    from . import triton_blocks  # only where it can run

    return triton_blocks


def _rows(ops: ModuleType, x: torch.Tensor) -> torch.Tensor:
    """What the kernels take: a matrix whose last stride is 1. Torch takes any shape."""
    if ops is torch_blocks:
        return x
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _check_weight(x: torch.Tensor, weight: torch.Tensor | None) -> None:
    if weight is not None and (weight.requires_grad or weight.dtype != x.dtype or weight.shape != x.shape[-1:]):
        raise ValueError(
            f"weight: expected a frozen {x.dtype} [{x.shape[-1]}] like x, got {weight.dtype} {list(weight.shape)} with "
            f"requires_grad={weight.requires_grad}: freeze it by requires_grad_(False), or convert it"
        )


def _check_pair(names: str, one: torch.Tensor, other: torch.Tensor) -> None:
    if one.shape != other.shape or one.dtype != other.dtype:
        raise ValueError(
            f"{names}: expected one shape and dtype, got {one.dtype} {list(one.shape)} and {other.dtype} "
            f"{list(other.shape)}: expand or convert one of them"
        )
