"""Cross-entropy of a chunk of logits, with the gradient in place of the logits.

    z' = cap tanh(m (z + bias) / cap);  loss = logsumexp(z') - z'[target]
    dz = m (1 - (z' / cap)^2) (softmax(z') - onehot)                     m multiplier; without cap z' = m (z + bias)

A program takes one row, and passes over it twice: for the largest z' and the sum of exp(z' - largest), which is scaled
anew whenever a block has a larger one; and for dz. The second pass begins at the end, which the caches still hold. A
program has as many threads as programs can have: so few rows are under way at a time, and an L2 cache may hold them all.
Each loop asks for the next blocks before it works on one.

n rows, V vocabulary.
"""

import triton
import triton.language as tl

STAGES = tl.constexpr(3)
LOWEST = tl.constexpr(-3.0e38)  # below it no logit counts; -inf would make NaN of -inf - -inf


@triton.jit
def _block(at, v, V, beyond: tl.constexpr, EDGE: tl.constexpr):
    """Columns v in float32. Only the block at the EDGE is masked: with an odd V, a mask makes loads narrow."""
    found = tl.load(at + v, mask=v < V, other=beyond) if EDGE else tl.load(at + v)
    return found.to(tl.float32)


@triton.jit
def _scores(z, bias, v, V, multiplier, cap, BIAS: tl.constexpr, CAP: tl.constexpr, EDGE: tl.constexpr):
    """z' of the columns v, -inf beyond V, and its derivative by z."""
    x = _block(z, v, V, float("-inf"), EDGE)
    if BIAS:
        x += _block(bias, v, V, 0.0, EDGE)
    x *= multiplier
    slope = multiplier
    if CAP:
        small = tl.exp(-2.0 * tl.abs(x) / cap)  # tanh |a| = (1 - e) / (1 + e), e = exp(-2 |a|), which cannot overflow
        tanh = (1.0 - small) / (1.0 + small)
        x = cap * tl.where(x < 0, -tanh, tanh)
        slope = multiplier * (4.0 * small / ((1.0 + small) * (1.0 + small)))
        if EDGE:
            x = tl.where(v < V, x, float("-inf"))
    return x, slope


@triton.jit
def _add(largest, total, x):
    """The largest of all and the sum of exp(x - largest), with one more block."""
    new = tl.maximum(largest, tl.max(x, axis=0))
    return new, total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), axis=0)


@triton.jit
def _dz(x, slope, v, target, largest, share):
    p = tl.exp(x - largest) * share
    return slope * tl.where(v == target, p - 1.0, p)


@triton.jit
def cross_entropy(
    z, bias, targets, losses, V, szn, multiplier, cap,
    BIAS: tl.constexpr, CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [n] in float32; z [n, V] becomes dz if GRADIENT. The loss of a target that is no column is NaN."""
    row = tl.program_id(0).to(tl.int64)
    z += row * szn
    target = tl.load(targets + row)
    whole = V // BLOCK * BLOCK
    block = tl.arange(0, BLOCK)
    largest, total = tl.full((), LOWEST, tl.float32), tl.zeros((), tl.float32)
    for v0 in tl.range(0, whole, BLOCK, num_stages=STAGES):
        x, _ = _scores(z, bias, v0 + block, V, multiplier, cap, BIAS, CAP, False)
        largest, total = _add(largest, total, x)
    if whole < V:
        x, _ = _scores(z, bias, whole + block, V, multiplier, cap, BIAS, CAP, True)
        largest, total = _add(largest, total, x)
    share = 1.0 / total
    inside = (target >= 0) & (target < V)
    hit, _ = _scores(z, bias, tl.where(inside, target, 0), V, multiplier, cap, BIAS, CAP, False)
    loss = tl.log(total) + (largest - hit)  # far from 0, largest + log(total) would swallow the logarithm
    tl.store(losses + row, tl.where(inside, loss, float("nan")))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        dtype: tl.constexpr = z.dtype.element_ty
        if whole < V:
            v = whole + block
            x, slope = _scores(z, bias, v, V, multiplier, cap, BIAS, CAP, True)
            tl.store(z + v, _dz(x, slope, v, target, largest, share).to(dtype), mask=v < V)
        for done in tl.range(0, whole, BLOCK, num_stages=STAGES):
            v = whole - BLOCK - done + block
            x, slope = _scores(z, bias, v, V, multiplier, cap, BIAS, CAP, False)
            tl.store(z + v, _dz(x, slope, v, target, largest, share).to(dtype))
