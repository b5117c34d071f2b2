"""The rule of errors passes what is as good as plain torch and fails every fault planted here."""

import math

import pytest
import torch

from plopfast.kernels.accuracy import assert_no_worse, compare

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [FP32, FP16, BF16]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(dtype, factor, by=0.1, shape=(40, 50)):
    """Ours with `factor` times the error of plain torch, which is far above the floor; plain; exact."""
    exact, error = normal(*shape, seed=0), by * normal(*shape, seed=1)
    return (exact + factor * error).to(dtype), (exact + error).to(dtype), exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor, passes", [(0.0, True), (1.0, True), (1.8, True), (2.2, False), (-2.2, False)])
def test_twice_the_error_passes_and_more_does_not(dtype, factor, passes):
    found = compare(*results(dtype, factor))
    assert found.passes == passes == (found.share <= 1)
    assert found.share == pytest.approx(abs(factor) / 2, abs=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails(dtype, bad):
    ours, plain, exact = results(dtype, 1.0)
    ours[-1, -1] = bad
    assert compare(ours, plain, exact).share == math.inf
    plain[-1, -1] = bad
    assert not compare(ours, plain, exact).passes, "also where plain torch has it too"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_element_of_a_million_fails(dtype):
    exact = normal(1000, 1000, seed=2)
    ours, plain = exact.to(dtype), exact.to(dtype)
    assert compare(ours, plain, exact).passes
    ours[500, 500] += 0.5
    found = compare(ours, plain, exact)
    assert not found.passes and found.size == "largest element"
    assert "in its largest element, plain torch by" in str(found)
    with pytest.raises(AssertionError, match="largest element"):
        assert_no_worse(ours, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_missing_row_fails(dtype):
    ours, plain, exact = results(dtype, 1.0, by=1e-3, shape=(4000, 8))
    ours[-1] = 0
    assert not compare(ours, plain, exact).passes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_more_rounding_passes_where_plain_torch_has_no_error(dtype):
    exact = normal(300, 300, seed=3).to(dtype).double()
    plain = exact.to(dtype)
    rounded = (exact * 3).to(dtype) / 3
    assert torch.equal(plain.double(), exact) and not torch.equal(rounded, plain)
    assert_no_worse(rounded, plain, exact)
    assert not compare(plain * (1 + 32 * torch.finfo(dtype).eps), plain, exact).passes


def test_a_long_float32_sum_in_order_passes_and_tf32_does_not():
    x, w = normal(64, 1536, seed=4).float(), normal(1536, 64, seed=5).float()
    exact, in_order = x.double() @ w.double(), torch.zeros(64, 64)
    for k in range(1536):
        in_order += x[:, k, None] * w[k]
    assert_no_worse(in_order, exact.float(), exact)
    short = lambda t: (t.view(torch.int32) & ~0x1FFF).view(torch.float32)  # noqa: E731
    assert compare(short(x) @ short(w), exact.float(), exact).share > 10


def test_a_sum_in_bfloat16_fails():
    x, w = normal(64, 4096, seed=6).to(BF16), normal(4096, 64, seed=7).to(BF16)
    exact, narrow = x.double() @ w.double(), torch.zeros(64, 64, dtype=BF16)
    for k in range(0, 4096, 16):
        narrow += x[:, k : k + 16] @ w[k : k + 16]
    assert compare(narrow, exact.to(BF16), exact).share > 1.2
    assert_no_worse((x.float() @ w.float()).to(BF16), exact.to(BF16), exact)


def test_nothing_and_zeros():
    empty = torch.zeros(0, 8)
    assert compare(empty, empty, empty.double()).share == 0
    zeros = torch.zeros(3, 8)
    assert compare(zeros, zeros, zeros.double()).share == 0
    assert compare(zeros + 1e-30, zeros, zeros.double()).share == math.inf


def test_shapes_and_dtypes_must_agree():
    ours, plain, exact = results(BF16, 1.0)
    with pytest.raises(AssertionError, match=r"\[1, 50\]"):
        assert_no_worse(ours[:1], plain, exact)
    with pytest.raises(AssertionError, match="float32"):
        assert_no_worse(ours.float(), plain, exact)
