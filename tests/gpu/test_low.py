"""Narrow copies of adapters (`low`), the dtypes of gradients, and the single rounding of S and dS.

M tokens, K in, N out, R rank.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, name_of, normal, operands

import plopfast as pf
from plopfast.kernels import dispatch, library, triton_ops
from plopfast.kernels.launch import forget_plans

OUTPUTS = ("y", "lora_shrink.s", "g", "lora_grads.ds", "out", "other_out")
BACKENDS = ["fused", "lora-first", "torch"]
SEED = 0xFEED_5EED_5EED
NEEDS = [needs for needs in itertools.product((True, False), repeat=3) if needs[1] or needs[2]]


def gradients(o, low, backend, p=0.0, needs=(True, True, True)):
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip((o.x, o.a, o.b), needs, strict=True)]
    y = pf.lora_linear(leaves[0], o.w, *leaves[1:], scaling=1.7, dropout_p=p, seed=SEED, backend=backend, low=low)
    y.backward(o.dy)
    return y.detach(), *(leaf.grad for leaf in leaves)


def low_of(o, dtype=BF16):
    return o.a.to(dtype), o.b.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [4, 100])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_have_the_dtypes_of_the_adapters_and_not_of_their_copies(p, rank, backend, watched):
    o = operands(18, 40, 24, rank, BF16, FP32)
    with watched(*(() if backend == "torch" else OUTPUTS)):
        for needs in NEEDS if rank == 4 else NEEDS[:1]:
            _, dx, da, db = gradients(o, low_of(o), backend, p, needs)
            assert (dx is not None, da is not None, db is not None) == needs
            assert all(t is None or t.dtype == dtype for t, dtype in ((dx, BF16), (da, FP32), (db, FP32)))
            if backend != "torch" and rank == 4 and all(needs):  # what kernels add up in float32 stays so
                assert all(not torch.equal(t.to(BF16).float(), t) for t in ((da, db) if p else (db,)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_copies_give_the_bits_that_casts_give(p, backend, watched):
    """A cast in a kernel is the copy's. So is one of torch, which adds up no differently."""
    o = operands(18, 40, 24, 4, BF16, FP32)
    with watched(*(() if backend == "torch" else OUTPUTS)):
        with_copies, with_casts = gradients(o, low_of(o), backend, p), gradients(o, None, backend, p)
    assert all(torch.equal(one, two) for one, two in zip(with_copies, with_casts, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_copies_are_what_is_multiplied_with_forward_and_backward(backend, watched):
    o, other = operands(18, 40, 24, 4, BF16, FP32), operands(18, 40, 24, 4, BF16, FP32)
    other.a, other.b = o.a * 2, o.b * 2
    with watched(*(() if backend == "torch" else OUTPUTS)):
        found, expected = gradients(o, low_of(other), backend, 0.3), gradients(other, None, backend, 0.3)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_another_dtype_are_not_taken(backend, watched):
    """As when the same module runs in float16 after they were made."""
    o = operands(18, 40, 24, 4, FP16, FP32)
    with watched(*(() if backend == "torch" else OUTPUTS)):
        found, expected = gradients(o, low_of(o, BF16), backend), gradients(o, None, backend)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [4, 100])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_come_in_the_dtypes_that_were_asked_for(p, rank, backend, watched):
    """Without autograd, which casts what it is given."""
    o = operands(18, 40, 24, rank, BF16, BF16)
    plan = dispatch.plan(o.x.device, BF16, 18, 40, 24, rank, backend)
    with watched(*(() if backend == "torch" else OUTPUTS)):
        for dtypes in ((FP32, BF16), (BF16, FP32)):
            for needs in NEEDS:
                found = library.backward(o.dy, o.x, o.s, o.w, o.a, o.b, 1.7, p, SEED, plan, needs, dtypes)
                wanted = [dtype if need else None for dtype, need in zip((BF16, *dtypes), needs, strict=True)]
                assert [None if t is None else t.dtype for t in found] == wanted


def integers(*shape, seed):
    """Their products and sums are exact in float32, whatever the order, and are no numbers of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(DEVICE, BF16)


@pytest.fixture
def units(monkeypatch):
    def of(count):
        target = dispatch.target_of(DEVICE)
        monkeypatch.setattr(dispatch, "target_of", lambda device: replace(target, units=count))
        forget_plans()

    return of


@pytest.mark.parametrize("m, columns, count", [(40, 30, 4), (40, 200, 4), (40, 200, 32), (12, 100, 1)], ids=name_of)
def test_ds_is_rounded_once_and_after_scaling(m, columns, count, watched, units):
    """In one stripe and in several, beside dB and alone: scale and sum are float32's."""
    units(count)
    dy, b, s = integers(m, columns, seed=1), integers(columns, 8, seed=2), normal(m, 8, dtype=BF16, seed=3)
    exact = dy.float() @ b.float()
    assert not torch.equal(exact.to(BF16).float(), exact)
    with watched(*OUTPUTS) as check:
        together, alone = triton_ops.grad_s_and_b(dy, s, b, 1.7)[0], triton_ops.shrink(dy, b.T, 1.7)
    if check:
        assert (check.launches[0].grid[0] > 1) == (columns > 30)
    for ds in (together, alone):
        assert ds.dtype == BF16 and torch.equal(ds, (exact * 1.7).to(BF16))


@pytest.mark.parametrize("k", [64, 1060])
@pytest.mark.parametrize("adapters", [1, 3])
def test_s_is_rounded_once_and_after_scaling(adapters, k, watched):
    x, stack = integers(9, k, seed=1), [integers(8, k, seed=2 + i) for i in range(adapters)]
    with watched(*OUTPUTS):
        stacked = triton_ops.shrink_stacked(x, stack, 1.7)
    for s, a in zip(stacked, stack, strict=True):
        assert torch.equal(s, (x.float() @ a.float().T * 1.7).to(BF16))


@pytest.mark.parametrize("count", [4, 32])
def test_db_and_da_in_16_bits_are_rounded_once(count, watched, units):
    units(count)
    t, v = integers(200, 40, seed=1), integers(200, 8, seed=2)
    exact = t.float().T @ v.float()
    with watched(*OUTPUTS):
        da = triton_ops.grad_a(v, t, 0.0, 0, BF16)
        db = triton_ops.grad_s_and_b(t, v, integers(40, 8, seed=3), 1.0)[1]
    assert torch.equal(db, exact.to(BF16)) and torch.equal(da, exact.T.to(BF16))
