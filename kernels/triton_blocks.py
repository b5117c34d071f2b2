"""Launchers of RMSNorm and gates, in two parts as in triton_ops.py: one makes a plan from shapes, one takes the tensors.

Matrices have rows of any stride, and their last stride is 1. Outputs are dense. Callers check shapes and dtypes.

M tokens, K width of a norm, N width of a gate, R rank, G adapters that share an input.
"""

from collections.abc import Callable, Sequence

import torch
import triton

from . import dispatch, philox
from .gate import gate as gate_kernel, gate_grad as gate_grad_kernel
from .grids import STAGES
from .launch import Planned, padded_rank, plan, precision
from .norm import rms_norm as rms_norm_kernel, rms_norm_grad as rms_norm_grad_kernel, rms_norm_shrink as shrink_kernel
from .triton_ops import MAX_STACKED, shrink_stacked

LONGEST = 8192  # elements of a row that a program keeps in registers; a power of two
LOOPED = 4096  # of a longer row, at a time
TILE = 2048  # elements of a program, where rows are short
SHARE = 0.75  # of the SMs that rms_norm_shrink has to fill
MOST_WIDTH = 128  # of the accumulators of all adapters, beyond which they would spill


def rms_norm(
    x_MK: torch.Tensor, weight_K: torch.Tensor | None, eps: float, mode: str, residual_MK: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, 1 / rms [M] in float32, h): y = w h / rms(h) with h = x + residual. Without a residual, h is x itself.

    `mode` is "narrow", "wide" or "offset", as norm.py says; without a weight it doesn't matter.
    """
    residual = None if residual_MK is None else residual_MK.stride(0)
    run = plan(_rms_norm, x_MK.device, x_MK.dtype, x_MK.shape, x_MK.stride(0), *_of(weight_K, mode), eps, residual)
    return run(x_MK, weight_K, residual_MK)


def _rms_norm(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, row: int, w_dtype: torch.dtype | None, mode: str, eps: float,
    residual: int | None,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # fmt: skip
    m, k = shape
    bm, bk, warps = row_tiles(k)
    launch = Planned(
        rms_norm_kernel, (triton.cdiv(m, bm),), (k, eps, row, residual or 0),
        {"RESIDUAL": residual is not None, "MODE": mode, "WHOLE": k <= bk, "BM": bm, "BK": bk}, device, num_warps=warps,
    )  # fmt: skip

    def run(
        x: torch.Tensor, weight: torch.Tensor | None, other: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, rstd = x.new_empty(m, k), x.new_empty(m, dtype=torch.float32)
        h = x if other is None else x.new_empty(m, k)
        if m:
            launch((x, x if other is None else other, x if weight is None else weight.contiguous(), h, y, rstd), (m,))
        return y, rstd, h

    return run


def rms_norm_grad(
    dy_MK: torch.Tensor, x_MK: torch.Tensor, weight_K: torch.Tensor | None, rstd_M: torch.Tensor, mode: str,
    residual_MK: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """dx of `rms_norm` from dy, plus the gradient `residual` that reaches x another way. x is what was normalised: h."""
    residual = None if residual_MK is None else residual_MK.stride(0)
    rows = dy_MK.stride(0), x_MK.stride(0)
    run = plan(_rms_norm_grad, x_MK.device, x_MK.dtype, x_MK.shape, rows, *_of(weight_K, mode), residual)
    return run(dy_MK, x_MK, weight_K, rstd_M, residual_MK)


def _rms_norm_grad(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, rows: tuple[int, int], w_dtype: torch.dtype | None, mode: str,
    residual: int | None,
) -> Callable[..., torch.Tensor]:  # fmt: skip
    m, k = shape
    bm, bk, warps = row_tiles(k)
    launch = Planned(
        rms_norm_grad_kernel, (triton.cdiv(m, bm),), (k, *rows, residual or 0),
        {"RESIDUAL": residual is not None, "MODE": mode, "WHOLE": k <= bk, "BM": bm, "BK": bk}, device, num_warps=warps,
    )  # fmt: skip

    def run(
        dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, other: torch.Tensor | None
    ) -> torch.Tensor:
        dx = x.new_empty(m, k)
        if m:
            launch((dy, x, x if weight is None else weight.contiguous(), rstd, x if other is None else other, dx), (m,))
        return dx

    return run


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
    """(y, 1 / rms [M], S [G, M, R]): `rms_norm`, and S = c drop(y) A^T of up to three adapters A [R, K] of one layout.

    It is `rms_norm` and then `shrink_stacked(y, adapters, c, p, seeds)`, but y is written and not read again. c includes
    the factor 1 / (1 - p). It takes those two launches where it would be slower: for few tokens, whose programs leave SMs
    idle while y lies in the cache anyway, and for ranks that are together too large for one program.

        y, rstd, s = rms_norm_shrink(x, norm.weight, 1e-6, "narrow", (a_q, a_k, a_v), scaling)
    """
    first = adapters[0]
    for a in adapters[1:]:
        assert a.shape == first.shape and a.stride() == first.stride()
    run = plan(
        _rms_norm_shrink, x_MK.device, x_MK.dtype, x_MK.shape, x_MK.stride(0), *_of(weight_K, mode), eps, first.dtype,
        first.shape[0], first.stride(), len(adapters), c, p, precision(x_MK),
    )  # fmt: skip
    return run(x_MK, weight_K, adapters, seeds)


def _rms_norm_shrink(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, row: int, w_dtype: torch.dtype | None, mode: str, eps: float,
    a_dtype: torch.dtype, rank: int, a_strides: tuple[int, ...], count: int, c: float, p: float, exact: str,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # fmt: skip
    assert count <= MAX_STACKED
    (m, k), padded, target = shape, padded_rank(rank), dispatch.target_of(device)
    bm, bk, warps = shrink_tiles(target, dtype, padded * count)
    if padded * count > MOST_WIDTH or triton.cdiv(m, bm) < SHARE * target.units:
        return lambda x, weight, adapters, seeds: _apart(x, weight, eps, mode, adapters, c, p, seeds)
    launch = Planned(
        shrink_kernel, (triton.cdiv(m, bm),), (k, eps, c, philox.threshold(p), row, *a_strides),
        {"MODE": mode, "RANK": rank, "RP": padded, "ADAPTERS": count, "DROP": p > 0, "PRECISION": exact, "BM": bm,
         "BK": bk}, device, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip

    def run(
        x: torch.Tensor, weight: torch.Tensor | None, adapters: Sequence[torch.Tensor], seeds: Sequence[philox.Seed]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a0, a1, a2 = (*adapters, *[adapters[0]] * (MAX_STACKED - count))
        y, rstd, s = x.new_empty(m, k), x.new_empty(m, dtype=torch.float32), x.new_empty(count, m, rank)
        launch((x, x if weight is None else weight.contiguous(), a0, a1, a2, y, rstd, s), (m, *(*seeds, 0, 0)[:3]))
        return y, rstd, s

    return run


def _apart(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, mode: str, adapters: Sequence[torch.Tensor], c: float, p: float,
    seeds: Sequence[philox.Seed],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    y, rstd, _ = rms_norm(x, weight, eps, mode)
    return y, rstd, shrink_stacked(y, adapters, c, p, seeds)


def gate(gate_MN: torch.Tensor, up_MN: torch.Tensor, act: str) -> torch.Tensor:
    """y = act(gate) up; `act` is "silu", "gelu_tanh" or "gelu"."""
    rows = gate_MN.stride(0), up_MN.stride(0)
    return plan(_gate, gate_MN.device, gate_MN.dtype, gate_MN.shape, rows, act)(gate_MN, up_MN)


def _gate(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, rows: tuple[int, int], act: str
) -> Callable[..., torch.Tensor]:
    m, n = shape
    bm, bn = gate_tiles(n)
    launch = Planned(
        gate_kernel, (triton.cdiv(m, bm) * triton.cdiv(n, bn),), (n, *rows), {"ACT": act, "BM": bm, "BN": bn}, device,
        num_warps=4,
    )  # fmt: skip

    def run(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        y = g.new_empty(m, n)
        if m and n:
            launch((g, u, y), (m,))
        return y

    return run


def gate_grad(
    dy_MN: torch.Tensor,
    gate_MN: torch.Tensor,
    up_MN: torch.Tensor,
    act: str,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d gate, d up), in `out` if it is given: the halves of one matrix, say, or `gate` and `up` themselves."""
    rows = tuple(matrix.stride(0) for matrix in (dy_MN, gate_MN, up_MN, *(out or ())))
    return plan(_gate_grad, dy_MN.device, dy_MN.dtype, dy_MN.shape, rows, act)(dy_MN, gate_MN, up_MN, out)


def _gate_grad(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, rows: tuple[int, ...], act: str
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    m, n = shape
    bm, bn = gate_tiles(n)
    launch = Planned(
        gate_grad_kernel, (triton.cdiv(m, bm) * triton.cdiv(n, bn),), (n, *(*rows, n, n)[:5]),
        {"ACT": act, "BM": bm, "BN": bn}, device, num_warps=4,
    )  # fmt: skip

    def run(
        dy: torch.Tensor, g: torch.Tensor, u: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dg, du = out or (g.new_empty(m, n), g.new_empty(m, n))
        if m and n:
            launch((dy, g, u, dg, du), (m,))
        return dg, du

    return run


def row_tiles(k: int) -> tuple[int, int, int]:
    """(BM, BK, warps) of a norm over K: a whole row if it fits registers, several if they are short."""
    # the rows of an odd width come element by element, and so many addresses take registers
    longest = LONGEST if k % 16 == 0 else min(LONGEST, LOOPED)
    bk = max(16, triton.next_power_of_2(k)) if k <= longest else LOOPED
    return max(1, TILE // bk), bk, max(4, bk // 512)


def shrink_tiles(target: dispatch.Target, dtype: torch.dtype, width: int) -> tuple[int, int, int]:
    """(BM, BK, warps) of rms_norm_shrink, which has a program for BM rows alone; `width`: accumulators of a row."""
    bk = 32 if dtype == torch.float32 or width > 64 else 64
    return 16 if target.name == "interpreter" else 32, bk, 4


def gate_tiles(n: int) -> tuple[int, int]:
    """(BM, BN) of a gate: 16 bytes for a thread at a time in 16-bit types, twice."""
    bn = min(1024, max(16, triton.next_power_of_2(n)))
    return TILE // bn, bn


def _of(weight: torch.Tensor | None, mode: str) -> tuple[torch.dtype | None, str]:
    """What a plan depends on in the weight."""
    return (None, "none") if weight is None else (weight.dtype, mode)
