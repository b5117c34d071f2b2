"""Launchers of products by segments, in two parts each, as those of triton_ops.py are. Nothing waits for the GPU.

A forward pass is two launches, S and Y, and a third where S is summed from parts; a backward pass is three, dB with dS, dA and
dX, and one or two more where sums are split. Plain torch multiplies three times for each segment, or five, and waits for `ends`.

M rows, K in, N out, R rank, E segments.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from . import dispatch
from .grids import STAGES, grads_grid, shrink_grid
from .launch import Planned, gradients, low_rank_facts, padded_rank, plan, precision, rank_chunk, summing
from .segments import segment_gemm, segment_grads, segment_shrink
from .triton_ops import copyable


def forward(
    x_MK: torch.Tensor, w_ENK: torch.Tensor, a_ERK: torch.Tensor, b_ENR: torch.Tensor, ends_E: torch.Tensor, c: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y = X W_e^T + S B_e^T, S = c X A_e^T"""
    s_MR = shrink(x_MK, a_ERK, ends_E, c)
    return product(x_MK, w_ENK, ends_E, s_MR, b_ENR), s_MR


def backward(
    dy_MN: torch.Tensor, x_MK: torch.Tensor, s_MR: torch.Tensor, w_ENK: torch.Tensor, a_ERK: torch.Tensor,
    b_ENR: torch.Tensor, ends_E: torch.Tensor, c: float, needed: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dX = dS A_e + dY W_e, dA_e = dS^T X, dB_e = dY^T S with dS = c dY B_e; empty where not needed, zeros for a segment without
    rows."""
    ds, da, db = low_rank_grads(dy_MN, x_MK, s_MR, b_ENR, ends_E, c, needed, (a_ERK.dtype, b_ENR.dtype))
    empty = x_MK.new_empty(0)
    dx = empty
    if needed[0] and ds is not None:
        dx = product(dy_MN, w_ENK.transpose(1, 2), ends_E, ds, a_ERK.transpose(1, 2))
    return dx, empty if da is None else da, empty if db is None else db


def low_rank_grads(
    dy_MN: torch.Tensor, x_MK: torch.Tensor, s_MR: torch.Tensor, b_ENR: torch.Tensor | None, ends_E: torch.Tensor, c: float,
    needed: tuple[bool, bool, bool], dtypes: Sequence[torch.dtype],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """dS = c dY B_e [M, R] where dX or dA_e is `needed`, dA_e = dS^T X [E, R, K] and dB_e = dY^T S [E, N, R] in their `dtypes`, else
    None. B may be None where dB_e alone is needed."""
    need_x, need_a, need_b = needed
    need_s = (need_x or need_a) and b_ENR is not None
    ds, da, db = None, None, None
    if need_b:
        together = need_s and s_MR.shape[1] <= dispatch.MOST_DS_RANK
        db, ds = grads(dy_MN, s_MR, ends_E, dtypes[1], b_ENR if together else None, c)
    if need_s and ds is None and b_ENR is not None:
        ds = shrink(dy_MN, b_ENR.transpose(1, 2), ends_E, c)
    if need_a and ds is not None:
        da = grads(x_MK, ds, ends_E, dtypes[0], transposed=True)[0]
    return ds, da, db


def shrink(x_MK: torch.Tensor, a_ERK: torch.Tensor, ends_E: torch.Tensor, c: float) -> torch.Tensor:
    """S = c X A_e^T [M, R] in X's dtype"""
    run = plan(
        _shrink, x_MK.device, x_MK.dtype, x_MK.shape, x_MK.stride(), a_ERK.dtype, a_ERK.shape, a_ERK.stride(), c,
        precision(x_MK),
    )  # fmt: skip
    return run(x_MK, a_ERK, ends_E)


def _shrink(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], a_dtype: torch.dtype,
    a_shape: torch.Size, a_strides: tuple[int, ...], c: float, exact: str,
) -> Callable[..., torch.Tensor]:  # fmt: skip
    (m, k), (count, rank, _) = shape, a_shape
    if not m:
        return lambda x, a, ends: x.new_empty(m, rank)
    padded = padded_rank(rank)
    bm, bk, _, splits, chunk, warps = shrink_grid(dispatch.target_of(device), dtype, m, k, padded, False)
    launch = Planned(
        segment_shrink, (m // bm + count, splits), (count, k, chunk, c if splits == 1 else 1.0, *strides, *a_strides),
        {"RANK": rank, "RP": padded, "PRECISION": exact, "EP": triton.next_power_of_2(count), "BM": bm, "BK": bk},
        device, num_warps=warps, num_stages=STAGES if padded <= 128 else 2,
    )  # fmt: skip
    gather = summing(device, splits, (m, rank), dtype, c)

    def run(x: torch.Tensor, a: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        s = x.new_empty(splits, m, rank, dtype=dtype if splits == 1 else torch.float32)
        launch((x, a, ends, s), (m,))
        return s[0] if splits == 1 else gather(s)

    return run


def product(
    x_MK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor, s_MR: torch.Tensor | None = None,
    b_ENR: torch.Tensor | None = None, bias_N: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Y = X W_e^T + S B_e^T + bias [M, N]; the bias is that of every segment"""
    b_ENR, low = low_rank_facts(s_MR, b_ENR)
    run = plan(
        _product, x_MK.device, x_MK.dtype, x_MK.shape, x_MK.stride(), w_ENK.shape, w_ENK.stride(), low,
        bias_N is not None, copyable(x_MK, w_ENK), precision(x_MK),
    )  # fmt: skip
    return run(x_MK, w_ENK, ends_E, s_MR, b_ENR, bias_N)


def _product(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, x_strides: tuple[int, ...], w_shape: torch.Size,
    w_strides: tuple[int, ...], low: tuple[Any, ...], biased: bool, aligned: bool, exact: str,
) -> Callable[..., torch.Tensor]:  # fmt: skip
    (m, k), (count, n, _), (rank, s_strides, b_strides, b_dtype) = shape, w_shape, low
    if not m or not n:
        return lambda x, *_: x.new_empty(m, n)
    target = dispatch.target_of(device)
    tiles = dispatch.segment_tiles(target, dtype, m // count) if aligned else dispatch.unaligned(target)
    launch = Planned(
        segment_gemm, ((m // tiles.bm + count) * triton.cdiv(n, tiles.bn),),
        (count, n, k, *x_strides, *w_strides, *(s_strides or (0,)), *(b_strides or (0, 0, 0)), n),
        {"RANK": rank, "BR": rank_chunk(rank), "LORA": b_dtype is not None, "BIAS": biased, "EVEN_K": k % tiles.bk == 0, "PRECISION": exact,
         "EP": triton.next_power_of_2(count), "BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk, "GROUP": tiles.group},
        device, num_warps=8 if exact == "tf32" else tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip

    def run(
        x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, s: torch.Tensor | None, b: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        y, own = x.new_empty(m, n), x if bias is None else bias.contiguous()
        launch((x, w, x if s is None else s, x if b is None else b, own, ends, y), (m,))
        return y

    return run


def grads(
    t_MC: torch.Tensor, v_MR: torch.Tensor, ends_E: torch.Tensor, dtype: torch.dtype, u_ECR: torch.Tensor | None = None,
    c: float = 1.0, transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """T^T V of each segment's rows as [E, C, R] ([E, R, C] if `transposed`), and c T U_e [M, R] if U is given."""
    run = plan(
        _grads, t_MC.device, t_MC.dtype, t_MC.shape, t_MC.stride(), v_MR.shape[1], v_MR.stride(0), v_MR.dtype, dtype,
        len(ends_E), None if u_ECR is None else (u_ECR.dtype, u_ECR.stride()), c, transposed, precision(t_MC),
    )  # fmt: skip
    return run(t_MC, v_MR, u_ECR, (ends_E,), ())


def _grads(
    device: torch.device, t_dtype: torch.dtype, t_shape: torch.Size, t_strides: tuple[int, ...], rank: int, row: int,
    v_dtype: torch.dtype, dtype: torch.dtype, count: int, u: tuple[Any, ...] | None, c: float, transposed: bool, exact: str,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:  # fmt: skip
    m, columns = t_shape
    shape = (count, rank, columns) if transposed else (count, columns, rank)
    if not m or not columns:
        return lambda t, v, *_: (v.new_zeros(shape, dtype=dtype), None if u is None else v.new_zeros(m, rank))
    bm, bc, warps, parts, stripes = grads_grid(
        dispatch.target_of(device), t_dtype, m, columns, rank, u is not None, segments=count
    )
    order = (count * columns * rank, columns * rank, *((1, columns) if transposed else (rank, 1)))
    launch = Planned(
        segment_grads, (stripes, parts, count),
        (columns, c if stripes == 1 else 1.0, *t_strides, row, *(u[1] if u else (0, 0, 0)), *order),
        {"RANK": rank, "RP": padded_rank(rank), "WITH_DS": u is not None, "PRECISION": exact, "BM": bm, "BC": bc},
        device, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    return gradients(launch, device, parts, shape, dtype, stripes, (m, rank), v_dtype, c, u is not None)
