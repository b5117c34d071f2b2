"""L = S B^T + bias, and its masked form mask (dS A): the low-rank term by itself, for the LoRA-first strategy.

The vendor's GEMM then adds the frozen product to L in place (beta = 1). That moves as many bytes of Y as adding the
low-rank product afterwards, but the read of L hides inside a product that arithmetic bounds.

Of up to three linears that read one X, `lora_expands` writes every L in one launch, and `lora_expand_sum` writes the sum
of the terms of their dX, each with a mask of its own.

M rows, N columns, R rank.
"""

import triton
import triton.language as tl

from .gemm import add_low_rank, masked_low_rank


@triton.jit
def _tile(s, b, bias, y, tile_n, M, seed, N, threshold, ssm, sbn, sbr, sym,
          RANK: tl.constexpr, BR: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
          BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Tile (program_id(0), tile_n) of L."""
    dtype: tl.constexpr = y.dtype.element_ty
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_M = tl.where(rm < M, rm, 0)
    rn = tile_n * BN + tl.arange(0, BN)
    if MASK:
        acc = masked_low_rank(
            s, b, row_M, rm, rn, tile_n, seed, N, threshold, ssm, sbn, sbr, dtype, RANK, BR, PRECISION, BM, BN
        )
    else:
        acc = tl.zeros((BM, BN), tl.float32)
        acc = add_low_rank(acc, s, b, row_M, rn, N, ssm, sbn, sbr, dtype, RANK, BR, PRECISION)
    if BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(y + rm[:, None] * sym + rn[None, :], acc.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def lora_expand(
    s, b, bias, y, M, seed, N, threshold, ssm, sbn, sbr, sym,
    RANK: tl.constexpr, BR: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile_n = tl.program_id(1)
    _tile(s, b, bias, y, tile_n, M, seed, N, threshold, ssm, sbn, sbr, sym, RANK, BR, MASK, BIAS, PRECISION, BM, BN)


@triton.jit(do_not_specialize=["M"])
def lora_expands(
    s0, s1, s2, b0, b1, b2, bias0, bias1, bias2, y0, y1, y2, M, N0, N1, N2, ssm, sbn, sbr,
    RANK: tl.constexpr, BR: tl.constexpr, COUNT: tl.constexpr, BIAS0: tl.constexpr, BIAS1: tl.constexpr,
    BIAS2: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y_i = s_i b_i^T + bias_i [M, N_i], dense; the columns' tiles of one linear follow those of the other."""
    tile, tiles0, tiles1 = tl.program_id(1), tl.cdiv(N0, BN), tl.cdiv(N1, BN)
    if tile < tiles0:
        _tile(s0, b0, bias0, y0, tile, M, 0, N0, 0, ssm, sbn, sbr, N0, RANK, BR, False, BIAS0, PRECISION, BM, BN)
    elif tile < tiles0 + tiles1:
        tile -= tiles0
        _tile(s1, b1, bias1, y1, tile, M, 0, N1, 0, ssm, sbn, sbr, N1, RANK, BR, False, BIAS1, PRECISION, BM, BN)
    else:
        if COUNT > 2:
            tile -= tiles0 + tiles1
            _tile(s2, b2, bias2, y2, tile, M, 0, N2, 0, ssm, sbn, sbr, N2, RANK, BR, False, BIAS2, PRECISION, BM, BN)


@triton.jit
def _term(acc, s, b, row_M, rm, rn, tile_n, seed, N, threshold, ssm, sbn, sbr, dtype: tl.constexpr,
          RANK: tl.constexpr, BR: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
          BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    if MASK:
        return acc + masked_low_rank(
            s, b, row_M, rm, rn, tile_n, seed, N, threshold, ssm, sbn, sbr, dtype, RANK, BR, PRECISION, BM, BN
        )
    return add_low_rank(acc, s, b, row_M, rn, N, ssm, sbn, sbr, dtype, RANK, BR, PRECISION)


@triton.jit(do_not_specialize=["M", "seed0", "seed1", "seed2", "threshold"])
def lora_expand_sum(
    s0, s1, s2, b0, b1, b2, y, M, seed0, seed1, seed2, N, threshold, ssm, sbn, sbr,
    RANK: tl.constexpr, BR: tl.constexpr, COUNT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y = sum over i of mask_i (s_i b_i^T) [M, N], dense, with one rounding."""
    dtype: tl.constexpr = y.dtype.element_ty
    tile_n = tl.program_id(1)
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_M = tl.where(rm < M, rm, 0)
    rn = tile_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = _term(
        acc, s0, b0, row_M, rm, rn, tile_n, seed0, N, threshold, ssm, sbn, sbr, dtype, RANK, BR, MASK, PRECISION, BM, BN
    )
    acc = _term(
        acc, s1, b1, row_M, rm, rn, tile_n, seed1, N, threshold, ssm, sbn, sbr, dtype, RANK, BR, MASK, PRECISION, BM, BN
    )
    if COUNT > 2:
        acc = _term(
            acc, s2, b2, row_M, rm, rn, tile_n, seed2, N, threshold, ssm, sbn, sbr, dtype, RANK, BR, MASK, PRECISION, BM, BN
        )  # fmt: skip
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(y + rm[:, None] * N + rn[None, :], acc.to(dtype), mask=mask)
