"""The adapters' gradients from one read of each large operand:

    dB = dY^T S  and  dS = c dY B  from dY;      dA = dS^T drop(X)  from X

Both are "tile^T times a rank-sized activation", so one kernel does both: T is dY or X, V is S or dS, and U is B (only
for dY). A program owns a block of rows by a stripe of columns. Sums over rows (dB, dA) and over columns (dS) are
written as float32 parts, which `reduce.sum_partials` adds up in a fixed order: no atomics, and the same bits every
time. The parts cost 8 R (parts_of_columns M + parts_of_rows N) bytes beside the 2 M N of T.

M tokens, C columns of T, R rank.
"""

import triton
import triton.language as tl

from .mask import keep_tile


@triton.jit
def _tile(t, rm, rc, M, C, stm, stc):
    inside = (rm < M)[:, None] & (rc < C)[None, :]
    return tl.load(t + rm[:, None] * stm + rc[None, :] * stc, mask=inside, other=0.0)


@triton.jit
def _columns_of_u(u, rc, rank, C, suc, sur, dtype: tl.constexpr, RANK: tl.constexpr):
    inside = (rc < C)[:, None] & (rank < RANK)[None, :]
    return tl.load(u + rc[:, None] * suc + rank[None, :] * sur, mask=inside, other=0.0).to(dtype)


@triton.jit
def _store_sum(g, acc_RC, part, rc, rank, C, sgp, sgc, sgr, RANK: tl.constexpr):
    at = g + part.to(tl.int64) * sgp + rank[:, None] * sgr + rc[None, :] * sgc
    tl.store(at, acc_RC.to(g.dtype.element_ty), mask=(rank < RANK)[:, None] & (rc < C)[None, :])


@triton.jit(do_not_specialize=["M", "row_chunk", "seed", "threshold"])
def lora_grads(
    t, v, u, g, ds, M, C, row_chunk, scale, seed, threshold, stm, stc, svm, suc, sur, sgp, sgc, sgr, sds,
    RANK: tl.constexpr, RP: tl.constexpr, WITH_DS: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """g [row parts, C, R] under strides (sgp, sgc, sgr); ds [column parts, M, R] (stride sds of a part).

    With dS a stripe may be TILES = 2 tiles of BC columns wide: half as many parts of dS for the same registers a tile.
    """
    dtype: tl.constexpr = t.dtype.element_ty
    stripe, part = tl.program_id(0), tl.program_id(1)
    rc = stripe.to(tl.int64) * (BC * TILES) + tl.arange(0, BC)
    rank = tl.arange(0, RP).to(tl.int64)
    # dS and dB share a tile as left operands, which holds registers down on sm_80; a masked tile comes from registers,
    # and as left operand it would serialise wgmma
    acc = tl.zeros((BC, RP) if WITH_DS else (RP, BC), tl.float32)
    if WITH_DS:
        u_CR = _columns_of_u(u, rc, rank, C, suc, sur, dtype, RANK)
    if TILES == 2:
        acc_right = tl.zeros((BC, RP), tl.float32)
        u_right_CR = _columns_of_u(u, rc + BC, rank, C, suc, sur, dtype, RANK)
    first = part.to(tl.int64) * row_chunk
    for m0 in range(first, min(M, first + row_chunk), BM):
        rm = m0 + tl.arange(0, BM).to(tl.int64)
        t_MC = _tile(t, rm, rc, M, C, stm, stc)
        if DROP:
            t_MC = tl.where(keep_tile(seed, rm, stripe * BC, threshold, BM, BC), t_MC, 0.0).to(dtype)
        mask_MR = (rm < M)[:, None] & (rank < RANK)[None, :]
        v_MR = tl.load(v + rm[:, None] * svm + rank[None, :], mask=mask_MR, other=0.0)
        if WITH_DS:
            acc = tl.dot(tl.trans(t_MC), v_MR, acc, input_precision=PRECISION)
            ds_MR = tl.dot(t_MC, u_CR, input_precision=PRECISION)
            if TILES == 2:
                t_right_MC = _tile(t, rm, rc + BC, M, C, stm, stc)
                acc_right = tl.dot(tl.trans(t_right_MC), v_MR, acc_right, input_precision=PRECISION)
                ds_MR = tl.dot(t_right_MC, u_right_CR, ds_MR, input_precision=PRECISION)
            ds_at = ds + stripe.to(tl.int64) * sds + rm[:, None] * RANK + rank[None, :]
            tl.store(ds_at, (ds_MR * scale).to(ds.dtype.element_ty), mask=mask_MR)
        else:
            acc = tl.dot(tl.trans(v_MR), t_MC, acc, input_precision=PRECISION)
    if WITH_DS:
        acc = tl.trans(acc)
    _store_sum(g, acc, part, rc, rank, C, sgp, sgc, sgr, RANK)
    if TILES == 2:
        _store_sum(g, tl.trans(acc_right), part, rc + BC, rank, C, sgp, sgc, sgr, RANK)
