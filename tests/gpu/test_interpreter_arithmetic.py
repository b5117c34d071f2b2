"""The checked interpreter rounds as a GPU does, and refuses dots and reductions that no GPU has."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import NoSuchInstructionError, checked
from planted import BF16, E4M3, E5M2, FP16, FP32, empty, gapped, run_matmul


def test_triton_random_numbers_may_wrap():
    @triton.jit
    def noise(y, seed, N: tl.constexpr):
        tl.store(y + tl.arange(0, N), tl.rand(seed, tl.arange(0, N)))

    y = torch.zeros(64)
    with checked(out="y"):
        noise[1,](y, 1234, N=64)
    assert 0.3 < y.mean() < 0.7


@triton.jit
def convert(x, y, N, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(x + lanes, mask=lanes < N, other=0.0)
    tl.store(y + lanes, numbers.to(y.dtype.element_ty), mask=lanes < N)


def same(a, b):
    """Equal to the last bit, where all NaNs are one."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*(t.float().nan_to_num(nan=7.0) for t in (a, b)))


@pytest.mark.parametrize("dtype", [BF16, FP16, E4M3, E5M2], ids=str)
def test_casts(dtype):
    """Every number of the narrow type to fp32; random fp32 of all magnitudes, and all halfway points, back."""
    width = torch.uint8 if dtype.itemsize == 1 else torch.uint16
    everything = torch.arange(2 ** (8 * dtype.itemsize)).to(width).view(dtype)
    wide, numbers = torch.empty(len(everything)), everything.float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    bits = torch.randint(-(2**31), 2**31, (20_000,), dtype=torch.int32).view(FP32)
    source = torch.cat([numbers, ties, bits, bits * 2.0**-60, torch.randn(5000), torch.randn(5000) * 1e-3])
    result = torch.empty(len(source), dtype=dtype)
    with checked(out="y"):
        convert[triton.cdiv(len(wide), 4096),](everything, wide, len(wide), BLOCK=4096)
        convert[triton.cdiv(len(source), 4096),](source, result, len(source), BLOCK=4096)
    assert same(wide, numbers)
    limit = torch.finfo(dtype).max
    assert same(result, (source.clamp(-limit, limit) if dtype.itemsize == 1 else source).to(dtype))


@triton.jit
def elementwise(x, y, z, factor, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    a, b, c = tl.load(x + lanes), tl.load(y + lanes), tl.load(z + lanes)
    tl.store(out + lanes, a + b)
    tl.store(out + N + lanes, a - b)
    tl.store(out + 2 * N + lanes, a * b)
    tl.store(out + 3 * N + lanes, -a)
    tl.store(out + 4 * N + lanes, tl.maximum(a, b))
    tl.store(out + 5 * N + lanes, tl.where(a < b, b, c))
    tl.store(out + 6 * N + lanes, tl.fma(a, b, c))
    tl.store(out + 7 * N + lanes, tl.abs(a))
    tl.store(out + 8 * N + lanes, a * factor)
    tl.store(out + 9 * N + lanes, tl.clamp(a, b, tl.maximum(b, c)))
    tl.store(out + 10 * N + lanes, a / b)
    tl.store(out + 11 * N + lanes, (a >= b).to(tl.float32))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_elementwise(dtype):
    a, b, c = (torch.randn(1024).to(dtype) for _ in range(3))
    factor = 0.3
    got = torch.empty(12, 1024, dtype=dtype)
    with checked(out="out") as check:
        elementwise[1,](a, b, c, factor, got, N=1024)
    exact = (a.double() * b.double() + c.double()).to(FP32).to(dtype)
    expected = [
        a + b, a - b, a * b, -a, torch.maximum(a, b), torch.where(a < b, b, c), exact, a.abs(),
        (a.float() * factor).to(dtype),  # a float argument is an fp32 scalar, and the product is rounded once, later
        torch.clamp(a, b, torch.maximum(b, c)), (a.float() / b.float()).to(dtype), (a >= b).to(dtype),
    ]  # fmt: skip
    for i, reference in enumerate(expected):
        assert same(got[i], reference), i
    assert check.coverage() == {"out": 1.0}


def test_the_product_with_a_float_argument_is_not_rounded():
    @triton.jit
    def scale(x, factor, y, N: tl.constexpr):
        tl.store(y + tl.arange(0, N), tl.load(x + tl.arange(0, N)) * factor)

    x, y = torch.randn(64).to(BF16), torch.empty(64)
    with checked():
        scale[1,](x, 0.3, y, N=64)
    assert torch.equal(y, x.float() * 0.3)


@triton.jit
def add(a, b):
    return a + b


def test_reductions_of_narrow_types():
    @triton.jit
    def total(x, y, N: tl.constexpr, BUG: tl.constexpr):
        numbers = tl.load(x + tl.arange(0, N))
        if BUG:
            tl.store(y, tl.reduce(numbers, 0, add))
        else:
            tl.store(y, tl.sum(numbers.to(tl.float32)) + tl.max(numbers))

    x, y = torch.randn(256).to(BF16), torch.empty(1)
    with checked():
        total[1,](x, y, N=256, BUG=False)
    assert torch.allclose(y, x.float().sum() + x.float().max(), rtol=1e-5)
    with checked(), pytest.raises(NoSuchInstructionError, match="reduction or scan of bf16.*cast to fp32"):
        total[1,](x, y, N=256, BUG=True)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_matmul(dtype, seed):
    a, b, c = gapped(37, 70, dtype=dtype), gapped(70, 45, dtype=dtype), empty(37, 45)
    check = run_matmul(a, b, c, block=(16, 32, 32), seed=seed)
    expected = a.double() @ b.double()
    assert ((c.double() - expected).abs() <= 70 * 2.0**-24 * (a.double().abs() @ b.double().abs())).all()
    assert check.coverage() == {"c": 1.0}
    assert check.flops == {check.launches[0].flops.most_common(1)[0][0]: 2 * 48 * 64 * 96}


def test_bf16_accumulation_shows():
    a, b, c = gapped(32, 512, dtype=BF16), gapped(512, 32, dtype=BF16), empty(32, 32)
    expected, norm = a.double() @ b.double(), 512**0.5
    run_matmul(a, b, c, block=(32, 32, 64))
    assert (c - expected).abs().max() < 1e-4 * norm
    run_matmul(a, b, c, block=(32, 32, 64), bug=True)
    assert 3e-3 * norm < (c - expected).abs().max() < 1e-1 * norm


def test_tf32():
    """Times the identity, a dot is the rounding of its operand."""
    a, identity, c = gapped(16, 16), torch.eye(16), empty(16, 16)
    run_matmul(a, identity, c, precision="ieee")
    assert torch.equal(c, a)
    run_matmul(a, identity, c, precision="tf32", tf32=False)
    assert torch.equal(c, a)
    spacing = 2.0 ** (a.abs().log2().floor() - 10)
    for operands in ((a, identity), (identity, a)):
        run_matmul(*operands, c, precision="tf32")
        assert torch.equal(c, (a / spacing).round() * spacing) and not torch.equal(c, a)


@pytest.mark.parametrize("dtype, least", [(BF16, 16), (FP32, 16), (E4M3, 32)], ids=str)
def test_small_dots(dtype, least):
    a, b, c = gapped(16, 64, dtype=dtype), gapped(64, 16, dtype=dtype), empty(16, 16)
    run_matmul(a, b, c, block=(16, 16, least))
    with pytest.raises(NoSuchInstructionError, match=f"expected K >= {least}, got {least // 2}"):
        run_matmul(a, b, c, block=(16, 16, least // 2))
