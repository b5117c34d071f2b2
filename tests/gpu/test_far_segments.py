"""As test_far.py, of products by segments: experts, and parts of sums, that lie beyond 2^31 elements.

M rows, K in, C columns, N out, R rank.
"""

import pytest
import torch
from cases import BF16, FP32, HALF, normal
from interpreter import checked, far_apart

from plopfast.kernels import segments, triton_segments

close = torch.testing.assert_close
ENDS = torch.tensor([16, 32, 48], dtype=torch.int32)


def far_experts(near):
    """Matrices whose third begins at 2 HALF elements."""
    there = far_apart(near.shape, (HALF, *near.stride()[1:]), near.dtype)
    return there.copy_(near)


def test_the_third_experts_weights_and_adapters():
    x, dy = normal(48, 32, dtype=BF16, seed=1), normal(48, 24, dtype=BF16, seed=2)
    w, a, b = normal(3, 24, 32, dtype=BF16, seed=3), normal(3, 4, 32, scale=0.2, seed=4), normal(3, 24, 4, seed=5)
    found = []
    for of in (lambda t: t, far_experts):
        with checked():
            y, s = triton_segments.forward(x, of(w), of(a), of(b), ENDS, 2.0)
            found.append(
                (y, s, *triton_segments.backward(dy, x, s, of(w), of(a), of(b), ENDS, 2.0, (True, True, True)))
            )
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_the_second_part_of_s():
    m, rank = HALF // 8, 16
    assert m * rank > 1 << 31
    x, a = normal(16, 64, seed=1), normal(2, rank, 64, scale=0.1, seed=2)
    s = far_apart((2, 16, rank), (m * rank, rank, 1), FP32)
    with checked(out="s") as check:
        # of so many rows only the first tile of the first segment is launched
        segments.segment_shrink[1, 2](
            x, a, torch.tensor([16, m], dtype=torch.int32), s, m, 2, 64, 32, 1.0, 64, 1, rank * 64, 64, 1,
            RANK=rank, RP=16, PRECISION="ieee", EP=2, BM=16, BK=32,
        )  # fmt: skip
    assert check.coverage() == {"s": 1.0}
    for part, columns in enumerate((slice(0, 32), slice(32, 64))):
        close(s[part], x[:, columns] @ a[0, :, columns].T)


@pytest.mark.parametrize("part, expert", [(HALF, HALF // 4), (3 * HALF, HALF)])
def test_parts_of_gradients_and_of_ds(part, expert):
    """Three row parts of dB [E, C, R] of three experts, three stripes of dS [M, R]."""
    columns = 3 * 32
    ends = torch.tensor([48, 48, 96], dtype=torch.int32)
    t, v, u = normal(96, columns, seed=1), normal(96, 16, seed=2), normal(3, columns, 16, scale=0.2, seed=3)
    g, ds = far_apart((3, 3, columns, 16), (part, expert, 16, 1), FP32), far_apart((3, 96, 16), (HALF, 16, 1), FP32)
    with checked(out=("g", "ds")) as check:
        segments.segment_grads[3, 3, 3](
            t, v, u, ends, g, ds, HALF, columns, 1.0, columns, 1, 16, columns * 16, 16, 1, part, expert, 16, 1,
            RANK=16, RP=16, WITH_DS=True, PRECISION="ieee", BM=16, BC=32,
        )  # fmt: skip
    assert check.coverage() == {"g": 1.0, "ds": 1.0}
    for i in range(3):
        stripe = slice(32 * i, 32 * i + 32)
        for number, first in ((0, 0), (2, 48)):
            rows = slice(first + 16 * i, first + 16 * i + 16)
            close(g[i, number], t[rows].T @ v[rows])
            close(ds[i, first : first + 48], t[first : first + 48, stripe] @ u[number, stripe])
        assert not g[i, 1].any()
