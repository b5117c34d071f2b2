"""The gate of an MLP, forward and backward: y = act(g) u, dg = dy u act'(g), du = dy act(g). Nothing between is stored.

ACT is "silu" (SwiGLU), "gelu_tanh" or "gelu" (GeGLU, by the tanh formula or by erf). g and u have rows of any stride, so
they may be the halves of one matrix. The gradients may take the place of g and u.

M tokens, N width.
"""

import triton
import triton.language as tl


@triton.jit
def _act(g, ACT: tl.constexpr):
    """(act(g), act'(g)) in float32."""
    if ACT == "silu":
        share = tl.sigmoid(g)
        return g * share, share * (1.0 + g * (1.0 - share))
    elif ACT == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z), z = sqrt(2 / pi) (g + 0.044715 g^3)
        share = tl.sigmoid(g * (1.5957691216057308 + 0.07135481627260025 * g * g))
        return g * share, share * (1.0 + g * (1.0 - share) * (1.5957691216057308 + 0.21406444881780073 * g * g))
    else:
        tl.static_assert(ACT == "gelu")
        share = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        return g * share, share + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)


@triton.jit
def _load(x, rm, rn, stride, inside):
    return tl.load(x + rm[:, None] * stride + rn[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tile(N, BM: tl.constexpr, BN: tl.constexpr):
    """(rows, columns) of this program: those of one row of tiles follow each other, as their bytes do."""
    pid, tiles = tl.program_id(0), tl.cdiv(N, BN)
    return (pid // tiles).to(tl.int64) * BM + tl.arange(0, BM), (pid % tiles).to(tl.int64) * BN + tl.arange(0, BN)


@triton.jit(do_not_specialize=["M"])
def gate(g, u, y, M, N, row_g, row_u, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y [M, N] = act(g) u"""
    rm, rn = _tile(N, BM, BN)
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    value, _ = _act(_load(g, rm, rn, row_g, inside), ACT)
    y_MN = value * _load(u, rm, rn, row_u, inside)
    tl.store(y + rm[:, None] * N + rn[None, :], y_MN.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def gate_grad(
    dy, g, u, dg, du, M, N, row_y, row_g, row_u, row_dg, row_du, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """dg [M, N] = dy u act'(g), du [M, N] = dy act(g); both are computed before either is stored."""
    rm, rn = _tile(N, BM, BN)
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    dy_MN = _load(dy, rm, rn, row_y, inside)
    u_MN = _load(u, rm, rn, row_u, inside)
    value, slope = _act(_load(g, rm, rn, row_g, inside), ACT)
    tl.store(dg + rm[:, None] * row_dg + rn[None, :], (dy_MN * u_MN * slope).to(dg.dtype.element_ty), mask=inside)
    tl.store(du + rm[:, None] * row_du + rn[None, :], (dy_MN * value).to(du.dtype.element_ty), mask=inside)
