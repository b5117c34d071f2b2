"""Rotary embedding of q and k: triton_rows.rotary and its twin against reference.py."""

import pytest
import torch
from cases import BF16, FP16, FP32, name_of, normal

from plopfast.kernels import dispatch, library_rows, reference, torch_rows, triton_rows
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.models.rotary import rotary

# B, heads of q and of k, T, D, width of cos; dtype of q, of cos; interleaved, one cos for all rows, layout
CASES = [
    (1, 1, 1, 1, 2, 2, FP32, FP32, False, True, "heads"),
    (2, 4, 2, 5, 16, 16, BF16, BF16, False, True, "heads"),
    (2, 3, 1, 7, 10, 10, FP32, FP32, False, False, "fused"),
    (3, 5, 5, 3, 24, 24, FP16, FP32, True, False, "fused"),
    (2, 4, 2, 6, 20, 8, BF16, FP32, False, False, "heads"),
    (2, 4, 1, 6, 13, 6, FP32, FP32, True, True, "tokens"),
    (1, 7, 2, 4, 96, 96, FP16, FP16, False, True, "tokens"),
    (2, 40, 8, 2, 128, 128, BF16, BF16, True, True, "heads"),
    (1, 35, 3, 3, 256, 64, BF16, BF16, False, True, "far heads"),
]


def laid_out(value, layout, beside):
    """[B, H, T, D] as a view of what a model has, in a buffer of NaN."""
    b, h, t, d = value.shape
    if layout == "heads":  # a product's output
        return value.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "tokens":
        return value.contiguous()
    if layout == "fused":  # a part of the output of a product that makes q, k and v
        buffer = value.new_full((b, t, 3 + h * d + 5 * beside), float("nan"))
        return buffer[..., 3 : 3 + h * d].view(b, t, h, d).transpose(1, 2).copy_(value)
    buffer = value.new_full((b, 2 * h, t + 1, d + 3), float("nan"))
    return buffer[:, ::2, 1:, 2:-1].copy_(value)


def operands(b, hq, hk, t, d, width, dtype, table, one_row, layout, seed=1):
    q, k = (laid_out(normal(b, h, t, d, dtype=dtype, seed=seed + h), layout, h) for h in (hq, hk))
    cos, sin = (normal(1 if one_row else b, t, width, dtype=table, seed=seed + i) for i in (100, 101))
    return q, k, cos, sin


def exact_of(q, k, cos, sin, interleaved, backward):
    """By reference.py; for the gradients q and k are those of the outputs."""
    found = []
    for x in (q, k):
        leaf = torch.zeros_like(x, dtype=torch.float64, requires_grad=True)
        y = reference.rotary(leaf if backward else x, cos, sin, interleaved)
        found.append(torch.autograd.grad(y, leaf, x.double())[0] if backward else y)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_float64(case, backward, seed, watched):
    *shape, interleaved, one_row, layout = case
    q, k, cos, sin = operands(*shape, one_row, layout)
    given = q.clone(), k.clone()
    options = {"interleaved": interleaved, "backward": backward}
    with watched("y_q", "y_k", seed=seed) as check:
        found = triton_rows.rotary(q, k, cos, sin, **options)
    plain, exact = torch_rows.rotary(q, k, cos, sin, **options), exact_of(q, k, cos, sin, interleaved, backward)
    for got, twin, want, x, before in zip(found, plain, exact, (q, k), given, strict=True):
        assert_no_worse(got, twin, want)
        assert_no_worse(twin, want.to(twin.dtype), want)
        if q.dtype.itemsize < cos.dtype.itemsize:  # wide sums are rounded once
            assert all((one != want.to(one.dtype)).double().mean() < 0.02 for one in (got, twin))
        assert got.is_contiguous() or got.transpose(1, 2).is_contiguous()
        assert torch.equal(x, before)
        width = cos.shape[-1]
        assert torch.equal(got[..., width:], x[..., width:]) and torch.equal(twin[..., width:], x[..., width:])
    if check:
        assert len(check.launches) == 1
        for name, x in (("q", q), ("k", k)):
            count = check.counts()
            assert count[name].load.bytes == count[f"y_{name}"].store.bytes == x.numel() * x.element_size()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_in_place(case, watched):
    """The same numbers, and what is passed through is not touched. Every second case goes backward."""
    *shape, interleaved, one_row, layout = case
    q, k, cos, sin = operands(*shape, one_row, layout)
    options = {"interleaved": interleaved, "backward": CASES.index(case) % 2 > 0}
    with watched("y_q", "y_k"):
        want = triton_rows.rotary(q.clone(), k.clone(), cos, sin, **options)
    with watched() as check:
        got = triton_rows.rotary(q, k, cos, sin, in_place=True, **options)
    for one, other, x in zip(got, want, (q, k), strict=True):
        assert one is x and torch.equal(one, other)
    if check:
        for name, x in (("q", q), ("k", k)):
            rotated = x[..., : cos.shape[-1]]
            moved = check.counts()[name].load, check.counts()[f"y_{name}"].store
            assert [one.bytes for one in moved] == [rotated.numel() * x.element_size()] * 2


def test_backward_undoes_a_rotation(watched):
    q, k, angle, _ = operands(2, 4, 2, 6, 16, 8, FP32, FP32, True, "heads")
    angle = torch.cat([angle, angle], -1)
    with watched():
        turned = triton_rows.rotary(q, k, angle.cos(), angle.sin())
        back = triton_rows.rotary(*turned, angle.cos(), angle.sin(), backward=True)
    for one, other in zip(back, (q, k), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 3, 8, 8), (2, 2, 1, 0, 8, 8), (2, 2, 0, 3, 8, 8), (2, 2, 1, 3, 8, 0)], ids=str
)
def test_empty(shape, watched):
    q, k, cos, sin = operands(*shape, FP32, FP32, False, "tokens")
    with watched("y_q", "y_k"):
        found = triton_rows.rotary(q, k, cos, sin)
    for got, twin, x in zip(found, torch_rows.rotary(q, k, cos, sin), (q, k), strict=True):
        assert got.shape == twin.shape == x.shape
        if cos.shape[-1]:
            torch.testing.assert_close(got, twin)
        else:
            assert torch.equal(got, x) and torch.equal(twin, x)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, cos, sin: (q, k[:, :, 1:], cos, sin),
        lambda q, k, cos, sin: (q, k.half(), cos, sin),
        lambda q, k, cos, sin: (q, k, cos[:, 1:], sin),
        lambda q, k, cos, sin: (q, k, cos[..., 1:], sin[..., 1:]),
        lambda q, k, cos, sin: (q, k, cos[:, :1], sin[:, :1]),
        lambda q, k, cos, sin: (q[..., ::2], k[..., ::2], cos[..., :8], sin[..., :8]),
        lambda q, k, cos, sin: (q[..., :8], k[..., :8], cos, sin),
    ],
)
def test_operands_that_do_not_fit_are_refused(wrong):
    with pytest.raises(AssertionError):
        triton_rows.rotary(*wrong(*operands(2, 4, 2, 6, 16, 16, BF16, BF16, False, "heads")))


def test_the_order_of_programs_changes_no_bit(watched):
    given, found = operands(2, 4, 2, 6, 16, 16, BF16, BF16, False, "heads"), []
    for seed in (5, 6):
        with watched("y_q", "y_k", seed=seed):
            found.append(triton_rows.rotary(*given))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_through_autograd(watched, monkeypatch):
    """Gradients of any stride, as of a sum; the tables are another dtype's."""
    monkeypatch.setattr(dispatch, "runs_kernels", lambda *a: True)
    q, k, cos, sin = operands(2, 4, 2, 5, 16, 8, BF16, FP32, True, "heads")
    q.requires_grad_(), k.requires_grad_()
    with watched("y_q", "y_k") as check:
        y = rotary(q, k, cos, sin)
        (y[0].sum() + (y[1] * 2).sum()).backward()
    assert not check or [launch.kernel for launch in check.launches] == ["rotary"] * 2
    for x, got, factor in ((q, y[0], 1.0), (k, y[1], 2.0)):
        leaf = x.detach().double().requires_grad_()
        exact = reference.rotary(leaf, cos, sin)
        (exact * factor).sum().backward()
        assert_no_worse(got, exact.to(BF16), exact)
        assert_no_worse(x.grad, leaf.grad.to(BF16), leaf.grad)


def test_tables_of_a_dtype_without_kernels_take_plain_torch(launched):
    q, k, cos, sin = operands(2, 4, 2, 5, 16, 8, FP32, torch.float64, True, "heads")
    library_rows.rotary(q, k, cos, sin, False, False, "triton")
    assert launched == []
