"""Adds up the parts of sums that are split over programs, and takes the norms of existing rows."""

import triton
import triton.language as tl


@triton.jit
def _sum(partials, out, block, parts, size, scale, ROOT: tl.constexpr, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    partials += at
    size = size.to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts // 4):  # four loads at a time: else each would wait for the one before it
        one = tl.load(partials, mask=inside, other=0.0)
        two = tl.load(partials + size, mask=inside, other=0.0)
        three = tl.load(partials + 2 * size, mask=inside, other=0.0)
        four = tl.load(partials + 3 * size, mask=inside, other=0.0)
        total = total + one + two + three + four
        partials += 4 * size
    for _ in range(parts % 4):
        total += tl.load(partials, mask=inside, other=0.0)
        partials += size
    total *= scale
    if ROOT:
        total = tl.sqrt(total)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts", "size"])
def sum_partials(
    partials, out, parts, size, scale, ROOT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[i] = scale * sum over p of partials[p, i], p in rising order; its square root if ROOT."""
    _sum(partials, out, tl.program_id(0), parts, size, scale, ROOT, BLOCK)


@triton.jit(do_not_specialize=["parts", "size", "other_parts", "other_size"])
def sum_both(
    partials, other_partials, out, other_out, parts, size, other_parts, other_size, scale, other_scale, BLOCK: tl.constexpr
):  # fmt: skip
    """sum_partials of two sums in one launch: the first cdiv(size, BLOCK) programs take the first."""
    block, blocks = tl.program_id(0), tl.cdiv(size, BLOCK)
    if block < blocks:
        _sum(partials, out, block, parts, size, scale, False, BLOCK)
    else:
        _sum(other_partials, other_out, block - blocks, other_parts, other_size, other_scale, False, BLOCK)


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
