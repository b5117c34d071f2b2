"""The frozen matrix product with the low-rank term in its epilogue: one kernel for the forward pass and for dX.

    Y = X W^T + S B^T + bias          norms[m] = sum_n (X W^T)[m, n]^2, taken before the low-rank term
    dX = dY W + mask (dS A)           the same product under other strides: W, A and B are read as they lie

The scaling s / (1 - p) is folded into S and dS where they are made, in float32 and with one rounding. So this kernel
needs a single accumulator and no scale: a second accumulator for the low-rank term would spill on Hopper (768 bytes and
more a thread, and ptxas serialises wgmma). With a mask the low-rank term comes first, for the same reason.

M rows, K reduced, N columns, R rank. Strides are in elements. The compiler specialises a stride of 1, so both
orientations of W get 16-byte copies.
"""

import triton
import triton.language as tl

from .mask import keep_tile


@triton.jit
def tile_of(index, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tile (row, column) of the index-th program: GROUP rows of tiles at a time, so that W's tiles stay in L2."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = index // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    inside = index % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def add_low_rank(
    acc, s, b, row_M, rn, N, ssm, sbn, sbr, dtype: tl.constexpr,
    RANK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + S B^T for rows clamped to the matrix, in chunks of BR ranks: any rank from 1 on."""
    inside_N = rn < N
    for r0 in tl.range(0, RANK, BR, num_stages=1):  # not unrolled: at rank 256 that would spill
        rank = r0 + tl.arange(0, BR)
        if RANK % BR == 0:
            s_MR = tl.load(s + row_M[:, None] * ssm + rank[None, :])
            b_RN = tl.load(b + rn[None, :] * sbn + rank[:, None] * sbr, mask=inside_N[None, :], other=0.0)
        else:
            s_MR = tl.load(s + row_M[:, None] * ssm + rank[None, :], mask=rank[None, :] < RANK, other=0.0)
            inside = inside_N[None, :] & (rank < RANK)[:, None]
            b_RN = tl.load(b + rn[None, :] * sbn + rank[:, None] * sbr, mask=inside, other=0.0)
        acc = tl.dot(s_MR, b_RN.to(dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def masked_low_rank(
    s, b, row_M, rm, rn, tile_n, seed, N, threshold, ssm, sbn, sbr, dtype: tl.constexpr,
    RANK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """mask (S B^T) of one tile [BM, BN], in float32."""
    acc = tl.zeros((BM, BN), tl.float32)
    acc = add_low_rank(acc, s, b, row_M, rn, N, ssm, sbn, sbr, dtype, RANK, BR, PRECISION)
    return tl.where(keep_tile(seed, rm, tile_n * BN, threshold, BM, BN), acc, 0.0)


@triton.jit
def finish(
    acc, s, b, bias, y, norms, tile_n, rm, row_M, rn, M, N, ssm, sbn, sbr, sym, dtype: tl.constexpr,
    RANK: tl.constexpr, BR: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr, NORMS: tl.constexpr,
    STORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What follows the frozen product: the tile's part of the norms, the low-rank term, the bias, the store."""
    if NORMS:  # before the low-rank term is added: NFN concerns W alone. Columns beyond N hold zeros
        tl.store(norms + tile_n.to(tl.int64) * M + rm, tl.sum(acc * acc, axis=1), mask=rm < M)
    if LORA:
        acc = add_low_rank(acc, s, b, row_M, rn, N, ssm, sbn, sbr, dtype, RANK, BR, PRECISION)
    if BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    if STORE:
        mask = (rm < M)[:, None] & (rn < N)[None, :]
        tl.store(y + rm[:, None] * sym + rn[None, :], acc.to(dtype), mask=mask)


@triton.jit
def frozen_product(
    acc, x, w, row_M, rn, N, K, sxm, sxk, swn, swk, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc + X W^T for rows clamped to the matrix."""
    rk = tl.arange(0, BK)
    inside_N = (rn < N)[None, :]
    x_MK = x + row_M[:, None] * sxm + rk[None, :] * sxk
    w_KN = w + rn[None, :].to(tl.int64) * swn + rk[:, None].to(tl.int64) * swk
    step = tl.full((), BK, tl.int64)
    for k in range(0, tl.cdiv(K, BK)):
        if EVEN_K:
            x_tile = tl.load(x_MK)
            w_tile = tl.load(w_KN, mask=inside_N, other=0.0)
        else:
            x_tile = tl.load(x_MK, mask=rk[None, :] < K - k * BK, other=0.0)
            w_tile = tl.load(w_KN, mask=inside_N & (rk[:, None] < K - k * BK), other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        x_MK += step * sxk
        w_KN += step * swk
    return acc


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def lora_gemm(
    x, w, s, b, bias, y, norms, M, seed, N, K, threshold, sxm, sxk, swn, swk, ssm, sbn, sbr, sym,
    RANK: tl.constexpr, BR: tl.constexpr, LORA: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    NORMS: tl.constexpr, STORE: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Pointer version: any strides, any N and K, sm_80 and later, AMD. norms [tiles of N, M] are partial sums."""
    dtype: tl.constexpr = x.dtype.element_ty
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    rm = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    row_M = tl.where(rm < M, rm, 0)  # rows beyond the edge read row 0: no mask for them in the loop
    rn = tile_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if MASK:
        acc = masked_low_rank(
            s, b, row_M, rm, rn, tile_n, seed, N, threshold, ssm, sbn, sbr, dtype, RANK, BR, PRECISION, BM, BN
        )
    acc = frozen_product(acc, x, w, row_M, rn, N, K, sxm, sxk, swn, swk, EVEN_K, PRECISION, BK)
    finish(
        acc, s, b, bias, y, norms, tile_n, rm, row_M, rn, M, N, ssm, sbn, sbr, sym, dtype,
        RANK, BR, LORA and not MASK, BIAS, NORMS, STORE, PRECISION,
    )  # fmt: skip
