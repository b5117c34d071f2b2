"""Products by segments in plain torch: one small product after the other. On a GPU that waits once for where segments end.

torch's own grouped product takes no float64, and no rows that are not a multiple of 16 bytes; on the CPU it is such a loop.

E segments, S rows, N out, K in, R rank.
"""

import torch

from . import torch_ops
from .codes import Stack


def slices(ends_E: torch.Tensor) -> list[tuple[int, slice]]:
    """The segments that have rows, with their numbers."""
    ends = ends_E.tolist()
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]


def product(x_SK: torch.Tensor, w_ENK: torch.Tensor | Stack, ends_E: torch.Tensor) -> torch.Tensor:
    """Y = X W_e^T"""
    y_SN = x_SK.new_zeros(x_SK.shape[0], w_ENK.shape[1])
    for e, rows in slices(ends_E):
        torch.mm(x_SK[rows], w_ENK[e].T, out=y_SN[rows])
    return y_SN


def outer(one_SN: torch.Tensor, other_SK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """one^T other of each segment's rows [E, N, K]; zeros for a segment without rows"""
    found = one_SN.new_zeros(len(ends_E), one_SN.shape[1], other_SK.shape[1])
    for e, rows in slices(ends_E):
        torch.mm(one_SN[rows].T, other_SK[rows], out=found[e])
    return found


def forward(
    x_SK: torch.Tensor,
    w_ENK: torch.Tensor | Stack,
    a_ERK: torch.Tensor,
    b_ENR: torch.Tensor,
    ends_E: torch.Tensor,
    c: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y = X W_e^T + S B_e^T, S = c X A_e^T"""
    y_SN, s_SR = x_SK.new_zeros(x_SK.shape[0], w_ENK.shape[1]), x_SK.new_zeros(x_SK.shape[0], a_ERK.shape[1])
    for e, rows in slices(ends_E):
        s_SR[rows] = torch_ops.shrink(x_SK[rows], a_ERK[e], c, 0.0, 0)
        torch.mm(s_SR[rows], b_ENR[e].to(x_SK.dtype).T, out=y_SN[rows])
        y_SN[rows].addmm_(x_SK[rows], w_ENK[e].T)
    return y_SN, s_SR


def backward(
    dy_SN: torch.Tensor, x_SK: torch.Tensor, s_SR: torch.Tensor, w_ENK: torch.Tensor | Stack, a_ERK: torch.Tensor,
    b_ENR: torch.Tensor, ends_E: torch.Tensor, c: float, needed: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dX = dS A_e + dY W_e, dA_e = dS^T X, dB_e = dY^T S with dS = c dY B_e; empty where not needed, zeros where an expert
    has no rows."""
    need_x, need_a, need_b = needed
    dx = torch.zeros_like(x_SK) if need_x else x_SK.new_empty(0)
    da = torch.zeros_like(a_ERK) if need_a else x_SK.new_empty(0)
    db = torch.zeros_like(b_ENR) if need_b else x_SK.new_empty(0)
    for e, rows in slices(ends_E):
        dy, x = dy_SN[rows], x_SK[rows]
        if need_b:
            db[e] = torch_ops.grad_b(dy, s_SR[rows])
        if not (need_x or need_a):
            continue
        ds = torch_ops.grad_s(dy, b_ENR[e], c)
        if need_a:
            da[e] = torch_ops.grad_a(ds, x, 0.0, 0)
        if need_x:
            dx[rows] = torch_ops.grad_x(dy, ds, w_ENK[e], a_ERK[e], 0.0, 0)
    return dx, da, db
