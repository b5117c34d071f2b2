"""As test_far.py, for the kernels that work on rows: norms, gates, rotary embedding, loss.

M tokens, K in, C columns.
"""

import pytest
import torch
from cases import BF16, FP32, HALF, normal
from interpreter import checked, far_apart

from plopfast.kernels import (
    cross_entropy,
    gate,
    norm,
    reference,
    torch_rows,
    triton_rows,
)

close = torch.testing.assert_close


TALL = (1 << 27) + 16  # rows of 16 elements, the last of which lie beyond 2^31


def tall(seed=None, dtype=BF16):
    """[TALL, 16], and its last 16 rows: random numbers, if there is a seed."""
    whole = far_apart((TALL, 16), (16, 1), dtype)
    return whole, whole[-16:] if seed is None else whole[-16:].copy_(normal(16, 16, dtype=dtype, seed=seed))


@pytest.mark.parametrize("whole", [False, True])
def test_last_rows_of_norms(whole, programs_from):
    (x, last_x), (r, last_r), (dy, last_dy) = (tall(seed) for seed in (1, 2, 3))
    (h, last_h), (y, last_y), (dx, last_dx) = (tall() for _ in range(3))
    rstd, w = far_apart((TALL,), (1,), FP32), normal(16, dtype=BF16, seed=4)
    constants = {"RESIDUAL": True, "MODE": "narrow", "WHOLE": whole, "BM": 16, "BK": 16 if whole else 8}
    programs_from(TALL // 16 - 1)
    with checked():
        norm.rms_norm[1,](x, r, w, h, y, rstd, TALL, 16, 1e-5, 16, 16, **constants)
        norm.rms_norm_grad[1,](dy, x, w, rstd, r, dx, TALL, 16, 16, 16, 16, **constants)
    close(last_h, last_x + last_r)
    close(last_y, reference.rms_norm(last_h, w, 1e-5).to(BF16))
    x_hat, g = (last_x.float() * rstd[-16:, None], (last_dy * w).float())
    exact = (g - x_hat * (g * x_hat).mean(1, keepdim=True)) * rstd[-16:, None] + last_r.float()
    close(last_dx, exact.to(BF16), rtol=2e-2, atol=2e-2)


def test_last_rows_of_a_norm_and_its_shrinks(programs_from):
    (x, last_x), (y, last_y) = tall(1), tall()
    rstd, s = far_apart((TALL,), (1,), FP32), far_apart((3, TALL, 16), (TALL * 16, 16, 1), BF16)
    adapters = [normal(16, 16, scale=0.2, seed=10 + i) for i in range(3)]
    programs_from(TALL // 16 - 1)
    with checked():
        norm.rms_norm_shrink[1,](
            x, x, *adapters, y, rstd, s, TALL, 0, 0, 0, 16, 1e-5, 1.0, 0, 16, 16, 1,
            MODE="none", RANK=16, RP=16, ADAPTERS=3, DROP=False, PRECISION="ieee", BM=16, BK=16,
        )  # fmt: skip
    close(last_y, reference.rms_norm(last_x, None, 1e-5).to(BF16))
    for found, a in zip(s, adapters, strict=True):
        close(found[-16:], (last_y.float() @ a.to(BF16).float().T).to(BF16))


def test_last_rows_of_a_gate(programs_from):
    (g, last_g), (u, last_u), (dy, last_dy) = (tall(seed) for seed in (1, 2, 3))
    (y, last_y), (dg, last_dg), (du, last_du) = (tall() for _ in range(3))
    programs_from(TALL // 16 - 1)
    with checked():
        gate.gate[1,](g, u, y, TALL, 16, 16, 16, ACT="silu", BM=16, BN=16)
        gate.gate_grad[1,](dy, g, u, dg, du, TALL, 16, 16, 16, 16, 16, 16, ACT="silu", BM=16, BN=16)
    exact = reference.gate(last_g, last_u, "silu"), *reference.gate_grad(last_dy, last_g, last_u, "silu")
    for got, one in zip((last_y, last_dg, last_du), exact, strict=True):
        close(got, one.to(BF16))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_tokens_and_heads_of_a_rotation(interleaved):
    """In place, so that reads and writes are both far; then those of new tensors."""
    q, k, cos, sin = (
        normal(2, 3, 3, 8, seed=1),
        normal(2, 3, 3, 8, seed=2),
        normal(2, 3, 6, seed=3),
        normal(2, 3, 6, seed=4),
    )
    want = torch_rows.rotary(q, k, cos, sin, interleaved=interleaved)
    far_q = far_apart((2, 3, 3, 8), (9 * HALF, 3 * HALF, HALF, 1), FP32).copy_(q)
    far_k = far_apart((2, 3, 3, 8), (9 * HALF, HALF, 3 * HALF, 1), FP32).copy_(k)
    tables = [far_apart((2, 3, 6), (3 * HALF, HALF, 1), FP32).copy_(one) for one in (cos, sin)]
    for in_place in (False, True):
        with checked():
            found = triton_rows.rotary(far_q, far_k, *tables, interleaved=interleaved, in_place=in_place)
        close(found, want)


def test_the_last_rows_of_logits(programs_from):
    n, v = HALF // 16, 48
    z, targets, losses = (
        far_apart((n, v), (v, 1), BF16),
        far_apart((n,), (1,), torch.int64),
        far_apart((n,), (1,), FP32),
    )
    last, targets[-2:] = z[-2:].copy_(normal(2, v, dtype=BF16, seed=1)), torch.tensor([47, 3])
    want, dz = torch_rows.cross_entropy(last.clone(), targets[-2:])
    programs_from(n - 2)
    with checked():
        cross_entropy.cross_entropy[2,](
            z, z, targets, losses, v, v, 1.0, 1.0, BIAS=False, CAP=False, GRADIENT=True, BLOCK=32
        )
    close(losses[-2:], want)
    close(last, dz.to(BF16))
