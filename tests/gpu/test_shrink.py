"""lora_shrink: S = c drop(X) A^T of one to three adapters."""

import pytest
import torch
from cases import BF16, DEVICE, FAR, FP16, FP32, far, keep_of, name_of, normal, operands, product

from plopfast.kernels import triton_ops
from plopfast.kernels.accuracy import assert_no_worse

C, SEED = 1.7, (1 << 62) + 12345
SPLIT = 1060  # columns of X that few rows make several programs share

# M, K, R, dtype of X, of A; layouts of X, A; p
CASES = [
    (1, 1, 1, FP32, FP32, "dense", "dense", 0.0),
    (63, 123, 5, FP32, FP32, "odd", "sparse", 0.3),
    (63, 123, 5, BF16, FP32, "sparse", "odd", 0.0),
    (40, 64, 16, FP16, FP16, "aligned", "aligned", 0.5),
    (130, 40, 3, FP16, FP32, "odd", "columns", 0.2),
    (17, 33, 64, BF16, BF16, "columns", "odd", 0.4),
    (9, 100, 256, BF16, FP32, "aligned", "odd", 0.1),
    (5, SPLIT, 16, BF16, FP32, "aligned", "odd", 0.3),
    (19, SPLIT, 3, FP32, FP32, "odd", "odd", 0.0),
    (3, SPLIT, 64, FP16, FP16, "odd", "columns", 0.6),
]


def plain(x, a, c, keep):
    return product(x if keep is None else x * keep, a.to(x.dtype).T) * c


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_float64(case, seed, watched):
    m, k, r, dtype, wide, x_layout, a_layout, p = case
    x = normal(m, k, dtype=dtype, seed=1, layout=x_layout)
    a = normal(r, k, dtype=wide, scale=k**-0.5, seed=2, layout=a_layout)
    keep, q = keep_of(p, SEED, m, k)
    with watched("s", "out", seed=seed) as check:
        s = triton_ops.shrink_stacked(x, (a,), C * q, p, (SEED,))
    if check:
        assert (check.launches[0].grid[1] > 1) == (k == SPLIT)
    assert_no_worse(s[0], plain(x, a, C * q, keep), plain(x.double(), a.double(), C * q, keep))


@pytest.mark.parametrize(
    "dtype, p, count, k",
    [(FP32, 0.4, 3, 100), (BF16, 0.4, 2, 100), (FP32, 0.0, 2, SPLIT), (FP16, 0.0, 3, 100), (BF16, 0.4, 3, SPLIT)],
    ids=name_of,
)
def test_stacked_adapters_are_what_each_one_is(dtype, p, count, k, watched):
    """q|k|v or gate|up: one read of X, a dropout seed for each, and no number that a call of its own would not give."""
    rank = {2: 24, 3: 5}[count]
    x = normal(11, k, dtype=dtype, seed=1, layout="odd")
    adapters = [normal(rank, k, scale=k**-0.5, seed=10 + i, layout="odd") for i in range(count)]
    seeds = [7, SEED, -5][:count]
    with watched("s", "out", seed=2) as check:
        stacked = triton_ops.shrink_stacked(x, adapters, C, p, seeds)
    if check:
        assert check.launches[0].args["x"].load.program_bytes == x.numel() * x.element_size()
    for got, a, seed in zip(stacked, adapters, seeds, strict=True):
        with watched("s", "out"):
            one = triton_ops.shrink(x, a, C, p, seed)
        assert (got - one).norm() <= torch.finfo(dtype).eps * one.norm()
        keep = keep_of(p, seed, 11, k)[0]
        assert_no_worse(got, plain(x, a, C, keep), plain(x.double(), a.double(), C, keep))


def test_stacked_adapters_of_a_large_rank(watched):
    x = normal(5, 48, dtype=BF16, seed=1)
    adapters = [normal(256, 48, scale=0.2, seed=10 + i) for i in range(3)]
    seeds = [7, SEED, -5]
    with watched("s", "out"):
        stacked = triton_ops.shrink_stacked(x, adapters, C, 0.3, seeds)
    for got, a, seed in zip(stacked, adapters, seeds, strict=True):
        keep = keep_of(0.3, seed, 5, 48)[0]
        assert_no_worse(got, plain(x, a, C, keep), plain(x.double(), a.double(), C, keep))


@pytest.mark.parametrize("m, k", [(0, 64), (5, 0), (0, 0)])
def test_empty(m, k, watched):
    o = operands(m, 8, k, 4, BF16)
    with watched("s", "out"):
        s = triton_ops.shrink_stacked(o.x, (o.a,), C)
    assert s.shape == (1, m, 4) and s.dtype == BF16
    assert s.eq(0).all()


@pytest.mark.parametrize("rank", [1, 3, 16, 17, 64, 256])
def test_every_rank(rank, watched):
    """As the backward pass calls it: A is a transposed view of B."""
    o = operands(20, 40, 16, rank, BF16, FP32)
    with watched("s", "out"):
        ds = triton_ops.shrink(o.dy, o.b.T, C)
    assert_no_worse(ds, product(o.dy, o.b.to(BF16)) * C, o.dy.double() @ o.b.double() * C)


@pytest.mark.parametrize("k", [64, SPLIT])
@pytest.mark.parametrize("element, c", [(100.0, 2.0**-10), (1e-4, 2.0**10)])
def test_the_scale_is_applied_before_the_only_rounding(element, c, k, watched):
    """Where float16 cannot hold the sum itself: 10^4 k is infinite, 10^-8 k has a few bits."""
    x, a = (torch.full((rows, k), element, dtype=FP16, device=DEVICE) for rows in (3, 2))
    with watched("s", "out"):
        s = triton_ops.shrink(x, a, c)
    exact = x.double() @ a.double().T * c
    assert ((s.double() - exact).abs() <= 2.0**-11 * exact).all()


@pytest.mark.parametrize("m, k", [(40, 70), (5, SPLIT)], ids=["whole", "split"])
def test_the_order_of_programs_changes_no_bit(m, k, watched):
    o = operands(m, 8, k, 16, BF16, FP32, layout="odd")
    found = []
    for seed in (5, 6):
        with watched("s", "out", seed=seed):
            found.append(triton_ops.shrink_stacked(o.x, (o.a,), C, 0.2, (3,)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_int32_offsets_do_not_overflow_beyond_2_31_elements(p, watched):
    o = operands(5, 5, 48, 4, BF16)
    x, a = far(o.x, FAR), far(normal(5, 48, dtype=BF16, scale=0.2, seed=9), FAR)
    keep = keep_of(p, SEED, 5, 48)[0]
    with watched("s", "out"):
        s = triton_ops.shrink_stacked(x, (a,), C, p, (SEED,))
    assert_no_worse(s[0], plain(o.x, a, C, keep), plain(o.x.double(), a.double(), C, keep))
