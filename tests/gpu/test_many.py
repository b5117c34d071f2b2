"""Several adapters on one frozen weight, by kernels that work on all segments at once, and with dropout by those of one linear."""

import itertools
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, keep_of, name_of, normal

import plopfast as pf
from plopfast.kernels import codes, dispatch, library_many, reference, torch_codes, triton_many
from plopfast.kernels.accuracy import assert_no_worse

SEED = 0xFEED_5EED_5EED
OUT = (
    "segment_shrink.s", "segment_gemm.y", "segment_grads.g", "segment_grads.ds", "lora_shrink.s", "lora_expand.y",
    "lora_grads.g", "lora_grads.ds", "out", "other_out",
)  # fmt: skip
BACKENDS = ["lora-first", "fused"]
# rows and rank of each segment (0: no adapter), N, K, dtypes of activations and adapters, layouts of adapters and W, units
CASES = [
    (((1, 1),), 1, 1, FP32, FP32, "dense", 4),
    (((3, 5), (0, 2), (40, 8), (1, 5)), 33, 47, FP32, FP32, "odd", 4),
    (((0, 16), (70, 16), (0, 16), (33, 16)), 40, 64, BF16, FP32, "aligned", 4),
    (((16, 3), (16, 0), (32, 17)), 64, 32, BF16, BF16, "columns", 64),
    (((0, 4), (0, 0), (130, 16)), 100, 70, FP16, FP32, "odd", 64),
    (((97, 8), (5, 8)), 30, 530, BF16, FP32, "sparse", 64),
    (((20, 64), (31, 2)), 70, 24, FP16, FP16, "odd", 16),
    (((9, 256), (0, 3), (30, 31), (4, 0)), 24, 40, BF16, FP32, "aligned", 4),
]


class Given:
    """Operands of one call. Segment e has the scaling 0.7 + e / 3."""

    def __init__(self, segments, n, k, dtype=BF16, wide=FP32, layout="dense", bias=True):
        self.rows = [rows for rows, _ in segments]
        self.cuts = [0, *itertools.accumulate(self.rows)]
        m = self.cuts[-1]
        self.x = normal(m, k, dtype=dtype, seed=1)
        self.w = normal(n, k, dtype=dtype, scale=k**-0.5, seed=2, layout=layout)
        self.a = [
            normal(r, k, dtype=wide, scale=k**-0.5, seed=30 + e, layout=layout) if r else None
            for e, (_, r) in enumerate(segments)
        ]
        self.b = [
            normal(n, r, dtype=wide, scale=r**-0.5, seed=60 + e, layout=layout) if r else None
            for e, (_, r) in enumerate(segments)
        ]
        self.bias = normal(n, dtype=dtype, seed=3) if bias else None
        self.dy = normal(m, n, dtype=dtype, scale=n**-0.5, seed=4)
        self.scalings = [0.7 + e / 3 for e in range(len(segments))]

    def way(self, backend, ps=(), seeds=()):
        return library_many.way_of(self.x, self.w, self.a, self.cuts, self.scalings, ps, seeds, backend)

    def forward(self, way):
        return library_many.forward(self.x, self.w, self.a, self.b, self.bias, way)

    def backward(self, s, way, need_x=True, need_a=None, need_b=None):
        every = [True] * len(self.a)
        needs = need_x, need_a or every, need_b or every
        dtypes = library_many.dtypes_of(self.a, self.b)
        return library_many.backward(self.dy, self.x, s, self.w, self.a, self.b, way, *needs, dtypes)

    def adapters(self):
        return [t for t in (*self.a, *self.b) if t is not None]

    def by_autograd(self, of, wide=None, ps=None):
        """(Y, dX, [dA, ..., dB, ...]) of of(x, A, B, e), rows of segment e, on dense operands, in float64 if `wide`."""
        kind = lambda t: None if t is None else t.to(wide or t.dtype).contiguous().clone()  # noqa: E731
        x, w, bias = kind(self.x).requires_grad_(), kind(self.w), kind(self.bias)
        a, b = ([None if t is None else kind(t).requires_grad_() for t in ts] for ts in (self.a, self.b))
        parts = []
        for e, part in enumerate(x.split(self.rows)):
            keep = keep_of(ps[e] if ps else 0.0, SEED + e, *part.shape)
            parts.append(of(part, w, a[e], b[e], self.scalings[e], bias, *keep))
        y = torch.cat(parts)
        leaves = [x, *(t for t in (*a, *b) if t is not None)]
        dx, *rest = torch.autograd.grad(y, leaves, self.dy.to(y.dtype))
        return y.detach(), dx, rest


def plain(x, w, a, b, c, bias, keep, q):
    y = torch.nn.functional.linear(x, w, bias)
    x = x if keep is None else x * keep * q
    return y if a is None else y + (x @ a.to(x.dtype).T) * c @ b.to(x.dtype).T


def exact(x, w, a, b, c, bias, keep, q):
    return plain(x, w, a, b, c, bias, keep, q) if a is None else reference.lora_linear(x, w, a, b, c, bias, keep, q)


def judge(o, y, dx, da, db, ps=None):
    theirs, of = o.by_autograd(plain, ps=ps), o.by_autograd(exact, torch.float64, ps)
    assert y.dtype == dx.dtype == o.x.dtype
    assert_no_worse(y, theirs[0], of[0])
    assert_no_worse(dx, theirs[1], of[1])
    ours = [g for g in (*da, *db) if g is not None]
    assert [g.dtype for g in ours] == [t.dtype for t in o.adapters()]
    assert [g is None for g in da] == [t is None for t in o.a] and [g is None for g in db] == [t is None for t in o.b]
    for one, two, three in zip(ours, theirs[2], of[2], strict=True):
        assert_no_worse(one, two, three)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_float64(case, backend, seed, watched, units):
    units(case[-1])
    o = Given(*case[:-1], bias=bool(seed))
    with watched(*OUT, seed=seed):
        way = o.way(backend)
        assert way.together
        y, s = o.forward(way)
        dx, da, db = o.backward(s, way)
    judge(o, y, dx, da, db)
    for e, rows in enumerate(o.rows):
        assert rows or o.a[e] is None or not (da[e].any() or db[e].any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=name_of)
def test_with_dropout(case, backend, watched):
    """Segment by segment, and rows are counted from each segment's start, as lora_linear's."""
    o = Given(*case[:-1])
    ps = [0.3 if e % 2 == 0 else 0.0 for e in range(len(o.a))]
    with watched(*OUT):
        way = o.way(backend, ps, [SEED + e for e in range(len(o.a))])
        assert not way.together and way.plan.backend == "triton"
        y, s = o.forward(way)
        dx, da, db = o.backward(s, way)
    judge(o, y, dx, da, db, ps)


def test_a_seed_that_lies_on_the_gpu_is_not_read_by_the_host(watched):
    o = Given(((9, 4), (7, 2)), 24, 40)
    found = []
    for seeds in ([SEED, SEED + 1], [torch.tensor(SEED + e, device=DEVICE) for e in range(2)]):
        with watched():
            way = o.way("triton", [0.3, 0.3], seeds)
            found.append(o.forward(way)[0])
    assert torch.equal(*found)


def test_what_is_launched(launched, watched):
    """As many launches for 9 segments as for 2: S, the low-rank term and the vendor's product, or a product of both."""
    for count in (2, 9):
        o = Given([(5, 4)] * count, 24, 40)
        for backend, products in (("lora-first", 1), ("fused", 0)):
            with watched():
                way = o.way(backend)
                launched.clear()
                _, s = o.forward(way)
                forward = [name for name in launched if name != "sum_partials"]
                launched.clear()
                o.backward(s, way)
            vendors = ["torch.addmm"] * products
            assert forward == ["segment_shrink", "segment_gemm", *vendors]
            kernels = [name for name in launched if not name.startswith("sum_")]
            assert kernels == ["segment_grads", "segment_grads", "segment_gemm", *vendors]


def test_gradient_subsets(watched, launched):
    """What is not needed is not computed; what is has the bits it has together with the others."""
    o = Given(((9, 4), (0, 3), (30, 8)), 24, 40)
    with watched():
        way = o.way("lora-first")
        _, s = o.forward(way)
        whole = o.backward(s, way)
        for need_x, *which in itertools.product([False, True], repeat=5):
            need_a, need_b = [which[0], False, which[1]], [which[2], False, which[3]]
            launched.clear()
            dx, da, db = o.backward(s, way, need_x, need_a, need_b)
            assert (dx is not None) == need_x
            for got, need, full in zip((*da, *db), (*need_a, *need_b), (*whole[1], *whole[2]), strict=True):
                assert (got is not None) == need
                if need:
                    torch.testing.assert_close(got, full, rtol=1e-2, atol=1e-2)
            assert launched.count("segment_grads") == any(need_a) + any(need_b)
            assert launched.count("segment_gemm") == need_x


def test_rows_of_other_segments_do_not_count(watched):
    """NaN in one segment's rows and adapter stays there."""
    o = Given(((5, 4), (20, 3), (0, 2), (7, 4)), 40, 36)
    with watched():
        clean = o.forward(o.way("lora-first"))
    bad = slice(5, 25)
    o.x[bad], o.dy[bad] = float("nan"), float("nan")
    for e in (1, 2):
        o.a[e].fill_(float("nan"))
        o.b[e].fill_(float("nan"))
    with watched(*OUT):
        way = o.way("lora-first")
        y, s = o.forward(way)
        dx, da, db = o.backward(s, way)
    for rows in (slice(0, 5), slice(25, 32)):
        assert torch.equal(y[rows], clean[0][rows]) and dx[rows].isfinite().all()
    for gradient in (da, db):
        assert (
            all(gradient[e].isfinite().all() for e in (0, 2, 3)) and gradient[1].isnan().all() and not gradient[2].any()
        )


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("wide", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize("ranks", [(4, 4), (2, 0, 5), (0, 3)], ids=name_of)
def test_a_stack_is_scaled_in_float32_rounded_once_and_padded_with_zeros(ranks, wide, at):
    each = [None if not r else normal(*((r, 7) if at == 0 else (7, r)), dtype=wide, seed=r) for r in ranks]
    c = torch.tensor([1.7 + e for e in range(len(ranks))], device=DEVICE).view(-1, 1, 1)
    for factors in (None, c):
        found = triton_many.stacked(each, at, normal(1, 1, dtype=BF16), factors)
        shape = (max(ranks), 7) if at == 0 else (7, max(ranks))
        assert found.shape == (len(ranks), *shape) and found.dtype == BF16
        for e, one in enumerate(each):
            scale = 1.0 if factors is None else float(c[e])
            want = torch.zeros(shape, device=DEVICE)
            if one is not None:
                want.narrow(at, 0, one.shape[at]).copy_(one.float() * torch.tensor(scale))
            assert torch.equal(found[e], want.to(BF16))


def test_gradients_of_float32_adapters_are_not_rounded_on_the_way(watched):
    o = Given(((40, 4), (30, 3)), 20, 24)
    with watched(*OUT):
        way = o.way("lora-first")
        _, s = o.forward(way)
        _, _, db = o.backward(s, way)
    for e, rows in enumerate((slice(0, 40), slice(40, 70))):
        want = o.dy[rows].double().T @ s[0][rows, : o.a[e].shape[0]].double()
        assert (db[e] - want).norm() < 1e-6 * want.norm()


def test_adapters_of_several_dtypes_get_gradients_of_their_own(watched):
    o = Given(((9, 4), (0, 3), (30, 4)), 24, 40)
    o.a[0], o.b[1] = o.a[0].to(BF16), o.b[1].to(BF16)
    with watched(*OUT):
        way = o.way("lora-first")
        y, s = o.forward(way)
        dx, da, db = o.backward(s, way)
    judge(o, y, dx, da, db)


def test_equal_cuts_are_copied_to_the_device_once(monkeypatch):
    """For each device and each stream, as a copy is queued and not waited for."""
    monkeypatch.setattr(triton_many, "_copies", {})
    one = triton_many._copied((3, 5), torch.int32, DEVICE)
    assert one.tolist() == [3, 5] and one.dtype == torch.int32 and one.device.type == DEVICE.type
    assert triton_many._copied((3, 5), torch.int32, DEVICE) is one
    for other in (
        triton_many._copied((3, 6), torch.int32, DEVICE),
        triton_many._copied((3, 5), torch.float32, DEVICE),
        triton_many._copied((3, 5), torch.int32, torch.device("meta")),
    ):
        assert other is not one
    assert triton_many._copied((3, 5), torch.int32, torch.device("meta")).is_meta
    for number in range(triton_many.MOST_COPIES + 1):
        triton_many._copied((number,), torch.int32, DEVICE)
    assert len(triton_many._copies) <= triton_many.MOST_COPIES


Card = namedtuple("Card", "type index")


class Copied:
    """Numbers in pinned memory, to be copied without waiting."""

    def __init__(self, values, how):
        assert how["pin_memory"] and how["device"] == "cpu"
        self.values = values

    def to(self, device, non_blocking):
        assert non_blocking
        return self.values


def test_each_stream_has_its_own_copy_and_a_graph_too(monkeypatch):
    """On tensors of the CPU that say that they lie on a GPU."""
    gpu, stream, capturing = Card("cuda", 0), [1], [False]
    made = torch.tensor
    monkeypatch.setattr(triton_many, "_copies", {})
    monkeypatch.setattr(triton_many.launch, "current_stream", lambda index: stream[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch, "tensor", lambda values, **how: Copied(made(values, dtype=how["dtype"]), how))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda count, **how: empty(count, dtype=how["dtype"]))
    one = triton_many._copied((3, 5), torch.int32, gpu)
    assert triton_many._copied((3, 5), torch.int32, gpu) is one
    stream[0] = 2
    other = triton_many._copied((3, 5), torch.int32, gpu)
    assert other is not one
    capturing[0] = True
    graph = triton_many._copied((3, 5), torch.int32, gpu)
    assert graph is not other and graph.tolist() == [3, 5] and len(triton_many._copies) == 2


def test_auto_takes_the_kernels_for_several_adapters_and_torch_for_one(monkeypatch):
    """As on a GPU; with a measured plan the product is fused."""
    monkeypatch.setattr(dispatch, "resolve", lambda device, backend="auto": "torch" if backend == "torch" else "triton")
    dispatch.plan.cache_clear()
    two, one = Given(((9, 4), (0, 3), (30, 8)), 24, 40), Given(((9, 4), (0, 3), (30, 0)), 24, 40)
    assert two.way("auto").together and two.way("auto").plan.strategy == "lora-first"
    assert not one.way("auto").together and one.way("triton").together
    assert not two.way("torch").together
    assert not two.way("auto", [0.1, 0.0, 0.0], [1, None, None]).together
    assert two.way("auto", [0.0, 0.1, 0.0], [None, 1, None]).together, "a segment without rows drops nothing"
    assert not Given(((9, 0), (30, 0)), 24, 40).way("auto").together
    large = Given(((9, dispatch.MAX_RANK + 1), (30, 8)), 24, 40)
    assert not large.way("auto").together
    with pytest.raises(dispatch.UnsupportedError, match=f"rank {dispatch.MAX_RANK + 1}"):
        large.way("triton")
    two.x = two.x.double()
    two.w = two.w.double()
    assert not two.way("auto").together
    dispatch.plan.cache_clear()


def test_a_measured_plan_fuses_the_product(monkeypatch):
    o = Given(((9, 4), (30, 8)), 24, 40)
    target = replace(dispatch.target_of(DEVICE), gpu="")
    monkeypatch.setattr(dispatch, "target_of", lambda device: target)
    row = "fused", dispatch.candidates(target, BF16)[0]
    monkeypatch.setattr(dispatch, "TABLE", {dispatch.key(target, BF16, 64, 24, 40, 8): row})
    dispatch.plan.cache_clear()
    assert o.way("triton").plan.strategy == "fused"
    dispatch.plan.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drop", [False, True])
def test_through_autograd_it_is_the_torch_path(backend, drop, watched):
    o = Given(((9, 4), (5, 0), (0, 3), (30, 8)), 24, 40, FP32)
    how = {"dropout_ps": [0.3] * 4, "seeds": range(4)} if drop else {}
    found = []
    for path in (backend, "torch"):
        x, *rest = (t.detach().clone().requires_grad_() for t in (o.x, *o.adapters()))
        it = iter(rest)
        a, b = ([None if t is None else next(it) for t in ts] for ts in (o.a, o.b))
        with watched(*(() if path == "torch" else OUT)):
            y = pf.lora_linear_grouped(x, o.w, a, b, o.cuts, o.scalings, bias=o.bias, backend=path, **how)
            found.append((y.detach(), *torch.autograd.grad(y, (x, *rest), o.dy)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drop", [False, True])
def test_the_operations_results_share_no_memory(drop, watched):
    """opcheck: shapes without values, and that no result is a view of another."""
    o = Given(((9, 4), (0, 3), (5, 0), (30, 8)), 24, 40, FP32)
    ops = torch.ops.plopfast
    ps, seeds = ([0.3] * 4, [torch.tensor(5)] * 4) if drop else ([], [])
    how = o.cuts, o.scalings, ps, seeds, "triton"
    with watched():
        torch.library.opcheck(
            ops.many_forward.default, (o.x, o.w, o.a, o.b, o.bias, *how), test_utils=("test_schema", "test_faketensor")
        )
        s = ops.many_forward(o.x, o.w, o.a, o.b, o.bias, *how)[1]
        needs = True, [True, False, False, True], [True, True, False, True]
        torch.library.opcheck(
            ops.many_backward.default, (o.dy, o.x, s, o.w, o.a, o.b, *how, *needs),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("rows", [(9, 30), (40, 41)], ids=name_of)
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_codes_are_decoded_for_each_product(backend, rows, monkeypatch, watched):
    """In the workspace, or up to 64 rows inside the product; and again for dX."""
    monkeypatch.setattr(dispatch, "runs_kernels", lambda device, dtype, backend="auto": backend != "torch")
    codes.free_workspaces()
    o = Given([(m, 4 + e) for e, m in enumerate(rows)], 24, 64, FP32)
    kept = codes.NF4(*torch_codes.encode_nf4(o.w), tuple(o.w.shape), FP32)
    whole = torch_codes.decode_nf4(kept.packed, kept.scales(), torch.empty_like(o.w))
    found = []
    for o.w in (kept, whole):
        with watched(*(() if backend == "torch" else OUT)) as check:
            way = o.way(backend)
            y, s = o.forward(way)
            dx, da, db = o.backward(s, way)
        found.append((y, dx, *da, *db))
        if check:
            names = [launch.kernel for launch in check.launches]
            inside = o.w is kept and sum(rows) <= codes.FEW
            assert names.count("lora_gemm_nf4") == inside
            assert names.count("decode_nf4") == (0 if o.w is whole else 1 if inside else 2)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segments", [((0, 4), (0, 3)), ((0, 4), (0, 0))], ids=name_of)
def test_empty(segments, watched):
    o = Given(segments, 8, 8)
    with watched(*OUT):
        way = o.way("triton")
        y, s = o.forward(way)
        dx, da, db = o.backward(s, way)
    assert y.shape == o.dy.shape and dx.shape == o.x.shape
    assert all((g is None) == (t is None) for g, t in zip((*da, *db), (*o.a, *o.b), strict=True))
    assert not any(g.any() for g in (*da, *db) if g is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_programs_changes_no_bit(backend, watched, units):
    units(64)
    o, found = Given(((50, 16), (0, 3), (23, 7)), 70, 60), []
    for seed in (5, 6):
        with watched(*OUT, seed=seed):
            way = o.way(backend)
            y, s = o.forward(way)
            dx, da, db = o.backward(s, way)
        found.append((y, *s, dx, *da, *db))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
