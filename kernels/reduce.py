"""Adds up the parts of sums that are split over programs, and takes the norms of existing rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["parts", "size"])
def sum_partials(
    partials, out, parts, size, scale, ROOT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[i] = scale * sum over p of partials[p, i], p in rising order; its square root if ROOT."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(partials + at, mask=at < size, other=0.0)
        partials += size
    total *= scale
    if ROOT:
        total = tl.sqrt(total)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["M"])
def row_norms(y, bias, norms, M, N, sym, syn, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """norms[m] = ||y_m - bias|| in float32: one read of Y, nothing written but the norms."""
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    squares = tl.zeros((BM, BN), tl.float32)
    for n0 in range(0, N, BN):
        rn = n0 + tl.arange(0, BN).to(tl.int64)
        inside = (rm < M)[:, None] & (rn < N)[None, :]
        y_MN = tl.load(y + rm[:, None] * sym + rn[None, :] * syn, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            y_MN -= tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
        squares += y_MN * y_MN
    tl.store(norms + rm, tl.sqrt(tl.sum(squares, axis=1)), mask=rm < M)
