"""lora_gemm and lora_gemm_tma: the frozen product with a low-rank term, a mask, a bias and norms of rows."""

import pytest
import torch
from cases import BF16, DEVICE, FAR, FP16, FP32, far, keep_of, name_of, normal, operands, product, view

from plopfast.kernels import dispatch, reference, triton_ops
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.kernels.dispatch import Tiles

SMALL = Tiles(32, 32, 32, 4, 2)
WIDE = Tiles(16, 64, 64, 4, 2, group=2)
TALL = Tiles(64, 32, 16, 4, 2, group=1)
TMA = Tiles(32, 32, 32, 4, 2, descriptor=True, group=3)
TMA_WIDE = Tiles(64, 64, 64, 4, 2, descriptor=True)
SEED = 0x1234_5678_9ABC

# M, N, K, R, dtype of X and W, of B; layouts of X, W, B; bias, p, norms; tiles
CASES = [
    (1, 1, 1, 1, FP32, FP32, "dense", "dense", "dense", True, 0.0, True, SMALL),
    (7, 33, 64, 3, BF16, BF16, "sparse", "sparse", "sparse", True, 0.0, True, SMALL),
    (65, 47, 100, 16, FP16, FP32, "odd", "odd", "odd", False, 0.0, False, SMALL),
    (33, 129, 31, 5, FP32, FP32, "odd", "columns", "columns", True, 0.4, False, SMALL),
    (100, 70, 48, 16, BF16, FP32, "aligned", "aligned", "aligned", True, 0.0, True, WIDE),
    (70, 40, 33, 64, BF16, BF16, "aligned", "columns", "columns", False, 0.3, False, TALL),
    (130, 34, 32, 1, FP16, FP16, "aligned", "aligned", "odd", False, 0.5, False, WIDE),
    (17, 50, 24, 256, FP16, FP16, "aligned", "columns", "aligned", True, 0.0, True, SMALL),
    (20, 36, 40, 100, BF16, FP32, "odd", "sparse", "columns", False, 0.5, False, SMALL),
    (100, 70, 80, 16, BF16, BF16, "aligned", "aligned", "aligned", True, 0.0, True, TMA),
    (97, 101, 33, 3, FP16, FP32, "aligned", "columns", "columns", False, 0.2, False, TMA),
    (1, 16, 8, 80, BF16, FP32, "aligned", "aligned", "odd", True, 0.3, False, TMA),
    (65, 130, 100, 64, FP16, FP16, "aligned", "columns", "aligned", True, 0.0, True, TMA_WIDE),
    (33, 65, 64, 0, BF16, BF16, "aligned", "aligned", "dense", True, 0.0, True, TMA),
    (33, 65, 50, 0, FP32, FP32, "odd", "odd", "dense", False, 0.0, True, SMALL),
]


def of_case(case):
    m, n, k, r, dtype, wide, x_layout, w_layout, b_layout, bias = case[:10]
    x = normal(m, k, dtype=dtype, seed=1, layout=x_layout)
    w = normal(n, k, dtype=dtype, scale=k**-0.5, seed=2, layout=w_layout)
    s = normal(m, r, dtype=dtype, seed=3, layout="odd") if r else None
    b = normal(n, r, dtype=wide, scale=r**-0.5, seed=4, layout=b_layout) if r else None
    return x, w, s, b, normal(n, dtype=dtype, seed=5, layout="odd") if bias else None


def plain(x, w, s, b, bias, keep):
    y = product(x, w.T)
    if s is not None:
        low_rank = product(s, b.to(x.dtype).T)
        y = y + (low_rank if keep is None else low_rank * keep)
    return y if bias is None else y + bias


def exact_of(x, w, s, b, bias, keep):
    return plain(*(None if t is None else t.double() for t in (x, w, s, b, bias)), keep)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_float64(case, seed, watched, launched):
    (m, n), (p, with_norms, tiles) = case[:2], case[10:]
    x, w, s, b, bias = of_case(case)
    keep, _ = keep_of(p, SEED, m, n)
    with watched("y", "norms", "out", seed=seed):
        y, norms = triton_ops.gemm(x, w, s, b, bias, p=p, seed=SEED, norms=with_norms, tiles=tiles)
    assert launched[0] == ("lora_gemm_tma" if tiles.descriptor else "lora_gemm")
    assert_no_worse(y, plain(x, w, s, b, bias, keep), exact_of(x, w, s, b, bias, keep))
    assert (norms is not None) == with_norms
    if with_norms:  # of X W^T alone
        torch.testing.assert_close(norms.double(), (x.double() @ w.double().T).norm(dim=1), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("tiles", [SMALL, TMA], ids=name_of)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_of_x(p, tiles, watched, launched):
    """The same kernel under other strides: W and A are read as they lie, W's descriptor is one of [K, N]."""
    o = operands(45, 72, 56, 16, BF16, FP32, layout="aligned")
    plan = dispatch.Plan("triton", "fused", tiles, "")
    keep, q = keep_of(p, SEED, 45, 56)
    ds = (product(o.dy, o.b.to(BF16)) * (1.7 * q)).to(BF16)
    launched.clear()
    with watched("y"):
        dx = triton_ops.grad_x(o.dy, ds, o.w, o.a, p, SEED, plan)
    assert launched == ["lora_gemm_tma" if tiles.descriptor else "lora_gemm"]
    low_rank = product(ds, o.a.to(BF16))
    same = product(o.dy, o.w) + (low_rank * keep if p else low_rank)
    assert_no_worse(dx, same, reference.lora_linear_grads(o.dy, o.x, o.w, o.a, o.b, 1.7, keep, q)["x"])


@pytest.mark.parametrize("tiles", [SMALL, TMA_WIDE], ids=name_of)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_norms_without_an_output(dtype, tiles, watched):
    """Y is never written, and neither the low-rank term nor the bias is in the norms."""
    o = operands(70, 130, 80, 8, dtype, layout="aligned")
    with watched("norms", "out", seed=3) as check:
        norms = triton_ops.frozen_norms(o.x, o.w, tiles=tiles)
    assert norms.dtype == FP32
    torch.testing.assert_close(norms.double(), (o.x.double() @ o.w.double().T).norm(dim=1), rtol=2e-5, atol=0)
    if check:
        assert check.counts()["y"].store.bytes == 0
    with watched("norms", "y", "out", seed=4):
        beside = triton_ops.gemm(o.x, o.w, o.s, o.b, o.bias, norms=True, tiles=tiles)[1]
    torch.testing.assert_close(beside, norms, rtol=1e-6, atol=0)


def test_norms_in_float32(watched):
    o = operands(19, 45, 37, 4, layout="sparse")
    with watched("norms", "out"):
        norms = triton_ops.frozen_norms(o.x, o.w)
    torch.testing.assert_close(norms.double(), (o.x.double() @ o.w.double().T).norm(dim=1), rtol=2e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 33, 16, 4), (5, 0, 16, 4), (5, 33, 0, 4), (0, 0, 0, 1)], ids=name_of)
@pytest.mark.parametrize("tiles", [SMALL, TMA], ids=name_of)
def test_empty(shape, tiles, watched):
    m, n = shape[:2]
    o = operands(*shape, BF16)
    with watched("y", "norms", "out"):
        y, norms = triton_ops.gemm(o.x, o.w, o.s, o.b, o.bias, norms=True, tiles=tiles)
    assert_no_worse(y, plain(o.x, o.w, o.s, o.b, o.bias, None), exact_of(o.x, o.w, o.s, o.b, o.bias, None))
    assert y.shape == (m, n) and norms.shape == (m,) and (shape[2] or norms.eq(0).all())


@pytest.mark.parametrize("tiles", [SMALL, WIDE, TALL, TMA, TMA_WIDE], ids=name_of)
def test_the_mask_does_not_depend_on_the_tiles(tiles, watched):
    o = operands(75, 130, 32, 4, BF16, layout="aligned")
    s, b = torch.ones_like(o.s), torch.ones_like(o.b)
    with watched("y"):
        y, _ = triton_ops.gemm(torch.zeros_like(o.x), o.w, s, b, p=0.4, seed=-3, tiles=tiles)
    assert torch.equal(y, 4.0 * keep_of(0.4, -3, 75, 130)[0].to(BF16))


@pytest.mark.parametrize("tiles", [WIDE, TMA], ids=name_of)
def test_the_order_of_programs_changes_no_bit(tiles, watched):
    o = operands(100, 70, 80, 16, BF16, layout="aligned")
    found = []
    for seed in (5, 6):
        with watched("y", "norms", "out", seed=seed):
            found.append(triton_ops.gemm(o.x, o.w, o.s, o.b, o.bias, norms=True, tiles=tiles))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


UNDESCRIBABLE = {
    "rows of X": lambda x, w: (view(x, "odd"), w),
    "rows of W": lambda x, w: (x, view(w, "odd")),
    "no stride of 1": lambda x, w: (x, view(w, "sparse")),
    "address": lambda x, w: (view(torch.cat([x[:, :1], x], 1), "aligned")[:, 1:], w),
    "columns of X": lambda x, w: (view(x, "columns"), w),
    "float32": lambda x, w: (x.float(), w.float()),
}


@pytest.mark.parametrize("why", UNDESCRIBABLE)
def test_operands_that_no_descriptor_holds_take_the_pointer_kernel(why, watched, launched):
    x, w = UNDESCRIBABLE[why](normal(20, 64, dtype=BF16, seed=1), normal(24, 64, dtype=BF16, seed=2))
    assert not triton_ops.describable(x, w)
    with watched("y"):
        y, _ = triton_ops.gemm(x, w, tiles=TMA)
    assert launched == ["lora_gemm"]
    assert_no_worse(y, product(x, w.T), x.double() @ w.double().T)


@pytest.mark.parametrize("rank", [1, 3, 16, 17, 64, 65, 130, 256])
def test_every_rank(rank, watched):
    o = operands(9, 20, 16, rank, BF16, FP32)
    with watched("y"):
        y, _ = triton_ops.gemm(o.x, o.w, o.s, o.b)
    assert_no_worse(y, plain(o.x, o.w, o.s, o.b, None, None), exact_of(o.x, o.w, o.s, o.b, None, None))


@pytest.mark.parametrize("far_away", ["x", "w", "both", "both, in descriptors"])
def test_int32_offsets_do_not_overflow_beyond_2_31_elements(far_away, watched):
    o = operands(5, 5, 48, 4, BF16)
    x = o.x if far_away == "w" else far(o.x, FAR)
    w = o.w if far_away == "x" else far(o.w, FAR)
    assert max(t.stride(0) * 4 for t in (x, w)) > 2**31
    with watched("y"):
        y, _ = triton_ops.gemm(x, w, o.s, o.b, tiles=TMA if "desc" in far_away else SMALL)
    assert_no_worse(y, plain(o.x, o.w, o.s, o.b, None, None), exact_of(o.x, o.w, o.s, o.b, None, None))


@pytest.mark.parametrize("tiles", [SMALL, TMA], ids=name_of)
def test_int32_offsets_do_not_overflow_in_the_output(tiles, watched, monkeypatch):
    o = operands(5, 40, 48, 4, BF16)
    far_y = far(torch.full((5, 40), float("nan"), dtype=BF16, device=DEVICE), FAR)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape, **options: far_y)
    name = "lora_gemm_tma" if tiles.descriptor else "lora_gemm"
    kernel = getattr(triton_ops, name)

    class FarRows:
        """The kernel, told another stride of Y's rows, which is its last argument that is no constant."""

        def __getitem__(self, grid):
            return lambda *arguments, **constants: kernel[grid](*arguments[:-1], FAR, **constants)

    monkeypatch.setattr(triton_ops, name, FarRows())
    with watched("y"):
        y, _ = triton_ops.gemm(o.x, o.w, o.s, o.b, o.bias, tiles=tiles)
    assert y.stride(0) == FAR
    same = plain(o.x, o.w, o.s, o.b, o.bias, None)
    assert_no_worse(y.contiguous(), same, exact_of(o.x, o.w, o.s, o.b, o.bias, None))
