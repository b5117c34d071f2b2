"""S = c drop(X) A^T for up to three adapters that share X (q|k|v, gate|up), in one read of X.

K is split over several programs, as many as the GPU needs to be busy. `reduce.sum_partials` adds up their parts in a fixed
order, and applies c = scaling / (1 - p) in float32 before S is rounded once.

M tokens, K in, R rank, G adapters.
"""

import triton
import triton.language as tl

from .mask import keep_tile


@triton.jit
def shrink_tile(acc, x_MK, a, rank, rk, K, sar, sak, seed, rm, k0, threshold, dtype: tl.constexpr,
         RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    mask = (rank[None, :] < RANK) & (rk[:, None] < K)
    a_KR = tl.load(a + rank[None, :] * sar + rk[:, None] * sak, mask=mask, other=0.0).to(dtype)
    if DROP:
        x_MK = tl.where(keep_tile(seed, rm, k0, threshold, BM, BK), x_MK, 0.0).to(dtype)
    return tl.dot(x_MK, a_KR, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M", "seed0", "seed1", "seed2", "threshold"])
def lora_shrink(
    x, a0, a1, a2, s, M, seed0, seed1, seed2, K, k_chunk, threshold, sxm, sxk, sar, sak,
    RANK: tl.constexpr, RP: tl.constexpr, ADAPTERS: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """s [parts, G, M, R] in float32; program (i, part) reads BM rows and k_chunk columns (a multiple of BK)."""
    dtype: tl.constexpr = x.dtype.element_ty
    part = tl.program_id(1)
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rank = tl.arange(0, RP).to(tl.int64)
    acc0 = tl.zeros((BM, RP), tl.float32)
    acc1 = tl.zeros((BM, RP), tl.float32)
    acc2 = tl.zeros((BM, RP), tl.float32)
    inside_M = rm < M
    for k0 in range(part * k_chunk, min(K, (part + 1) * k_chunk), BK):
        rk = k0 + tl.arange(0, BK).to(tl.int64)
        x_MK = tl.load(x + rm[:, None] * sxm + rk[None, :] * sxk, mask=inside_M[:, None] & (rk < K)[None, :], other=0.0)
        acc0 = shrink_tile(
            acc0, x_MK, a0, rank, rk, K, sar, sak, seed0, rm, k0, threshold, dtype, RANK, BM, BK, DROP, PRECISION
        )
        if ADAPTERS > 1:
            acc1 = shrink_tile(
                acc1, x_MK, a1, rank, rk, K, sar, sak, seed1, rm, k0, threshold, dtype, RANK, BM, BK, DROP, PRECISION
            )
        if ADAPTERS > 2:
            acc2 = shrink_tile(
                acc2, x_MK, a2, rank, rk, K, sar, sak, seed2, rm, k0, threshold, dtype, RANK, BM, BK, DROP, PRECISION
            )
    base = s + part.to(tl.int64) * ADAPTERS * M * RANK + rm[:, None] * RANK + rank[None, :]
    mask = inside_M[:, None] & (rank < RANK)[None, :]
    group = tl.full((), RANK, tl.int64) * M
    tl.store(base, acc0, mask=mask)
    if ADAPTERS > 1:
        tl.store(base + group, acc1, mask=mask)
    if ADAPTERS > 2:
        tl.store(base + 2 * group, acc2, mask=mask)
