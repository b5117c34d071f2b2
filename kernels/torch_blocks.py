"""RMSNorm and gates in plain torch: the CPU's backend, with as few passes and saved tensors as torch's operations allow.

Takes any shape [..., K]. `mode` and `act` are those of norm.py and gate.py.

M tokens, K width of a norm, N width of a gate.
"""

from collections.abc import Sequence

import torch

from . import philox, torch_ops

MODES = ("narrow", "wide", "offset")
ACTS = ("silu", "gelu_tanh", "gelu")
_APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, mode: str, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, 1 / rms [..., 1] in float32, h): y = w h / rms(h) with h = x + residual. Without a residual, h is x itself."""
    h = x if residual is None else x + residual
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=wide)
    rstd = norm.square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    y = h * rstd
    if weight is None:
        return y.to(h.dtype), rstd, h
    if mode == "narrow":
        return y.to(h.dtype).mul_(weight), rstd, h
    return y.mul_(_factor(weight, mode, wide)).to(h.dtype), rstd, h


def rms_norm_grad(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, mode: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """dx = (g - x mean(g x) / rms^2) / rms + residual with g = w dy: 8 passes over x, where autograd takes 18."""
    wide = rstd.dtype
    if weight is None:
        g = dy.to(wide, copy=True)  # which is written to
    elif mode == "narrow":
        g = (dy * weight).to(wide)
    else:
        g = dy * _factor(weight, mode, wide)
    mean = (g * x).sum(-1, keepdim=True).div_(x.shape[-1])
    dx = g.mul_(rstd).addcmul_(x.to(wide), mean.mul_(rstd**3), value=-1)
    return dx.to(x.dtype) if residual is None else dx.add_(residual).to(x.dtype)


def rms_norm_shrink(
    x_MK: torch.Tensor,
    weight_K: torch.Tensor | None,
    eps: float,
    mode: str,
    adapters: Sequence[torch.Tensor],
    c: float,
    p: float = 0.0,
    seeds: Sequence[philox.Seed] = (0, 0, 0),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, 1 / rms [..., 1], S [G, M, R]): S = c drop(y) A^T of each adapter A [R, K]; x [..., K] has M rows."""
    y, rstd, _ = rms_norm(x_MK, weight_K, eps, mode)
    s = [torch_ops.shrink(y.reshape(-1, y.shape[-1]), a, c, p, seed) for a, seed in zip(adapters, seeds, strict=False)]
    return y, rstd, torch.stack(s)


def gate(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """act(gate) up"""
    return _act(gate, act).mul_(up)


def gate_grad(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    act: str,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dy up act'(gate), dy act(gate)), in `out` if it is given, which may be (gate, up)."""
    value, through = _act(gate, act), dy * up  # before either of gate and up is written to
    d_gate, d_up = out or (through, value)
    if act == "silu":
        torch.ops.aten.silu_backward.grad_input(through, gate, grad_input=d_gate)
    else:
        torch.ops.aten.gelu_backward.grad_input(through, gate, approximate=_APPROXIMATE[act], grad_input=d_gate)
    return d_gate, torch.mul(value, dy, out=d_up)


def _factor(weight: torch.Tensor, mode: str, wide: torch.dtype) -> torch.Tensor:
    """What multiplies x_hat in float32: w, or 1 + w."""
    assert mode in MODES, mode
    return weight.to(wide) + 1.0 if mode == "offset" else weight.to(wide)


def _act(gate: torch.Tensor, act: str) -> torch.Tensor:
    if act == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate=_APPROXIMATE[act])
