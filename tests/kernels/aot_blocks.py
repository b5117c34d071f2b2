"""The norms and gates of an 8-billion model, for aot_jobs.py to compile.

M tokens, K width, R rank.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from plopfast.kernels import triton_blocks

EPS, SEED = 1e-5, 1 << 40


def operands(m: int = 8192, k: int = 4096, r: int = 16, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Tensors of one norm on meta, and the merged g and u [M, 2 K] of a gate."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rstd, a = empty(m, dtype=torch.float32), empty(r, k, dtype=torch.float32)
    return SimpleNamespace(x=empty(m, k), w=empty(k), dy=empty(m, k), rstd=rstd, a=a, merged=empty(m, 2 * k))


def norm(target: str, mode: str = "narrow", **shape: Any) -> None:
    """With a residual, as between two blocks, and without."""
    o = operands(**shape)
    for residual in (None, o.dy):
        triton_blocks.rms_norm(o.x, o.w, EPS, mode, residual)
        triton_blocks.rms_norm_grad(o.dy, o.x, o.w, o.rstd, mode, residual)


def short_and_long_norms(target: str) -> None:
    """Of a head's queries, of a width that is no power of two, and of rows that are taken in parts."""
    for k in (128, 3072, 16384):
        norm(target, "offset", k=k)


def norm_shrink(target: str, count: int = 1, p: float = 0.0, mode: str = "narrow", **shape: Any) -> None:
    o = operands(**shape)
    triton_blocks.rms_norm_shrink(o.x, o.w, EPS, mode, (o.a,) * count, 2.0, p, (SEED,) * 3)


def gates(target: str, acts: tuple[str, ...] = ("silu", "gelu_tanh", "gelu"), **shape: Any) -> None:
    """Of two matrices and of one, whose gradient is one too."""
    o = operands(**shape)
    g, u = o.merged.chunk(2, dim=1)
    for act in acts:
        triton_blocks.gate(o.x, o.dy, act)
        triton_blocks.gate_grad(o.dy, o.x, o.x, act)
        triton_blocks.gate(g, u, act)
        triton_blocks.gate_grad(o.dy, g, u, act, operands(**shape).merged.chunk(2, dim=1))


def launchers(m: int, p: float, seed: int, n: int, k: int, r: int) -> dict[str, Callable[[], Any]]:
    """What a step with `m` tokens may call, with pointers."""
    o, halves = operands(m, k, r), operands(m, n, r).merged.chunk(2, dim=1)
    return {
        "rms_norm": lambda: triton_blocks.rms_norm(o.x, o.w, EPS, "narrow", o.dy),
        "rms_norm_grad": lambda: triton_blocks.rms_norm_grad(o.dy, o.x, o.w, o.rstd, "narrow", o.dy),
        "rms_norm_shrink": lambda: triton_blocks.rms_norm_shrink(
            o.x, o.w, EPS, "narrow", (o.a,) * 3, 2.0, p, (seed,) * 3
        ),
        "gate": lambda: triton_blocks.gate(*halves, "silu"),
        "gate_grad": lambda: triton_blocks.gate_grad(halves[0], *halves, "silu", halves),
    }
