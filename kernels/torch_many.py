"""Several adapters on one frozen weight, segment by segment: small products for each, and the frozen one over all rows.

    S = c drop(X) A_e^T;  Y = X W^T + S B_e^T + bias          for the rows of segment e, cuts[e] to cuts[e + 1]
    dS = c dY B_e;  dB_e = dY^T S;  dA_e = dS^T drop(X);  dX = dY W + mask (dS A_e)

The low-rank terms are written into their rows of Y (or dX) first, and the frozen product is added to it in place. This is the
CPU's path. On a GPU it serves plain torch and, by the plan's kernels, segments with dropout. Where segments are cut the host
knows, so nothing waits. The mask counts rows from the segment's start.

M rows, K in, N out, R rank, E segments.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import dispatch, library, philox
from .codes import Weight, dense, few, linear_of_few

Matrices = Sequence[torch.Tensor | None]


class Way(NamedTuple):
    """How a call is computed: `sizes` are the segments' rows, `factors` (c, p, seed) of each, `together` by kernels for all
    segments at once. `busy` are the segments with rows and an adapter, `bare` those with rows alone."""

    cuts: tuple[int, ...]
    sizes: list[int]
    factors: list[tuple[float, float, philox.Seed]]
    busy: list[int]
    bare: list[int]
    plan: dispatch.Plan
    together: bool


def forward(
    x_MK: torch.Tensor, w: Weight, a: Matrices, b: Matrices, bias_N: torch.Tensor | None, way: Way
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Y [M, N], and S [rows, R] of each busy segment"""
    w = w if isinstance(w, torch.Tensor) else w.held()
    inside = not isinstance(w, torch.Tensor) and few(x_MK, w)  # codes that are decoded inside the product
    own = None if inside else bias_N
    y_MN = x_MK.new_empty(x_MK.shape[0], w.shape[0])
    x, y, s = x_MK.split_with_sizes(way.sizes), y_MN.split_with_sizes(way.sizes), []
    for e in way.bare:
        y[e].zero_() if own is None else y[e].copy_(own)
    for e in way.busy:
        a_RK, b_NR = a[e], b[e]
        assert a_RK is not None and b_NR is not None
        s_mR = library.shrink(x[e], a_RK, *way.factors[e], way.plan)
        s.append(s_mR)
        b_RN = b_NR.to(x_MK.dtype).T
        torch.mm(s_mR, b_RN, out=y[e]) if own is None else torch.addmm(own, s_mR, b_RN, out=y[e])
    if not isinstance(w, torch.Tensor) and inside:
        return y_MN.add_(linear_of_few(x_MK, w, bias_N)), s
    return y_MN.addmm_(x_MK, dense(w).T), s


def backward(
    dy_MN: torch.Tensor, x_MK: torch.Tensor, s: Sequence[torch.Tensor], w: Weight, a: Matrices, b: Matrices, way: Way,
    need_x: bool, need_a: Sequence[bool], need_b: Sequence[bool], dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:  # fmt: skip
    """dX [M, K], and dA_e [R, K] and dB_e [N, R] of each segment in its `dtypes`; None where it is not needed."""
    dx_MK = x_MK.new_empty(x_MK.shape) if need_x else None
    dx = None if dx_MK is None else dx_MK.split_with_sizes(way.sizes)
    dy, x = dy_MN.split_with_sizes(way.sizes), x_MK.split_with_sizes(way.sizes)
    da, db = _zeros(a, need_a, dtypes, 0, way), _zeros(b, need_b, dtypes, 1, way)
    if dx is not None:
        for e in way.bare:
            dx[e].zero_()
    for e, s_mR in zip(way.busy, s, strict=True):
        a_RK, b_NR, (c, p, seed) = a[e], b[e], way.factors[e]
        assert a_RK is not None and b_NR is not None
        ds_mR, db[e] = library.grad_s_and_b(
            dy[e], s_mR, b_NR, c, way.plan, need_x or need_a[e], need_b[e], dtypes[e][1]
        )
        if ds_mR is not None and need_a[e]:
            da[e] = library.grad_a(ds_mR, x[e], p, seed, way.plan, dtypes[e][0])
        if ds_mR is not None and dx is not None:
            _low_rank(ds_mR, a_RK, p, seed, way.plan, dx[e])
    return None if dx_MK is None else dx_MK.addmm_(dy_MN, dense(w)), da, db


def _low_rank(
    ds_mR: torch.Tensor, a_RK: torch.Tensor, p: float, seed: philox.Seed, plan: dispatch.Plan, out_mK: torch.Tensor
) -> None:
    """out = mask (dS A)"""
    if p and plan.backend == "triton":
        from . import triton_ops  # only where it can run

        triton_ops.low_rank(ds_mR, a_RK.T, p=p, seed=seed, out=out_mK)
        return
    torch.mm(ds_mR, a_RK.to(ds_mR.dtype), out=out_mK)
    if p:
        out_mK.mul_(philox.keep_mask(seed, out_mK.shape[0], out_mK.shape[1], p, out_mK.device))


def _zeros(
    of: Matrices, needed: Sequence[bool], dtypes: Sequence[tuple[torch.dtype, torch.dtype]], which: int, way: Way
) -> list[torch.Tensor | None]:
    """The gradients of segments without rows; None for the others, as yet."""
    found: list[torch.Tensor | None] = [None] * len(of)
    for e, one in enumerate(of):
        if one is not None and needed[e] and not way.sizes[e]:
            found[e] = torch.zeros_like(one, dtype=dtypes[e][which])
    return found
