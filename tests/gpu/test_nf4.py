"""NF4 weights: bitsandbytes' order repacked, decoded into a workspace, and decoded inside the product."""

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, name_of, normal, product

from plopfast.kernels import nf4, nf4_ops, triton_ops
from plopfast.kernels.accuracy import assert_no_worse


def quantized(n, k, seed=0):
    """Codes [N, K], all 16 of them; one absmax for 64 elements; bitsandbytes' bytes, of two elements each, high first."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    codes[:, :16] = torch.arange(16)
    absmax = torch.rand(n, k // 64, generator=generator) * 0.2 + 0.01
    flat = codes.reshape(-1).tolist()
    packed = [[16 * high + low] for high, low in zip(flat[::2], flat[1::2], strict=True)]
    return codes.to(DEVICE), absmax.to(DEVICE), torch.tensor(packed, dtype=torch.uint8, device=DEVICE)


def decoded(codes, absmax, dtype):
    """By the table: one rounding, of level times absmax in float32."""
    levels = torch.tensor(nf4.LEVELS, dtype=FP32, device=DEVICE)[codes.long()]
    return (levels * absmax.repeat_interleave(64, dim=1)).to(dtype)


def test_levels_are_quantiles_of_the_normal_distribution():
    """Eight above zero and seven below, from bitsandbytes' offset on, over the largest."""
    above, below = (torch.linspace(0.9677083, 0.5, steps, dtype=torch.float64)[:-1] for steps in (9, 8))
    quantiles = torch.cat([-torch.special.ndtri(below), torch.zeros(1), torch.special.ndtri(above).flip(0)])
    levels = torch.tensor(nf4.LEVELS, dtype=torch.float64)
    torch.testing.assert_close(levels, quantiles / quantiles.max(), rtol=0, atol=1e-6)


def test_codes_and_repack():
    codes, _, packed = quantized(5, 128)
    assert torch.equal(nf4.codes_of(packed, 5, 128), codes)
    ours = nf4.repack(packed, 5, 128)
    assert ours.shape == (5, 64) and ours.dtype == torch.uint8
    for row, block, j in ((0, 0, 0), (0, 0, 31), (4, 1, 0), (3, 1, 17)):
        byte = int(ours[row, 32 * block + j])
        assert (byte & 15, byte >> 4) == (int(codes[row, 64 * block + j]), int(codes[row, 64 * block + j + 32]))


@pytest.mark.parametrize("n, k, size", [(4, 96, 192), (3, 32, 48), (4, 128, 255)])
def test_columns_that_no_block_divides_raise(n, k, size):
    with pytest.raises(ValueError, match="a multiple of 64"):
        nf4.repack(torch.zeros(size, dtype=torch.uint8), n, k)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n, k", [(1, 64), (5, 192), (65, 128)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
def test_decode(dtype, n, k, seed, watched):
    codes, absmax, packed = quantized(n, k, seed)
    workspace = torch.full((n, k), float("nan"), dtype=dtype, device=DEVICE)
    with watched("w", seed=seed):
        out = nf4_ops.decode_nf4(nf4.repack(packed, n, k), absmax, workspace)
    assert out is workspace and torch.equal(out, decoded(codes, absmax, dtype))


def test_decode_then_multiply(watched):
    """For many tokens: a workspace of W, then the ordinary product."""
    codes, absmax, packed = quantized(40, 64)
    x, s, b = normal(50, 64, dtype=BF16, seed=1), normal(50, 4, dtype=BF16, seed=2), normal(40, 4, seed=3)
    with watched("w", "y"):
        w = nf4_ops.decode_nf4(nf4.repack(packed, 40, 64), absmax, torch.empty(40, 64, dtype=BF16, device=DEVICE))
        y, _ = triton_ops.gemm(x, w, s, b)
    exact = x.double() @ decoded(codes, absmax, BF16).double().T + s.double() @ b.double().T
    assert_no_worse(y, product(x, w.T) + product(s, b.to(BF16).T), exact)


# M, N, K, R, dtype of X, of B, bias
CASES = [
    (1, 1, 64, 1, BF16, BF16, True),
    (16, 33, 128, 3, FP16, FP32, False),
    (17, 130, 192, 16, BF16, FP32, True),
    (70, 65, 64, 100, FP16, FP16, True),
    (5, 20, 256, 0, BF16, BF16, True),
    (33, 40, 128, 8, FP32, FP32, False),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gemm(case, seed, watched):
    m, n, k, r, dtype, wide, with_bias = case
    codes, absmax, packed = quantized(n, k, seed)
    x, bias = normal(m, k, dtype=dtype, seed=1, layout="odd"), normal(n, dtype=dtype, seed=2, layout="odd")
    s = normal(m, r, dtype=dtype, seed=3, layout="odd") if r else None
    b = normal(n, r, dtype=wide, scale=r**-0.5, seed=4, layout="odd") if r else None
    bias = bias if with_bias else None
    with watched("y", seed=seed):
        y = nf4_ops.gemm_nf4(x, nf4.repack(packed, n, k), absmax, s, b, bias)
    w = decoded(codes, absmax, dtype)
    same, exact = product(x, w.T), x.double() @ w.double().T
    if r:
        same, exact = same + product(s, b.to(dtype).T), exact + s.double() @ b.double().T
    if with_bias:
        same, exact = same + bias, exact + bias.double()
    assert_no_worse(y, same, exact)


def test_empty(watched):
    _, absmax, packed = quantized(8, 64)
    ours = nf4.repack(packed, 8, 64)
    with watched("y"):
        assert nf4_ops.gemm_nf4(normal(0, 64, dtype=BF16), ours, absmax).shape == (0, 8)
        assert nf4_ops.gemm_nf4(normal(3, 64, dtype=BF16), ours[:0], absmax[:0]).shape == (3, 0)
        assert nf4_ops.decode_nf4(ours[:0], absmax[:0], normal(0, 64)).shape == (0, 64)
