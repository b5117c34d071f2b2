"""lora_expand: L = mask (S B^T) + bias."""

import pytest
import torch
from cases import BF16, FP16, FP32, keep_of, name_of, normal, product

from plopfast.kernels import triton_ops
from plopfast.kernels.accuracy import assert_no_worse

SEED = (1 << 63) - 25

# M, N, R, dtype of S, of B; layout of B; bias, p
CASES = [
    (1, 1, 1, FP32, FP32, "dense", True, 0.0),
    (33, 70, 3, FP32, FP32, "sparse", True, 0.0),
    (65, 130, 16, BF16, FP32, "odd", False, 0.3),
    (70, 20, 64, FP16, FP16, "columns", True, 0.0),
    (40, 150, 100, BF16, BF16, "odd", False, 0.5),
    (5, 33, 256, FP16, FP32, "columns", False, 0.2),
    (34, 65, 17, FP32, FP32, "columns", False, 0.7),
    (17, 24, 65, BF16, FP32, "sparse", True, 0.1),
]


def plain(s, b, bias, keep):
    y = product(s, b.to(s.dtype).T)
    y = y if keep is None else y * keep
    return y if bias is None else y + bias


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_float64(case, seed, watched):
    m, n, r, dtype, wide, layout, with_bias, p = case
    s = normal(m, r, dtype=dtype, seed=1, layout="odd")
    b = normal(n, r, dtype=wide, scale=r**-0.5, seed=2, layout=layout)
    bias = normal(n, dtype=dtype, seed=3, layout="odd") if with_bias else None
    keep, _ = keep_of(p, SEED, m, n)
    with watched("y", seed=seed):
        y = triton_ops.low_rank(s, b, bias, p=p, seed=SEED)
    exact = plain(s.double(), b.double(), None if bias is None else bias.double(), keep)
    assert_no_worse(y, plain(s, b, bias, keep), exact)
    if p:  # to the last bit, and the bias is not masked
        left = torch.zeros_like(y) if bias is None else bias.expand(m, n)
        assert torch.equal(y[~keep], left[~keep])


@pytest.mark.parametrize("m, n", [(0, 16), (5, 0), (0, 0)])
def test_empty(m, n, watched):
    with watched("y"):
        y = triton_ops.low_rank(normal(m, 4, dtype=BF16), normal(n, 4), p=0.5, seed=SEED)
    assert y.shape == (m, n) and y.dtype == BF16


def test_the_order_of_programs_changes_no_bit(watched):
    s, b = normal(130, 16, dtype=BF16, seed=1), normal(140, 16, seed=2)
    found = []
    for seed in (5, 6):
        with watched("y", seed=seed):
            found.append(triton_ops.low_rank(s, b, p=0.3, seed=SEED))
    assert torch.equal(*found)
