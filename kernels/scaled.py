"""Frozen weights of one byte an element, with a scale for each block of rows and columns: w[n, k] = q[n, k] scale[n // BN, k // BK].

q is int8 (LLM.int8: blocks of one row and all columns) or float8 e4m3 (FineGrainedFP8: 128 x 128), both as bytes. e4m3 is
decoded by integer arithmetic on every target: some have no conversion from it, and where there is one it saves a few of
the instructions that wait for memory anyway.

N out, K in.
"""

import triton
import triton.language as tl


@triton.jit
def _number(q):
    """The float32 that a byte stands for, exactly: int8, or e4m3 if it comes as uint8."""
    if q.dtype == tl.int8:
        return q.to(tl.float32)
    else:
        # sign, 4 bits of exponent and 3 of mantissa move to their places in float32; a factor of 2^120 makes up for the
        # other bias, and turns a float32 that is subnormal into the number that a subnormal e4m3 is
        bits = q.to(tl.uint32)
        shifted = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        value = shifted.to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit(do_not_specialize=["N", "columns", "rows_of", "columns_of"])
def decode_scaled(
    q, scale, w, N, columns, rows_of, columns_of, K, GRAIN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """w [N, K] in w's dtype; `columns` scales in a row of them, each of rows_of x columns_of elements.

    GRAIN neighbours, from a multiple of GRAIN on, share a scale.
    """
    dtype: tl.constexpr = w.dtype.element_ty
    tile, tiles = tl.program_id(0), tl.cdiv(K, BK)
    rn = tile // tiles * BN + tl.arange(0, BN)
    k0 = tile % tiles * BK
    # as many to a thread as make a store of 16 bytes: loads and stores then share one layout, and nothing is shuffled
    rk = k0 + tl.max_contiguous(tl.arange(0, BK), 128 // dtype.primitive_bitwidth)
    inside = (rn < N)[:, None] & (rk < K)[None, :]
    at = rn.to(tl.int64)[:, None] * K + rk[None, :]
    value = _number(tl.load(q + at, mask=inside, other=0))
    first = k0 + tl.arange(0, BK // GRAIN) * GRAIN
    of = (rn // rows_of).to(tl.int64)[:, None] * columns + (first // columns_of)[None, :]
    scale_NG = tl.load(scale + of, mask=(rn < N)[:, None] & (first < K)[None, :], other=0.0)
    scale_NK = tl.reshape(tl.broadcast_to(scale_NG[:, :, None], (BN, BK // GRAIN, GRAIN)), (BN, BK))
    tl.store(w + at, (value * scale_NK).to(dtype), mask=inside)
