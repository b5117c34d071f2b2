"""NF4 weights in bitsandbytes' order, plain and double-quantised: decoded into a workspace, and inside the product."""

import math

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, name_of, normal, product

from plopfast.kernels import nf4_ops, reference, torch_codes, triton_ops
from plopfast.kernels.accuracy import assert_no_worse

LEVELS = torch.tensor(torch_codes.LEVELS, dtype=FP32, device=DEVICE)


def quantized(n, k, double=False, seed=0):
    """(packed, absmax, nested) as bitsandbytes lays them out, and what they stand for: codes [N, K] and float32 scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    codes.view(-1)[:16] = torch.arange(16)[: n * k]
    flat, blocks = codes.flatten().tolist(), math.ceil(n * k / 64)
    packed = torch.tensor(
        [[16 * high + low] for high, low in zip(flat[::2], flat[1::2], strict=True)], dtype=torch.uint8
    )
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    if not double:
        absmax = draw(blocks) * 0.2 + 0.01
        return (packed.to(DEVICE), absmax.to(DEVICE), None), (codes.to(DEVICE), absmax.to(DEVICE))
    absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
    table, nested, offset = draw(256) * 2 - 1, draw(math.ceil(blocks / 256)) * 0.3, 0.4 + 0.1 * seed
    scales = [table[byte] * nested[i // 256] + offset for i, byte in enumerate(absmax.tolist())]
    stored = packed.to(DEVICE), absmax.to(DEVICE), (table.to(DEVICE), nested.to(DEVICE), offset)
    return stored, (codes.to(DEVICE), torch.stack(scales).to(DEVICE))


def decoded(codes, scales, dtype):
    """By the table: one rounding, of level times scale in float32."""
    values = LEVELS[codes.flatten().long()] * scales.repeat_interleave(64)[: codes.numel()]
    return values.view(codes.shape).to(dtype)


def workspace(n, k, dtype):
    return torch.full((n, k), float("nan"), dtype=dtype, device=DEVICE)


def test_levels_are_quantiles_of_the_normal_distribution():
    """Eight above zero and seven below, from bitsandbytes' offset on, over the largest."""
    above, below = (torch.linspace(0.9677083, 0.5, steps, dtype=torch.float64)[:-1] for steps in (9, 8))
    quantiles = torch.cat([-torch.special.ndtri(below), torch.zeros(1), torch.special.ndtri(above).flip(0)])
    levels = torch.tensor(torch_codes.LEVELS, dtype=torch.float64)
    torch.testing.assert_close(levels, quantiles / quantiles.max(), rtol=0, atol=1e-6)


# one byte; a short last block; blocks across the ends of rows; rows of an odd length; full programs; 257 blocks
SHAPES = [(1, 2), (1, 64), (3, 100), (5, 192), (2, 33), (65, 128), (2, 8224)]


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
def test_decode(dtype, n, k, double, watched):
    for seed in (0, 1):
        (packed, absmax, nested), meaning = quantized(n, k, double, seed)
        out = workspace(n, k, dtype)
        with watched("w", seed=seed):
            found = nf4_ops.decode(packed, absmax, nested, out)
        assert found is out and torch.equal(out, decoded(*meaning, dtype))
        if dtype == FP32:
            exact = reference.nf4(packed, absmax, LEVELS, n, k, nested)
            torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-7)


def test_decode_of_scales_that_are_no_ordinary_numbers(watched):
    """0, subnormal, infinite and NaN: what torch's product gives."""
    (packed, absmax, _), (codes, _) = quantized(3, 128)
    absmax[:5] = torch.tensor([0.0, 1e-42, float("inf"), float("nan"), 1e38])
    out = workspace(3, 128, FP16)
    with watched("w"):
        nf4_ops.decode(packed, absmax, None, out)
    assert torch.equal(out.nan_to_num(7.0), decoded(codes, absmax, FP16).nan_to_num(7.0))


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_decode_then_multiply(double, watched):
    """For many tokens: a workspace of W, then the ordinary product."""
    stored, meaning = quantized(40, 64, double)
    x, s, b = normal(50, 64, dtype=BF16, seed=1), normal(50, 4, dtype=BF16, seed=2), normal(40, 4, seed=3)
    with watched("w", "y"):
        w = nf4_ops.decode(*stored, workspace(40, 64, BF16))
        y, _ = triton_ops.gemm(x, w, s, b)
    exact = x.double() @ decoded(*meaning, BF16).double().T + s.double() @ b.double().T
    assert_no_worse(y, product(x, w.T) + product(s, b.to(BF16).T), exact)


# M, N, K, R, dtype of X, of B, bias, double
CASES = [
    (1, 1, 64, 1, BF16, BF16, True, False),
    (16, 33, 128, 3, FP16, FP32, False, True),
    (17, 130, 192, 16, BF16, FP32, True, True),
    (70, 65, 64, 100, FP16, FP16, True, False),
    (5, 20, 256, 0, BF16, BF16, True, True),
    (33, 40, 128, 8, FP32, FP32, False, True),
    (1, 5, 4096, 0, FP32, FP32, False, True),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gemm(case, watched):
    m, n, k, r, dtype, wide, with_bias, double = case
    x, bias = normal(m, k, dtype=dtype, seed=1, layout="odd"), normal(n, dtype=dtype, seed=2, layout="odd")
    s = normal(m, r, dtype=dtype, seed=3, layout="odd") if r else None
    b = normal(n, r, dtype=wide, scale=r**-0.5, seed=4, layout="odd") if r else None
    bias = bias if with_bias else None
    for seed in (0, 1):
        stored, meaning = quantized(n, k, double, seed)
        with watched("y", seed=seed):
            y = nf4_ops.gemm(x, *stored, n, s, b, bias)
        w = decoded(*meaning, dtype)
        same, exact = product(x, w.T), x.double() @ w.double().T
        if r:
            same, exact = same + product(s, b.to(dtype).T), exact + s.double() @ b.double().T
        if with_bias:
            same, exact = same + bias, exact + bias.double()
        assert y.dtype == dtype
        assert_no_worse(y, same, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row_and_its_column(value, watched):
    """Rows beyond the edge take the place of row 0, and columns that of column 0: neither may show."""
    (packed, absmax, _), (codes, scales) = quantized(20, 128)
    x = normal(18, 128, seed=1)
    x[0, 3] = x[9, 127] = value
    scales[2 * 4] = absmax[2 * 4] = value
    with watched("y"):
        y = nf4_ops.gemm(x, packed, absmax, None, 20)
    bad = ~y.isfinite()
    assert bad[[0, 9]].all() and bad[:, 4].all()
    rows, columns = torch.arange(18) % 9 != 0, torch.arange(20) != 4
    good = y[rows][:, columns]
    assert good.isfinite().all()
    torch.testing.assert_close(good, x[rows] @ decoded(codes, scales, FP32)[columns].T, rtol=1e-4, atol=1e-4)


def test_plans_know_their_scales_and_dtypes(watched):
    """Calls that differ in the offset, the kind of absmax or the dtype, after each other and backwards."""
    weights = [quantized(4, 128, double, seed) for double, seed in ((True, 0), (True, 1), (False, 2), (True, 3))]
    x = normal(3, 128, seed=1)
    with watched():
        for stored, meaning in weights + weights[::-1]:
            for dtype in (BF16, FP32):
                w = decoded(*meaning, dtype)
                assert torch.equal(nf4_ops.decode(*stored, workspace(4, 128, dtype)), w)
                y, exact = nf4_ops.gemm(x.to(dtype), *stored, 4), x.to(dtype).double() @ w.double().T
                torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


def test_empty(watched):
    (packed, absmax, _), _ = quantized(8, 64)
    with watched("y") as check:
        assert nf4_ops.gemm(normal(0, 64, dtype=BF16), packed, absmax, None, 8).shape == (0, 8)
        assert nf4_ops.gemm(normal(3, 64, dtype=BF16), packed[:0], absmax[:0], None, 0).shape == (3, 0)
        assert nf4_ops.decode(packed[:0], absmax[:0], None, normal(0, 64)).shape == (0, 64)
    assert not check or not check.launches


@pytest.mark.parametrize("what", ["packed", "absmax", "nested", "out", "columns"])
def test_sizes_that_do_not_fit_are_refused(what):
    (packed, absmax, (code, nested, offset)), _ = quantized(4, 128, double=True)
    out, x = workspace(4, 128, BF16), normal(1, 100)
    with pytest.raises(AssertionError):
        if what == "columns":  # 100 is no multiple of 64
            nf4_ops.gemm(x, packed[:50], absmax[:2], (code, nested, offset), 1)
        nf4_ops.decode(
            packed[1:] if what == "packed" else packed, absmax[1:] if what == "absmax" else absmax,
            (code, nested.repeat(2) if what == "nested" else nested, offset), out[1:] if what == "out" else out,
        )  # fmt: skip
