"""The dropout mask as a Triton device function. philox.py is the same in plain torch, and says how the mask is made."""

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, rows_M, column0, threshold, BM: tl.constexpr, BC: tl.constexpr):
    """bool [BM, BC]: the rows `rows_M` (int64) and columns from `column0` (a multiple of 8) of philox.keep_mask.

    `seed` is a number, or a pointer to one that a CUDA graph draws anew at each replay.
    """
    if isinstance(seed, tl.tensor):  # noqa: SIM102  # the interpreter's numbers have no dtype
        if seed.dtype.is_ptr():
            seed = tl.load(seed)
    group = (column0 // 8 + tl.arange(0, BC // 8)).to(tl.uint32)[None, :]
    low = (rows_M & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (rows_M >> 32).to(tl.uint32)[:, None]
    zero = tl.zeros((BM, BC // 8), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + group, zero + low, zero + high, zero, 7)
    # a join adds an innermost axis of 2: the word's high bit, its low bit, then the half word, in the twin's order
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (BM, BC)).to(tl.int32) >= threshold
