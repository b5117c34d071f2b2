"""Products by segments against the specification in float64: odd sizes, segments without rows, strided weights, subsets of
gradients."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from plopfast.kernels import library_segments, reference  # noqa: F401  # registers the operations
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.lora.experts import Adapted
from plopfast.models.routed import PlainProduct
from plopfast.training.meter import FORMULAS

OPS = torch.ops.plopfast
S = 0.75
CASES = [  # rows of each segment, N, K, R
    ([3, 5, 2], 12, 8, 4),
    ([0, 7, 0, 1, 0], 5, 9, 3),
    ([0, 0], 6, 4, 2),
    ([1], 1, 1, 1),
    ([33, 0, 17], 40, 65, 16),
]


def made(rows, n, k, r, dtype=torch.float32, strided=False):
    draw, e = torch.Generator().manual_seed(0), len(rows)
    x, w, a, b, dy = (
        torch.randn(shape, generator=draw).to(dtype)
        for shape in ((sum(rows), k), (e, n, k), (e, r, k), (e, n, r), (sum(rows), n))
    )
    if strided:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    return x, w, a, b, dy, torch.tensor(rows).cumsum(0).int()


def by_torch(x, w, a, b, ends):
    """The same in plain torch, in the dtype of the operands."""
    parts = torch.tensor_split(x, ends[:-1].tolist())
    return torch.cat([p @ w[e].T + S * (p @ a[e].T) @ b[e].T for e, p in enumerate(parts)])


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, strided):
    x, w, a, b, dy, ends = made(*case, dtype=dtype, strided=strided)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = Adapted.apply(leaves[0], w, leaves[1], leaves[2], leaves[1], leaves[2], ends, S, "torch")
    y.backward(dy)
    other = [t.clone().requires_grad_() for t in (x, a, b)]
    same = by_torch(other[0], w, other[1], other[2], ends)
    same.backward(dy)
    exact = [t.double().requires_grad_() for t in (x, a, b)]
    want = reference.segments(exact[0], w, exact[1], exact[2], ends.tolist(), S)
    want.backward(dy.double())
    if not len(x):
        assert y.shape == dy.shape and not leaves[1].grad.any() and not leaves[2].grad.any()
        return
    assert_no_worse(y, same, want.detach())
    for one, theirs, of in zip(leaves, other, exact, strict=True):
        assert one.grad.dtype == one.dtype
        assert_no_worse(one.grad, theirs.grad, of.grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_frozen_product_and_its_gradient(case):
    x, w, _, _, dy, ends = made(*case)
    x.requires_grad_()
    w.requires_grad_()  # as where all weights are trained
    y = PlainProduct.apply(x, w, ends, "torch")
    want = reference.segments(x, w, w[:, :1].detach() * 0, w[:, :, :1].detach() * 0, ends.tolist(), S)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    got, exact = torch.autograd.grad(y, [x, w], dy), torch.autograd.grad(want, [x, w], dy.double())
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradient_subsets(needs):
    x, w, a, b, dy, ends = made(*CASES[1])
    leaves = [t.clone().requires_grad_(need) for t, need in zip((x, a, b), needs, strict=True)]
    y = Adapted.apply(leaves[0], w, leaves[1], leaves[2], leaves[1], leaves[2], ends, S, "torch")
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(dy)
    full = [t.clone().requires_grad_() for t in (x, a, b)]
    Adapted.apply(full[0], w, full[1], full[2], full[1], full[2], ends, S, "torch").backward(dy)
    for leaf, whole, need in zip(leaves, full, needs, strict=True):
        assert torch.equal(leaf.grad, whole.grad) if need else leaf.grad is None


def test_it_keeps_x_and_s_alone():
    x, w, a, b, _, ends = made(*CASES[4])
    known, new = {t.untyped_storage().data_ptr() for t in (x, w, a, b, ends)}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            new.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        Adapted.apply(x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_(), a, b, ends, S, "torch")
    assert new == [50 * 16]


def test_copies_of_the_adapters_in_the_weights_dtype_are_used():
    x, w, a, b, dy, ends = made(*CASES[0], dtype=torch.bfloat16)
    wide = [a.float().requires_grad_(), b.float().requires_grad_()]
    x.requires_grad_()
    outputs = [Adapted.apply(x, w, *wide, *low, ends, S, "torch") for low in (wide, (a, b))]
    assert torch.equal(*outputs)
    for one, two in zip(*(torch.autograd.grad(y, [x, *wide], dy) for y in outputs), strict=True):
        assert torch.equal(one, two) and one.dtype == two.dtype


def test_shapes_without_values_and_their_work():
    x, w, a, b, dy, ends = made(*CASES[4])
    s = OPS.segment_forward(x, w, a, b, ends, S, "torch")[1]
    for op, args in (
        (OPS.segment_product, (x, w, ends, "torch")),
        (OPS.segment_outer, (dy, x, ends)),
        (OPS.segment_forward, (x, w, a, b, ends, S, "torch")),
        (OPS.segment_backward, (dy, x, s, w, a, b, ends, S, "torch", True, False, True)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    rows, n, k, r = 50, 40, 65, 16
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops:
        OPS.segment_product(x, w, ends, "torch")
        OPS.segment_outer(dy, x, ends)
        OPS.segment_forward(x, w, a, b, ends, S, "torch")
        OPS.segment_backward(dy, x, s, w, a, b, ends, S, "torch", True, True, True)
    assert flops.get_total_flops() == 2 * rows * (4 * n * k + (n + k) * r + 2 * n * r + 2 * k * r)
