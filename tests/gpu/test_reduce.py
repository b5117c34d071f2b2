"""sum_partials and row_norms."""

import pytest
import torch
from cases import BF16, DEVICE, FAR, FP16, FP32, far, name_of, normal

from plopfast.kernels import torch_ops, triton_ops
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.kernels.launch import summing


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "parts, shape, dtype, scale, root",
    [
        (1, (1,), FP32, 1.0, False),
        (2, (1023,), BF16, 1.7, False),
        (5, (40, 33), FP16, 0.3, False),
        (3, (2, 700), FP32, 1.0, True),
        (17, (1025,), FP32, -2.0, False),
    ],
    ids=name_of,
)
def test_sum_partials(parts, shape, dtype, scale, root, seed, watched):
    partials = normal(parts, *shape, seed=1)
    partials = partials.abs() if root else partials
    with watched("out", seed=seed):
        got = summing(partials.device, parts, shape, dtype, scale, root)(partials)
    exact, same = partials.double().sum(0) * scale, partials.sum(0) * scale
    assert_no_worse(got, (same.sqrt() if root else same).to(dtype), exact.sqrt() if root else exact)


def test_sums_of_nothing(watched):
    with watched("out"):
        assert summing(DEVICE, 3, (0,), BF16, 1.0)(normal(3, 0)).shape == (0,)


# M, N, dtype, layout, bias
CASES = [
    (1, 1, FP32, "dense", True),
    (33, 65, BF16, "odd", True),
    (40, 64, FP16, "aligned", False),
    (7, 300, FP32, "sparse", True),
    (5, 2500, BF16, "odd", True),
    (70, 20, FP16, "columns", False),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_row_norms(case, seed, watched):
    m, n, dtype, layout, with_bias = case
    y = normal(m, n, dtype=dtype, seed=1, layout=layout)
    bias = normal(n, dtype=dtype, seed=2, layout="odd") if with_bias else None
    with watched("norms", seed=seed) as check:
        norms = triton_ops.row_norms(y, bias)
    if check:
        assert check.counts()["y"].load.bytes == y.numel() * y.element_size(), "Y is read once"
    exact = (y.double() if bias is None else y.double() - bias.double()).norm(dim=1)
    assert_no_worse(norms, torch_ops.row_norms(y, bias), exact)


def test_a_large_bias_does_not_swallow_the_norm(watched):
    """As it would if the difference were taken, or rounded, in bfloat16."""
    bias = torch.full_like(normal(64, dtype=BF16), 100.0)
    y = normal(9, 64, dtype=BF16, seed=1) + bias
    with watched("norms"):
        norms = triton_ops.row_norms(y, bias)
    torch.testing.assert_close(norms.double(), (y.double() - bias.double()).norm(dim=1), rtol=1e-6, atol=0)


def test_squares_do_not_overflow_float16(watched):
    y = normal(4, 40, dtype=FP16, scale=1000.0, seed=1)
    with watched("norms"):
        norms = triton_ops.row_norms(y)
    torch.testing.assert_close(norms.double(), y.double().norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("m, n", [(0, 16), (5, 0)])
def test_empty(m, n, watched):
    with watched("norms"):
        norms = triton_ops.row_norms(normal(m, n, dtype=BF16), normal(n, dtype=BF16))
    assert norms.shape == (m,) and norms.dtype == FP32 and norms.eq(0).all()


def test_int32_offsets_do_not_overflow_beyond_2_31_elements(watched):
    y = normal(5, 48, dtype=BF16, seed=1)
    with watched("norms"):
        norms = triton_ops.row_norms(far(y, FAR))
    torch.testing.assert_close(norms.double(), y.double().norm(dim=1), rtol=1e-6, atol=0)
