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
def grads_of_rows(
    t, v, u, g, ds, first, last, M, stripe, seed, sds, C, scale, threshold, stm, stc, svm, suc, sur, sgc, sgr,
    RANK: tl.constexpr, RP: tl.constexpr, WITH_DS: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """g [C, R] of the rows from `first` to `last`, of which those before M count, and of one stripe of columns; ds [column parts, M, R]
    of the same. `last` is M, or whole tiles after `first`."""
    dtype: tl.constexpr = t.dtype.element_ty
    rc = stripe.to(tl.int64) * BC + tl.arange(0, BC)
    rank = tl.arange(0, RP).to(tl.int64)
    # dS and dB share a tile as left operands, which holds registers down on sm_80; a masked tile comes from registers,
    # and as left operand it would serialise wgmma
    acc = tl.zeros((BC, RP) if WITH_DS else (RP, BC), tl.float32)
    if WITH_DS:
        inside_U = (rc < C)[:, None] & (rank < RANK)[None, :]
        u_CR = tl.load(u + rc[:, None] * suc + rank[None, :] * sur, mask=inside_U, other=0.0).to(dtype)
    for m0 in range(first, last, BM):
        rm = m0 + tl.arange(0, BM).to(tl.int64)
        inside_T = (rm < M)[:, None] & (rc < C)[None, :]
        t_MC = tl.load(t + rm[:, None] * stm + rc[None, :] * stc, mask=inside_T, other=0.0)
        if DROP:
            t_MC = tl.where(keep_tile(seed, rm, stripe * BC, threshold, BM, BC), t_MC, 0.0).to(dtype)
        mask_MR = (rm < M)[:, None] & (rank < RANK)[None, :]
        v_MR = tl.load(v + rm[:, None] * svm + rank[None, :], mask=mask_MR, other=0.0)
        if WITH_DS:
            acc = tl.dot(tl.trans(t_MC), v_MR, acc, input_precision=PRECISION)
            ds_MR = tl.dot(t_MC, u_CR, input_precision=PRECISION)
            ds_at = ds + stripe.to(tl.int64) * sds + rm[:, None] * RANK + rank[None, :]
            tl.store(ds_at, (ds_MR * scale).to(ds.dtype.element_ty), mask=mask_MR)
        else:
            acc = tl.dot(tl.trans(v_MR), t_MC, acc, input_precision=PRECISION)
    if WITH_DS:
        acc = tl.trans(acc)
    at = g + rank[:, None] * sgr + rc[None, :] * sgc
    tl.store(at, acc.to(g.dtype.element_ty), mask=(rank < RANK)[:, None] & (rc < C)[None, :])


@triton.jit(do_not_specialize=["M", "row_chunk", "seed", "sds", "threshold"])
def lora_grads(
    t, v, u, g, ds, M, row_chunk, seed, sds, C, scale, threshold, stm, stc, svm, suc, sur, sgp, sgc, sgr,
    RANK: tl.constexpr, RP: tl.constexpr, WITH_DS: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """g [row parts, C, R] under strides (sgp, sgc, sgr); ds [column parts, M, R] (stride sds of a part)."""
    stripe, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = part * row_chunk
    grads_of_rows(
        t, v, u, g + part * sgp, ds, first, min(M, first + row_chunk), M, stripe, seed, sds, C, scale, threshold, stm, stc,
        svm, suc, sur, sgc, sgr, RANK, RP, WITH_DS, DROP, PRECISION, BM, BC,
    )  # fmt: skip
