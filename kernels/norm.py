"""RMSNorm forward and backward, and an RMSNorm that hands out S of the LoRA linears that read it.

    y = w x / rms(x),   dx = (g - x mean(g x) / rms(x)^2) / rms(x),   g = w dy

A program takes BM rows. Rows that fit registers (WHOLE) are read once. Longer ones are read twice by the same program, and
the second read finds them in the cache. The weight is frozen: it has no gradient. MODE says how it scales:

    "none"    y = x_hat
    "narrow"  y = w * x_hat.to(dtype), as Llama does
    "wide"    y = (w * x_hat).to(dtype), in float32
    "offset"  y = ((1 + w) * x_hat).to(dtype), in float32, as Gemma does

M tokens, K width, R rank, G adapters.
"""

import triton
import triton.language as tl

from .shrink import shrink_tile


@triton.jit
def _load(x, row, rk, inside):
    """A tile [BM, BK] in float32, zero beyond the edges."""
    return tl.load(x + row[:, None] + rk[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _weight(w, rk, K, MODE: tl.constexpr):
    """What multiplies x_hat: w or 1 + w [1, BK] in float32."""
    w_K = tl.load(w + rk, mask=rk < K, other=0.0).to(tl.float32)
    if MODE == "offset":
        w_K += 1.0
    return w_K[None, :]


@triton.jit
def _scaled(x_hat_MK, w, rk, K, dtype: tl.constexpr, MODE: tl.constexpr):
    """y of normalised rows; a product of two 16-bit numbers is exact in float32, so "narrow" rounds as torch does."""
    if MODE == "narrow":
        x_hat_MK = x_hat_MK.to(dtype).to(tl.float32)
    if MODE != "none":
        x_hat_MK *= _weight(w, rk, K, MODE)
    return x_hat_MK.to(dtype)


@triton.jit
def _summed(x, r, x_row, r_row, rk, inside, RESIDUAL: tl.constexpr):
    """x, or x + r rounded as torch rounds it; in float32."""
    x_MK = _load(x, x_row, rk, inside)
    if RESIDUAL:
        x_MK = (x_MK + _load(r, r_row, rk, inside)).to(x.dtype.element_ty).to(tl.float32)
    return x_MK


@triton.jit(do_not_specialize=["M"])
def rms_norm(
    x, r, w, h, y, rstd, M, K, eps, sxm, srm,
    RESIDUAL: tl.constexpr, MODE: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [M, K] and 1 / rms [M] of the rows of x, or of h = x + r, which is written too if RESIDUAL."""
    dtype: tl.constexpr = x.dtype.element_ty
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside_M, rk = rm < M, tl.arange(0, BK).to(tl.int64)
    if WHOLE:
        inside = inside_M[:, None] & (rk < K)[None, :]
        x_MK = _summed(x, r, rm * sxm, rm * srm, rk, inside, RESIDUAL)
        rstd_M = tl.rsqrt(tl.sum(x_MK * x_MK, axis=1) / K + eps)
        if RESIDUAL:
            tl.store(h + rm[:, None] * K + rk[None, :], x_MK.to(dtype), mask=inside)
        y_MK = _scaled(x_MK * rstd_M[:, None], w, rk, K, dtype, MODE)
        tl.store(y + rm[:, None] * K + rk[None, :], y_MK, mask=inside)
    else:
        squares = tl.zeros((BM, BK), tl.float32)
        for k0 in range(0, K, BK):
            inside = inside_M[:, None] & (k0 + rk < K)[None, :]
            x_MK = _summed(x, r, rm * sxm, rm * srm, k0 + rk, inside, RESIDUAL)
            squares += x_MK * x_MK
        rstd_M = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
        for k0 in range(0, K, BK):
            inside = inside_M[:, None] & (k0 + rk < K)[None, :]
            x_MK = _summed(x, r, rm * sxm, rm * srm, k0 + rk, inside, RESIDUAL)
            if RESIDUAL:  # written here and not above, so that nobody reads what it wrote
                tl.store(h + rm[:, None] * K + k0 + rk[None, :], x_MK.to(dtype), mask=inside)
            y_MK = _scaled(x_MK * rstd_M[:, None], w, k0 + rk, K, dtype, MODE)
            tl.store(y + rm[:, None] * K + k0 + rk[None, :], y_MK, mask=inside)
    tl.store(rstd + rm, rstd_M, mask=inside_M)


@triton.jit
def _grads_of(dy, w, dy_row, rk, K, inside, MODE: tl.constexpr):
    """g = w dy in float32."""
    g_MK = _load(dy, dy_row, rk, inside)
    if MODE != "none":
        g_MK *= _weight(w, rk, K, MODE)
    return g_MK


@triton.jit(do_not_specialize=["M"])
def rms_norm_grad(
    dy, x, w, rstd, r, dx, M, K, sgm, sxm, srm,
    RESIDUAL: tl.constexpr, MODE: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx [M, K] = (g - x_hat mean(g x_hat)) rstd, plus the gradient r that reaches x another way if RESIDUAL."""
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside_M, rk = rm < M, tl.arange(0, BK).to(tl.int64)
    rstd_M = tl.load(rstd + rm, mask=inside_M, other=0.0)[:, None]
    if WHOLE:
        inside = inside_M[:, None] & (rk < K)[None, :]
        x_MK = _load(x, rm * sxm, rk, inside) * rstd_M
        g_MK = _grads_of(dy, w, rm * sgm, rk, K, inside, MODE)
        mean_M = tl.sum(g_MK * x_MK, axis=1) / K
        dx_MK = (g_MK - x_MK * mean_M[:, None]) * rstd_M
        if RESIDUAL:
            dx_MK += _load(r, rm * srm, rk, inside)
        tl.store(dx + rm[:, None] * K + rk[None, :], dx_MK.to(dx.dtype.element_ty), mask=inside)
    else:
        products = tl.zeros((BM, BK), tl.float32)
        for k0 in range(0, K, BK):
            inside = inside_M[:, None] & (k0 + rk < K)[None, :]
            x_MK = _load(x, rm * sxm, k0 + rk, inside) * rstd_M
            products += x_MK * _grads_of(dy, w, rm * sgm, k0 + rk, K, inside, MODE)
        mean_M = tl.sum(products, axis=1) / K
        for k0 in range(0, K, BK):
            inside = inside_M[:, None] & (k0 + rk < K)[None, :]
            x_MK = _load(x, rm * sxm, k0 + rk, inside) * rstd_M
            g_MK = _grads_of(dy, w, rm * sgm, k0 + rk, K, inside, MODE)
            dx_MK = (g_MK - x_MK * mean_M[:, None]) * rstd_M
            if RESIDUAL:
                dx_MK += _load(r, rm * srm, k0 + rk, inside)
            tl.store(dx + rm[:, None] * K + k0 + rk[None, :], dx_MK.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "seed0", "seed1", "seed2", "threshold"])
def rms_norm_shrink(
    x, w, a0, a1, a2, y, rstd, s, M, seed0, seed1, seed2, K, eps, c, threshold, sxm, sar, sak,
    MODE: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, ADAPTERS: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [M, K] and 1 / rms [M] as `rms_norm`, and s [G, M, R] = c drop(y) A^T, for which y is not read again."""
    dtype: tl.constexpr = x.dtype.element_ty
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside_M, rank = rm < M, tl.arange(0, RP).to(tl.int64)
    squares = tl.zeros((BM, BK), tl.float32)
    for k0 in range(0, K, BK):
        rk = k0 + tl.arange(0, BK).to(tl.int64)
        x_MK = _load(x, rm * sxm, rk, inside_M[:, None] & (rk < K)[None, :])
        squares += x_MK * x_MK
    rstd_M = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
    tl.store(rstd + rm, rstd_M, mask=inside_M)
    acc0 = tl.zeros((BM, RP), tl.float32)
    acc1 = tl.zeros((BM, RP), tl.float32)
    acc2 = tl.zeros((BM, RP), tl.float32)
    for k0 in range(0, K, BK):
        rk = k0 + tl.arange(0, BK).to(tl.int64)
        inside = inside_M[:, None] & (rk < K)[None, :]
        x_MK = _load(x, rm * sxm, rk, inside)
        y_MK = _scaled(x_MK * rstd_M[:, None], w, rk, K, dtype, MODE)
        tl.store(y + rm[:, None] * K + rk[None, :], y_MK, mask=inside)
        acc0 = shrink_tile(
            acc0, y_MK, a0, rank, rk, K, sar, sak, seed0, rm, k0, threshold, dtype, RANK, BM, BK, DROP, PRECISION
        )
        if ADAPTERS > 1:
            acc1 = shrink_tile(
                acc1, y_MK, a1, rank, rk, K, sar, sak, seed1, rm, k0, threshold, dtype, RANK, BM, BK, DROP, PRECISION
            )
        if ADAPTERS > 2:
            acc2 = shrink_tile(
                acc2, y_MK, a2, rank, rk, K, sar, sak, seed2, rm, k0, threshold, dtype, RANK, BM, BK, DROP, PRECISION
            )
    base = s + rm[:, None] * RANK + rank[None, :]
    mask = inside_M[:, None] & (rank < RANK)[None, :]
    group = tl.full((), RANK, tl.int64) * M
    tl.store(base, (acc0 * c).to(dtype), mask=mask)
    if ADAPTERS > 1:
        tl.store(base + group, (acc1 * c).to(dtype), mask=mask)
    if ADAPTERS > 2:
        tl.store(base + 2 * group, (acc2 * c).to(dtype), mask=mask)
