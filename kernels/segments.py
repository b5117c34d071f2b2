"""Products by segments: rows sorted so that each segment has a weight and an adapter of its own, as the experts of a mixture.

    S = c X A_e^T      Y = X W_e^T + S B_e^T      dX = dY W_e + dS A_e      dB_e = dY^T S,  dS = c dY B_e      dA_e = dS^T X

for the rows of segment e, which ends before row ends[e] [E] (int32); the last one ends with the rows, and any may be empty.
The loops are those of gemm.py, shrink.py and grads.py.

Only the GPU knows where segments end: the host would have to wait for it. So a program finds its rows by itself. Segment e
takes the tiles of BM rows from ends[e - 1] // BM + e on, which no segment before it reaches, as cdiv(m, BM) <= m // BM + 1.
That needs no sum over the segments before, and M // BM + E tiles at most, of which those beyond a segment's end are empty.

M rows, K in, N out, R rank, C columns of T, E segments.
"""

import triton
import triton.language as tl

from .gemm import finish, frozen_product, tile_of
from .grads import grads_of_rows
from .shrink import shrink_tile


@triton.jit
def start_of(segment, ends):
    before = tl.load(ends + tl.maximum(segment - 1, 0))
    return tl.where(segment > 0, before, 0)


@triton.jit
def rows_of(tile, ends, E, EP: tl.constexpr, BM: tl.constexpr):
    """(segment, first row, end of the segment) of a tile of rows; one that has no rows starts at the end or beyond."""
    each = tl.arange(0, EP)
    ends_E = tl.load(ends + each, mask=each < E, other=0)
    before = (each < E) & (ends_E // BM + each < tile)  # segments whose last tile comes before this one
    segment = tl.sum(before.to(tl.int32), axis=0)
    start = start_of(segment, ends)
    first = start + (tile - start // BM - segment) * BM
    return segment.to(tl.int64), first, tl.load(ends + segment)


@triton.jit(do_not_specialize=["M"])
def segment_shrink(
    x, a, ends, s, M, E, K, k_chunk, scale, sxm, sxk, sae, sar, sak,
    RANK: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """s [parts, M, R], scaled; program (i, part) reads BM rows and k_chunk columns (a multiple of BK)."""
    dtype: tl.constexpr = x.dtype.element_ty
    segment, first, end = rows_of(tl.program_id(0), ends, E, EP, BM)
    if first >= end:
        return
    part = tl.program_id(1)
    rm = first.to(tl.int64) + tl.arange(0, BM)
    rank = tl.arange(0, RP).to(tl.int64)
    inside_M = rm < end
    acc = tl.zeros((BM, RP), tl.float32)
    for k0 in range(part * k_chunk, min(K, (part + 1) * k_chunk), BK):
        rk = k0 + tl.arange(0, BK).to(tl.int64)
        x_MK = tl.load(x + rm[:, None] * sxm + rk[None, :] * sxk, mask=inside_M[:, None] & (rk < K)[None, :], other=0.0)
        acc = shrink_tile(
            acc, x_MK, a + segment * sae, rank, rk, K, sar, sak, 0, rm, k0, 0, dtype, RANK, BM, BK, False, PRECISION
        )
    at = s + part.to(tl.int64) * M * RANK + rm[:, None] * RANK + rank[None, :]
    tl.store(at, (acc * scale).to(s.dtype.element_ty), mask=inside_M[:, None] & (rank < RANK)[None, :])


@triton.jit(do_not_specialize=["M"])
def segment_gemm(
    x, w, s, b, bias, ends, y, M, E, N, K, sxm, sxk, swe, swn, swk, ssm, sbe, sbn, sbr, sym,
    RANK: tl.constexpr, BR: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x w_e^T + s b_e^T + bias, the second term if LORA, the third if BIAS. Any strides; one tile of y a program."""
    dtype: tl.constexpr = x.dtype.element_ty
    tile_m, tile_n = tile_of(tl.program_id(0), (M // BM + E) * BM, N, BM, BN, GROUP)
    segment, first, end = rows_of(tile_m, ends, E, EP, BM)
    if first >= end:
        return
    rm = first.to(tl.int64) + tl.arange(0, BM)
    row_M = tl.where(rm < end, rm, 0)
    rn = tile_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = frozen_product(acc, x, w + segment * swe, row_M, rn, N, K, sxm, sxk, swn, swk, EVEN_K, PRECISION, BK)
    finish(
        acc, s, b + segment * sbe, bias, y, y, tile_n, rm, row_M, rn, end, N, ssm, sbn, sbr, sym, dtype,
        RANK, BR, LORA, BIAS, False, True, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["sds"])
def segment_grads(
    t, v, u, ends, g, ds, sds, C, scale, stm, stc, svm, sue, suc, sur, sgp, sge, sgc, sgr,
    RANK: tl.constexpr, RP: tl.constexpr, WITH_DS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """g [row parts, E, C, R] under strides (sgp, sge, sgc, sgr), zeros for an empty segment; ds [column parts, M, R]."""
    stripe, part, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, end = start_of(segment, ends), tl.load(ends + segment)
    chunk = tl.cdiv(tl.cdiv(end - start, BM), tl.num_programs(1)) * BM
    first = start + part.to(tl.int64) * chunk
    grads_of_rows(
        t, v, u + segment * sue, g + part.to(tl.int64) * sgp + segment * sge, ds, first, min(end, first + chunk), end, stripe,
        0, sds, C, scale, 0, stm, stc, svm, suc, sur, sgc, sgr, RANK, RP, WITH_DS, False, PRECISION, BM, BC,
    )  # fmt: skip
