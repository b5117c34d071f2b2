"""L = S B^T + bias, and its masked form mask (dS A): the low-rank term by itself, for the LoRA-first strategy.

The vendor's GEMM then adds the frozen product to L in place (beta = 1). That moves as many bytes of Y as adding the
low-rank product afterwards, but the read of L hides inside a product that arithmetic bounds.

M rows, N columns, R rank.
"""

import triton
import triton.language as tl

from .gemm import add_low_rank
from .mask import keep_tile


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def lora_expand(
    s, b, bias, y, M, N, seed, threshold, ssm, sbn, sbr, sym,
    RANK: tl.constexpr, BR: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y.dtype.element_ty
    tile_n = tl.program_id(1)
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_M = tl.where(rm < M, rm, 0)
    rn = tile_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = add_low_rank(acc, s, b, row_M, rn, N, ssm, sbn, sbr, dtype, RANK, BR, PRECISION)
    if MASK:
        acc = tl.where(keep_tile(seed, rm, tile_n * BN, threshold, BM, BN), acc, 0.0)
    if BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(y + rm[:, None] * sym + rn[None, :], acc.to(dtype), mask=mask)
