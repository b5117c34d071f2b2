"""int8 and float8 weights with a scale for each row or block, decoded into a workspace: torch's values, bit for bit."""

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, name_of

from plopfast.kernels import reference, scaled_ops
from plopfast.kernels.launch import forget_plans

E4M3, INT8 = torch.float8_e4m3fn, torch.int8


def quantized(dtype, n, k, block, seed=0):
    """Bytes of every kind, NaN of e4m3 left out, and scales of a wide range."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
    if dtype == E4M3:
        q[(q & 0x7F) == 0x7F] = 0x08
    rows, columns = (-(-size // step) for size, step in zip((n, k), block, strict=True))
    scale = torch.randn(rows, columns, generator=generator).exp() * 0.01
    return q.view(dtype).to(DEVICE), scale.to(DEVICE)


def decoded(q, scale, block, dtype):
    """One multiplication in float32, one rounding."""
    rows, columns = (torch.arange(size, device=DEVICE) // step for size, step in zip(q.shape, block, strict=True))
    return (q.float() * scale[rows][:, columns]).to(dtype)


def decode(q, scale, block, dtype):
    return scaled_ops.decode(q, scale, block, torch.full(q.shape, float("nan"), dtype=dtype, device=DEVICE))


# N, K, block; None: all columns
CASES = [
    (1, 1, (1, None)),
    (1, 2, (1, None)),
    (3, 100, (1, None)),
    (33, 144, (1, None)),
    (70, 300, (1, None)),
    (130, 260, (128, 128)),
    (5, 100, (128, 128)),
    (20, 272, (3, 16)),
    (9, 50, (4, 5)),
    (40, 130, (1, 24)),
]


@pytest.mark.parametrize("q_dtype", [INT8, E4M3], ids=name_of)
@pytest.mark.parametrize("n, k, block", CASES)
def test_decode(n, k, block, q_dtype, watched):
    block = block[0], block[1] or k
    for seed, dtype in enumerate((BF16, FP16, FP32)):
        q, scale = quantized(q_dtype, n, k, block, seed)
        with watched("w", seed=seed % 2):
            found = decode(q, scale, block, dtype)
        assert found.dtype == dtype and torch.equal(found, decoded(q, scale, block, dtype))
        if dtype == FP32:
            torch.testing.assert_close(found.double(), reference.scaled(q, scale, block), rtol=1e-6, atol=0)


@pytest.mark.parametrize("q_dtype", [INT8, E4M3], ids=name_of)
def test_every_byte(q_dtype, watched):
    """Signed zeros, subnormals, the largest and NaN, by scales that are ordinary, tiny, huge and no number."""
    q = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(q_dtype).repeat(9, 1)
    scale = torch.tensor([1.0, -1.5, 3e-5, 1e-38, 1e-42, 3e38, 0.0, float("inf"), float("nan")], device=DEVICE)
    for dtype in (FP32, BF16, FP16):
        with watched("w"):
            found = decode(q, scale, (1, 256), dtype)
        want = decoded(q, scale[:, None], (1, 256), dtype)
        assert torch.equal(found.isnan(), want.isnan())
        bits = {4: torch.int32, 2: torch.int16}[found.element_size()]
        assert torch.equal(found.nan_to_num(7.0).view(bits), want.nan_to_num(7.0).view(bits))  # the sign of zero too


def test_plans_know_types_and_blocks(watched):
    """Calls of one shape that differ in one fact, forwards and backwards, as with plans of their own."""
    calls = []
    for q_dtype in (INT8, E4M3):
        for block in ((1, 64), (16, 16), (16, 32), (8, 32), (16, 5)):
            q, scale = quantized(q_dtype, 16, 64, block)
            calls += [(q, scale, block, dtype) for dtype in (BF16, FP32)]
    with watched():
        forget_plans()
        for call in calls + calls[::-1]:
            assert torch.equal(decode(*call), decoded(*call))


@pytest.mark.parametrize("n, k", [(0, 64), (3, 0), (0, 0)])
def test_empty(n, k, watched):
    with watched() as check:
        for dtype in (INT8, E4M3):
            assert decode(*quantized(dtype, n, k, (1, 64)), (1, 64), BF16).shape == (n, k)
    assert not check or not check.launches


@pytest.mark.parametrize("what", ["scale", "out", "dtype"])
def test_operands_that_do_not_fit_are_refused(what):
    q, scale = quantized(INT8, 40, 130, (1, 24))
    out = torch.zeros(40, 130, dtype=BF16, device=DEVICE)
    with pytest.raises(AssertionError):
        if what == "scale":
            scaled_ops.decode(q, scale[1:], (1, 24), out)
        elif what == "out":
            scaled_ops.decode(q, scale, (1, 24), out.view(130, 40))
        else:
            scaled_ops.decode(q.view(torch.uint8), scale, (1, 24), out)
