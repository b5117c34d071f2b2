"""Bytes of quantised weights: formulas against counts, and what decoding a real weight moves."""

import pytest
import torch
from cases import BF16, FP16, FP32
from formulas import cost
from interpreter import checked
from test_traffic import H100, compare
from traffic import recorded

from plopfast.kernels import nf4_ops, scaled_ops


def nf4_weight(n, k, double, device="cpu"):
    """Zeros; the codes of absmax are all that there are, as far as there are blocks."""
    blocks = -(-n * k // 64)
    zeros = lambda *shape, dtype=FP32: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
    packed = zeros(n * k // 2, dtype=torch.uint8)
    if not double:
        return packed, zeros(blocks), None
    return packed, torch.arange(blocks, device=device).to(torch.uint8), (zeros(256), zeros(-(-blocks // 256)), 0.5)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n, k, dtype", [(1, 2, BF16), (3, 100, FP32), (40, 512, FP16)])
def test_formula_is_count_of_nf4_decoding(n, k, dtype, double):
    weight, out = nf4_weight(n, k, double), torch.zeros(n, k, dtype=dtype)
    with checked(race=False) as check, recorded(H100) as launches:
        nf4_ops.decode(*weight, out)
    compare(launches, check)


@pytest.mark.parametrize("m, n, k, r, bias, double", [
    (1, 5, 64, 0, False, False), (17, 40, 512, 5, True, True), (70, 130, 192, 100, True, False), (3, 66, 128, 16, False, True),
])  # fmt: skip
def test_formula_is_count_of_an_nf4_product(m, n, k, r, bias, double):
    zeros = lambda *shape: torch.zeros(shape, dtype=BF16)  # noqa: E731
    added = zeros(n) if bias else None
    x, weight, low = zeros(m, k), nf4_weight(n, k, double), (zeros(m, r), zeros(n, r)) if r else (None, None)
    with checked(race=False, compute=False) as check, recorded(H100) as launches:
        nf4_ops.gemm(x, *weight, n, *low, added)
    compare(launches, check)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("n, k, block", [(3, 100, (1, 100)), (130, 272, (128, 128)), (9, 50, (4, 5))])
def test_formula_is_count_of_scaled_decoding(n, k, block, dtype):
    scale, q, out = torch.zeros(-(-n // block[0]), -(-k // block[1])), torch.zeros(n, k, dtype=dtype), torch.zeros(n, k)
    with checked(race=False) as check, recorded(H100) as launches:
        scaled_ops.decode(q, scale, block, out)
    compare(launches, check)


def test_decoding_moves_little_more_than_the_decoded_weight():
    """Llama-3-8B's largest: 2.516 bytes an element double-quantised, 2.563 plain, 3.001 of int8; 2 of them are W's."""
    n, k = 14336, 4096
    w, q = (torch.zeros(n, k, dtype=dtype, device="meta") for dtype in (BF16, torch.int8))
    rows, blocks = torch.zeros(n, device="meta"), torch.zeros(n // 128, k // 128, device="meta")
    weights = [nf4_weight(n, k, double, "meta") for double in (True, False)]
    with recorded(H100) as launches:
        for weight in weights:
            nf4_ops.decode(*weight, w)
        scaled_ops.decode(q, rows, (1, k), w)
        scaled_ops.decode(q.view(torch.float8_e4m3fn), blocks, (128, 128), w)
    assert [round(cost(launch).bytes / (n * k), 3) for launch in launches] == [2.516, 2.563, 3.001, 3.0]
