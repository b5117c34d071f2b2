"""A launch plan is for the facts that it was made from: a call that differs in one of them gets another plan."""

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, normal, operands, view

from plopfast.kernels import dispatch, torch_blocks, triton_blocks, triton_ops, triton_segments
from plopfast.kernels.launch import Planned, forget_plans

SEED = 0xFEED_5EED_5EED
POINTERS, TMA = dispatch.Tiles(32, 32, 32, 4, 2), dispatch.Tiles(32, 32, 32, 4, 2, descriptor=True)


def of(dtype, adapters=FP32, r=4, m=18, n=32, k=48, layout="aligned"):
    return operands(m, n, k, r, dtype, adapters, layout)


def shrink(o, c=1.5, p=0.0, count=1, seed=SEED):
    return (triton_ops.shrink_stacked(o.x, (o.a,) * count, c, p, (seed, seed + 1, seed + 2)[:count]),)


def expand(o, p=0.0, bias=False, seed=SEED):
    return triton_ops.low_rank(o.s, o.b, o.bias if bias else None, p=p, seed=seed)


def gemm(o, tiles=POINTERS, p=0.0, low_rank=True, bias=False, norms=False, store=True, seed=SEED):
    s, b = (o.s, o.b) if low_rank else (None, None)
    y, found = triton_ops.gemm(
        o.x, o.w, s, b, o.bias if bias else None, p=p, seed=seed, norms=norms, store=store, tiles=tiles
    )
    return y, found


def changed(o, **tensors):
    found = type(o)(**vars(o))
    for name, change in tensors.items():
        setattr(found, name, change(getattr(o, name)))
    return found


STRIDES = {name: changed(of(BF16), **{name: lambda t: view(t, "columns")}) for name in ("a", "b", "dy", "w")}
STRIDES |= {name: changed(of(BF16), **{name: lambda t: view(t, "odd")}) for name in ("s", "x")}
BASE, HALF, NARROW, FULL = of(BF16), of(FP16), of(BF16, BF16), of(FP32)
LARGER, RANK_5 = of(BF16, m=40, n=70, k=80), of(BF16, r=5)
NARROW_B = changed(BASE, b=lambda b: b.to(BF16))
CALLS = {
    "shrink": [
        *[lambda o=o: shrink(o) for o in (BASE, HALF, NARROW, FULL, LARGER, RANK_5, STRIDES["a"], STRIDES["x"])],
        *[lambda o=o: shrink(BASE, **o) for o in (
            {"c": 3.0}, {"p": 0.3}, {"p": 0.5}, {"p": 0.5, "seed": 7}, {"count": 2}, {"count": 3})],
    ],
    "expand": [
        *[lambda o=o: expand(o) for o in (BASE, HALF, NARROW, FULL, LARGER, RANK_5, STRIDES["b"], STRIDES["s"])],
        *[lambda o=o: expand(BASE, **o) for o in ({"p": 0.3}, {"p": 0.5}, {"p": 0.5, "seed": 7}, {"bias": True})],
    ],
    "gemm": [
        *[lambda o=o: gemm(o) for o in (BASE, HALF, NARROW, FULL, LARGER, RANK_5, *STRIDES.values())],
        *[lambda o=o, t=t: gemm(BASE, t, **o) for t in (POINTERS, TMA) for o in (
            {}, {"p": 0.3}, {"p": 0.5}, {"p": 0.5, "seed": 7}, {"low_rank": False}, {"bias": True}, {"norms": True},
            {"norms": True, "store": False})],
    ],
    "grads": [
        *[lambda o=o: triton_ops.grad_s_and_b(o.dy, o.s, o.b, 1.5) for o in (
            BASE, HALF, NARROW, NARROW_B, FULL, LARGER, RANK_5, *STRIDES.values())],
        *[lambda c=c, dtype=dtype: triton_ops.grad_s_and_b(BASE.dy, BASE.s, BASE.b, c, dtype)
          for c in (1.5, 3.0) for dtype in (FP32, BF16)],
        *[lambda o=o, p=p, dtype=dtype, seed=seed: (triton_ops.grad_a(o.s, o.x, p, seed, dtype),)
          for o in (BASE, STRIDES["x"]) for p, seed in ((0.0, 3), (0.3, 3), (0.5, 3), (0.5, 7)) for dtype in (FP32, BF16)],
    ],
    "norms": [
        *[lambda o=o, bias=bias: (triton_ops.row_norms(o.dy, bias),) for o in (BASE, LARGER, STRIDES["dy"])
          for bias in (None, normal(o.dy.shape[1], dtype=BF16), normal(o.dy.shape[1]))],
    ],
}  # fmt: skip
W = normal(BASE.x.shape[1], dtype=BF16, seed=8)
CALLS |= {
    "rms norm": [
        *[lambda o=o, r=r: triton_blocks.rms_norm(o.x, None, 1e-6, "narrow", r)
          for o in (BASE, HALF, FULL, LARGER, STRIDES["x"]) for r in (None, view(o.x, "odd"))],
        *[lambda eps=eps, mode=mode: triton_blocks.rms_norm(BASE.x, W, eps, mode)
          for eps in (1e-6, 1e-2) for mode in torch_blocks.MODES],
        lambda: triton_blocks.rms_norm(BASE.x, W.float(), 1e-6, "wide"),
    ],
    "d rms norm": [
        *[lambda o=o, dy=dy, r=r: (triton_blocks.rms_norm_grad(dy, o.x, None, o.x[:, 0].float().contiguous(), "narrow", r),)
          for o in (BASE, HALF, FULL, LARGER, STRIDES["x"]) for dy in (o.x, view(o.x, "odd"))
          for r in (None, view(o.x, "odd"))],
        *[lambda mode=mode: (triton_blocks.rms_norm_grad(BASE.x, BASE.x, W, BASE.x[:, 0].float().contiguous(), mode),)
          for mode in torch_blocks.MODES],
    ],
    "rms norm and shrink": [
        *[lambda o=o: triton_blocks.rms_norm_shrink(o.x, None, 1e-6, "wide", (o.a,), 1.5)
          for o in (BASE, HALF, NARROW, FULL, LARGER, RANK_5, STRIDES["a"], STRIDES["x"])],
        *[lambda g=g: triton_blocks.rms_norm_shrink(BASE.x, W, *g) for g in (
            (1e-6, "wide", (BASE.a,), 1.5), (1e-2, "wide", (BASE.a,), 1.5), (1e-6, "offset", (BASE.a,), 1.5),
            (1e-6, "wide", (BASE.a,), 3.0), (1e-6, "wide", (BASE.a,) * 2, 1.5), (1e-6, "wide", (BASE.a,), 1.5, 0.3, (7,)),
            (1e-6, "wide", (BASE.a,), 1.5, 0.5, (7,)), (1e-6, "wide", (BASE.a,), 1.5, 0.5, (8,)))],
    ],
    "gate": [
        *[lambda o=o, u=u, act=act: (triton_blocks.gate(o.x, u, act), *triton_blocks.gate_grad(o.x, u, o.x, act))
          for o in (BASE, HALF, FULL, LARGER, STRIDES["x"]) for u in (o.x, view(o.x, "odd")) for act in torch_blocks.ACTS],
        lambda: triton_blocks.gate_grad(BASE.x, BASE.x, BASE.x, "silu", BASE.x.new_empty(18, 96).chunk(2, dim=1)),
    ],
}  # fmt: skip


def segments(o, rows=(11, 7), c=1.5, low_rank=True, turned=False):
    """Every launcher of segments, which have all the same matrices."""
    count, ends = len(rows), torch.tensor(rows, dtype=torch.int32, device=DEVICE).cumsum(0).int()
    w, a, b = (t.expand(count, *t.shape) for t in (o.w, o.a, o.b))
    if turned:
        w, a, b = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (w, a, b))
    s = triton_segments.shrink(o.x, a, ends, c)
    y = triton_segments.product(o.x, w, ends, *((s, b) if low_rank else ()))
    db, ds = triton_segments.grads(o.dy, s, ends, b.dtype, b if low_rank else None, c)
    return s, y, db, ds, triton_segments.grads(o.x, s, ends, FP32, transposed=True)[0]


CALLS["segments"] = [
    *[lambda o=o: segments(o) for o in (BASE, HALF, NARROW, FULL, RANK_5, STRIDES["x"], STRIDES["dy"])],
    *[lambda o=o: segments(BASE, **o) for o in (
        {"c": 3.0}, {"low_rank": False}, {"turned": True}, {"rows": (18,)}, {"rows": (2, 0, 16)}, {"rows": (0,) * 20 + (18,)})],
    lambda: segments(LARGER, (30, 10)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(triton_blocks, "SHARE", 0.0)  # are enough for rms_norm_shrink


@pytest.fixture
def kinds(monkeypatch):
    """The dtypes that each planned launch was given: on a GPU it reads all of them as the first ones."""
    found, send = {}, Planned.__call__

    def call(launch, pointers, free):
        found.setdefault(launch, set()).add(tuple(pointer.dtype for pointer in pointers))
        send(launch, pointers, free)

    monkeypatch.setattr(Planned, "__call__", call)
    return found


@pytest.mark.parametrize("what", CALLS)
def test_every_fact_has_a_plan_of_its_own(what, watched, kinds):
    """All calls after each other, in both orders, give the bits that each gives with new plans, of one kind of tensors."""
    with watched():
        fresh = []
        for call in CALLS[what]:
            forget_plans()
            fresh.append(call())
        forget_plans()
        after, before = [call() for call in CALLS[what]], [call() for call in reversed(CALLS[what])][::-1]
    for one, two, three in zip(fresh, after, before, strict=True):
        for a, b, c in zip(one, two, three, strict=True):
            assert a is b is c is None or (a.dtype == b.dtype == c.dtype and torch.equal(a, b) and torch.equal(a, c))
    assert kinds and all(len(dtypes) == 1 for dtypes in kinds.values())


def test_a_plan_is_for_a_precision(watched):
    """TF32 can be allowed after a plan was made."""
    found, matmul = [], torch.backends.cuda.matmul
    default = matmul.fp32_precision
    for matmul.fp32_precision in (default, "tf32", default):
        with watched():
            found.append(
                (shrink(FULL)[0], expand(FULL), gemm(FULL)[0], *triton_ops.grad_s_and_b(FULL.dy, FULL.s, FULL.b, 1.5))
            )
    for ieee, tf32, again in zip(*found, strict=True):
        assert torch.equal(ieee, again) and not torch.equal(ieee, tf32) and DEVICE.type == ieee.device.type
