"""Rotary embedding of q and k, forward or backward, in one launch: each is read once and written once.

    y_a = x_a cos_a - x_b sin_a          dx_a = dy_a cos_a + dy_b sin_b
    y_b = x_b cos_b + x_a sin_b          dx_b = dy_b cos_b - dy_a sin_a

The pairs (a, b) are (d, P + d), as in Llama and GPT-NeoX, or (2 d, 2 d + 1), as in GPT-J and Cohere. cos_a and cos_b may
differ, and the backward pass is exact then too. Columns beyond the first 2 P of a head are passed through.

A program takes one token, so that its cos and sin serve all heads.

T tokens of a row, H heads, D columns of a head, P pairs.
"""

import triton
import triton.language as tl


@triton.jit
def _pairs(at, inside, P: tl.constexpr, BP: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second of each pair of the rows at `at` [R, 1], in float32 [R, BP]."""
    if INTERLEAVED:  # neighbours are loaded together
        both = tl.arange(0, 2 * BP)[None, :]
        x = tl.load(at + both, mask=inside & (both < 2 * P), other=0.0).to(tl.float32)
        x_a, x_b = tl.split(tl.reshape(x, (x.shape[0], BP, 2)))
    else:
        d = tl.arange(0, BP)[None, :]
        mask = inside & (d < P)
        x_a = tl.load(at + d, mask=mask, other=0.0).to(tl.float32)
        x_b = tl.load(at + P + d, mask=mask, other=0.0).to(tl.float32)
    return x_a, x_b


@triton.jit
def _rotate(x, y, sxh, syh, cos_a, cos_b, sin_a, sin_b, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
            BP: tl.constexpr, BH: tl.constexpr, BREST: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """All heads of one token; x and y point to its first head."""
    dtype: tl.constexpr = y.dtype.element_ty
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH).to(tl.int64)[:, None]
        inside, to = h < H, y + h * syh
        x_a, x_b = _pairs(x + h * sxh, inside, P, BP, INTERLEAVED)
        y_a = (x_a * cos_a - x_b * sin_a).to(dtype)
        y_b = (x_b * cos_b + x_a * sin_b).to(dtype)
        if INTERLEAVED:
            both = tl.arange(0, 2 * BP)[None, :]
            tl.store(to + both, tl.reshape(tl.join(y_a, y_b), (BH, 2 * BP)), mask=inside & (both < 2 * P))
        else:
            d = tl.arange(0, BP)[None, :]
            tl.store(to + d, y_a, mask=inside & (d < P))
            tl.store(to + P + d, y_b, mask=inside & (d < P))
        if BREST:
            rest = 2 * P + tl.arange(0, BREST)[None, :]
            mask = inside & (rest < D)
            tl.store(to + rest, tl.load(x + h * sxh + rest, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["T"])
def rotary(
    q, k, cos, sin, y_q, y_k, T, sqb, sqh, sqt, skb, skh, skt, scb, sct, ssb, sst, syqb, syqh, syqt, sykb, sykh, sykt,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, BREST: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """y_q and y_k may be q and k themselves; then BREST is 0, as what is passed through is there already."""
    token = tl.program_id(0)
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    cos_a, cos_b = _pairs(cos + b * scb + t * sct + tl.zeros((1, 1), tl.int64), True, P, BP, INTERLEAVED)
    sin_a, sin_b = _pairs(sin + b * ssb + t * sst + tl.zeros((1, 1), tl.int64), True, P, BP, INTERLEAVED)
    if BACKWARD:
        sin_a, sin_b = -sin_b, -sin_a
    at_q, at_k = q + b * sqb + t * sqt, k + b * skb + t * skt
    to_q, to_k = y_q + b * syqb + t * syqt, y_k + b * sykb + t * sykt
    _rotate(at_q, to_q, sqh, syqh, cos_a, cos_b, sin_a, sin_b, HQ, D, P, BP, BQ, BREST, INTERLEAVED)
    _rotate(at_k, to_k, skh, sykh, cos_a, cos_b, sin_a, sin_b, HK, D, P, BP, BK, BREST, INTERLEAVED)
