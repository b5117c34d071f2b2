"""Frozen weights of one byte an element, with a scale for each block of rows and columns: w[n, k] = q[n, k] scale[n // BN, k // BK].

q is int8 (LLM.int8: blocks of one row and all columns) or float8 e4m3 (FineGrainedFP8: 128 x 128), both read as int8.
e4m3 is decoded by integer arithmetic on every target, since sm_80, sm_86 and gfx90a have no conversion from it. On sm_90
that takes 14 instructions an element, and 10 with the conversion; int8 takes 10. Memory leaves time for 26.

N out, K in.
"""

import triton
import triton.language as tl


@triton.jit
def _number(q, E4M3: tl.constexpr):
    """The float32 that a byte stands for, exactly."""
    if E4M3:
        # sign, 4 bits of exponent and 3 of mantissa move to their places in float32; a factor of 2^120 makes up for the
        # other bias, and makes of a subnormal float32 what the subnormal e4m3 is
        bits = (q.to(tl.uint32) << 20) & 0x87F00000
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where(tl.abs(value) == 480.0, float("nan"), value)  # 0x7f and 0xff, which e4m3 keeps for NaN
    else:
        return q.to(tl.float32)


@triton.jit(do_not_specialize=["N", "columns", "rows_of", "columns_of"])
def decode_scaled(
    q, scale, w, N, columns, rows_of, columns_of, K,
    E4M3: tl.constexpr, GRAIN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
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
    value = _number(tl.load(q + at, mask=inside, other=0), E4M3)
    first = k0 + tl.arange(0, BK // GRAIN) * GRAIN
    of = (rn // rows_of).to(tl.int64)[:, None] * columns + (first // columns_of)[None, :]
    scale_NG = tl.load(scale + of, mask=(rn < N)[:, None] & (first < K)[None, :], other=0.0)
    scale_NK = tl.reshape(tl.broadcast_to(scale_NG[:, :, None], (BN, BK // GRAIN, GRAIN)), (BN, BK))
    tl.store(w + at, (value * scale_NK).to(dtype), mask=inside)
