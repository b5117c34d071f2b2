"""lora_linear_grouped against lora_linear on each segment alone, and against the float64 reference."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import plopfast as pf
from plopfast.kernels import library_many, philox, reference, torch_codes, torch_many
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.kernels.codes import NF4
from plopfast.training.meter import FORMULAS

CASES = [  # rows and rank of each segment (0: no adapter), N, K
    ([(13, 4), (25, 2), (12, 4)], 12, 8),
    ([(0, 3), (7, 5), (0, 0), (1, 0), (4, 1), (0, 2)], 5, 9),
    ([(0, 2), (0, 4)], 6, 4),
    ([(9, 0), (3, 0)], 6, 4),
    ([(1, 1)], 1, 1),
    ([(33, 16), (0, 3), (17, 64), (11, 0), (20, 16)], 40, 65),
]
DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, None),
    (torch.float16, torch.float32),
    (torch.float64, None),
]


def view(value, strided):
    """Inside a NaN-filled buffer if `strided`, so that a read outside shows."""
    if not strided:
        return value
    rows, columns = value.shape
    buffer = torch.full((rows * 2 + 3, columns + 5), float("nan"), dtype=value.dtype)
    return buffer[1 : 1 + 2 * rows : 2, 2 : 2 + columns].copy_(value)


class Given:
    """Operands of one call. Segment e has the scaling 0.5 + e / 4."""

    def __init__(self, segments, n, k, dtype=torch.float32, wide=None, strided=False, bias=True):
        draw = torch.Generator().manual_seed(0)

        def made(*shape, kind=dtype, scale=1.0):
            return view((torch.randn(*shape, generator=draw) * scale).to(kind), strided)

        wide = wide or dtype
        self.rows = [rows for rows, _ in segments]
        self.cuts = [0, *itertools.accumulate(self.rows)]
        m = self.cuts[-1]
        self.x, self.w, self.dy = made(m, k), made(n, k, scale=k**-0.5), made(m, n)
        self.a = [made(r, k, kind=wide, scale=k**-0.5) if r else None for _, r in segments]
        self.b = [made(n, r, kind=wide, scale=r**-0.5) if r else None for _, r in segments]
        self.bias = torch.randn(n, generator=draw).to(dtype) if bias else None
        self.scalings = [0.5 + e / 4 for e in range(len(segments))]

    def leaves(self):
        """x, then every A and B that is there, as leaves of their own, under the strides that they have."""
        return [t.detach().requires_grad_() for t in (self.x, *self.a, *self.b) if t is not None]

    def put(self, leaves):
        """(x, As, Bs) of `leaves`."""
        x, *rest = leaves
        rest = iter(rest)
        return (
            x,
            [None if t is None else next(rest) for t in self.a],
            [None if t is None else next(rest) for t in self.b],
        )

    def call(self, leaves, **options):
        x, a, b = self.put(leaves)
        return pf.lora_linear_grouped(x, self.w, a, b, self.cuts, self.scalings, bias=self.bias, **options)

    def by_segment(self, of, leaves):
        """The rows of of(x, A, B, e) for each segment, one after the other."""
        x, a, b = self.put(leaves)
        return torch.cat([of(part, a[e], b[e], e) for e, part in enumerate(x.split(self.rows))])

    def alone(self, leaves, ps=None, seeds=None):
        """lora_linear on each segment."""

        def one(x, a, b, e):
            if a is None:
                return torch.nn.functional.linear(x, self.w, self.bias)
            drop = {"dropout_p": ps[e], "seed": seeds[e]} if ps else {}
            return pf.lora_linear(x, self.w, a, b, scaling=self.scalings[e], bias=self.bias, **drop)

        return self.by_segment(one, leaves)

    def plain(self, leaves, ps=None, seeds=None):
        """What one writes without a library, in the operands' dtype."""

        def one(x, a, b, e):
            y = torch.nn.functional.linear(x, self.w, self.bias)
            if a is None:
                return y
            keep, q = self.keep(e, ps, seeds)
            x = x if keep is None else x * keep * q
            return y + (x @ a.to(x.dtype).T @ b.to(x.dtype).T) * self.scalings[e]

        return self.by_segment(one, leaves)

    def exact(self, leaves, ps=None, seeds=None):
        """The reference, in float64."""
        none = lambda width: torch.zeros(1, width, dtype=torch.float64)  # noqa: E731

        def one(x, a, b, e):
            a, b = (none(x.shape[1]), none(len(self.w)).T) if a is None else (a, b)
            return reference.lora_linear(x, self.w, a, b, self.scalings[e], self.bias, *self.keep(e, ps, seeds))

        return self.by_segment(one, leaves)

    def keep(self, e, ps, seeds):
        if not ps or not ps[e]:
            return None, 1.0
        return philox.keep_mask(seeds[e], self.rows[e], self.x.shape[1], ps[e]), philox.inverse_keep(ps[e])


def dense(leaves, dtype=None):
    return [t.detach().to(dtype or t.dtype, copy=True).contiguous().requires_grad_() for t in leaves]


def grads(y, leaves, dy):
    return torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_forward_and_gradients(case, dtypes, with_bias, drop, strided):
    o = Given(*case, *dtypes, strided=strided, bias=with_bias)
    ps, seeds = ([0.1 * (e % 4) for e in range(len(o.a))], [5 + e for e in range(len(o.a))]) if drop else (None, None)
    leaves = o.leaves()
    y = o.call(leaves, dropout_ps=ps, seeds=seeds)
    assert y.dtype == o.x.dtype and y.shape == o.dy.shape
    other, wide = dense(leaves), dense(leaves, torch.float64)
    same, exact = o.plain(other, ps, seeds), o.exact(wide, ps, seeds)
    assert_no_worse(y, same, exact.detach())
    ours, theirs, want = grads(y, leaves, o.dy), grads(same, other, o.dy.contiguous()), grads(exact, wide, o.dy)
    for leaf, one, two, three in zip(leaves, ours, theirs, want, strict=True):
        assert one.dtype == leaf.dtype
        assert_no_worse(one, two, three)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_segment_is_a_lora_linear(case, drop):
    """In float64, where nothing but the order of sums differs; the masks are the same."""
    o = Given(*case, torch.float64)
    ps, seeds = ([0.5] * len(o.a), [(1 << 64) - 3 - e for e in range(len(o.a))]) if drop else (None, None)
    leaves = o.leaves()
    y, want = o.call(leaves, dropout_ps=ps, seeds=seeds), o.alone(leaves, ps, seeds)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for one, two in zip(grads(y, leaves, o.dy), grads(want, leaves, o.dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_seeds_may_be_tensors():
    o = Given(*CASES[0])
    how = {"dropout_ps": [0.5, 0.0, 0.3]}
    one = o.call(o.leaves(), seeds=[3, None, 4], **how)
    two = o.call(o.leaves(), seeds=[torch.tensor(3), None, torch.tensor([4])], **how)
    assert torch.equal(one, two)


def test_a_seed_on_a_gpu_is_not_waited_for():
    """Meta stands for the GPU: reading a value there is an error."""
    seed = torch.empty((), dtype=torch.int64, device="meta")
    assert library_many._factors([2.0, 1.0], [0.5, 0.0], [seed, None]) == [(4.0, 0.5, seed), (1.0, 0.0, 0)]


def test_an_adapter_of_several_segments_gets_the_sum_of_its_gradients():
    x, w, dy = torch.randn(9, 6), torch.randn(5, 6), torch.randn(9, 5)
    a, b = (torch.randn(*shape, requires_grad=True) for shape in ((2, 6), (5, 2)))
    y = pf.lora_linear_grouped(x, w, [a, None, a], [b, None, b], [0, 4, 6, 9], [1.0, 0.0, 2.0])
    found = torch.autograd.grad(y, (a, b), dy)
    parts = []
    for rows, scaling in ((slice(0, 4), 1.0), (slice(6, 9), 2.0)):
        part = pf.lora_linear(x[rows], w, a, b, scaling=scaling)
        parts.append(torch.autograd.grad(part, (a, b), dy[rows]))
    for one, *rest in zip(found, *parts, strict=True):
        torch.testing.assert_close(one, sum(rest))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradient_subsets(needs):
    """Of x, of one A and of one B: the others, and other segments', cost nothing and get none."""
    o = Given(*CASES[0])
    whole = o.leaves()
    full = grads(o.call(whole), whole, o.dy)
    leaves = [t.detach() for t in whole]
    chosen = [i for i, need in zip((0, 2, 4), needs, strict=True) if need]  # x, A of segment 1, B of segment 0
    for i in chosen:
        leaves[i].requires_grad_()
    y = o.call(leaves)
    assert y.requires_grad == any(needs)
    if not chosen:
        return
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops:
        y.backward(o.dy)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in chosen)
        if i in chosen:
            torch.testing.assert_close(leaf.grad, full[i])
    n, k = o.w.shape
    want = 2 * n * k * 50 * needs[0] + 2 * 25 * 2 * k * needs[1] + 2 * 13 * 4 * n * needs[2]
    of_s = sum(2 * rows * r * n for e, (rows, r) in enumerate(CASES[0][0]) if needs[0] or (needs[1] and e == 1))
    want += of_s + needs[0] * sum(2 * rows * r * k for rows, r in CASES[0][0])
    assert flops.get_total_flops() == want


@pytest.mark.parametrize("drop", [False, True])
def test_gradcheck(drop):
    o = Given([(2, 2), (1, 0), (3, 1)], 4, 5, torch.float64)
    how = {"dropout_ps": [0.4, 0.0, 0.2], "seeds": [1, None, 2]} if drop else {}
    assert torch.autograd.gradcheck(lambda *leaves: o.call(leaves, **how), o.leaves())


def test_saves_x_and_s_alone():
    o = Given(*CASES[5])
    known = {t.untyped_storage().data_ptr() for t in (o.x, o.w, o.bias, *o.a, *o.b) if t is not None}
    new = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            new.append(tensor.numel())
        return tensor

    leaves = [t.detach().requires_grad_() for t in (o.x, *o.a, *o.b) if t is not None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        o.call(leaves, dropout_ps=[0.2] * 5, seeds=range(5))
    assert new == [33 * 16, 17 * 64, 20 * 16]


def test_inputs_are_never_written():
    o = Given(*CASES[5])
    tensors = [t for t in (o.x, o.w, o.bias, o.dy, *o.a, *o.b) if t is not None]
    copies = [t.clone() for t in tensors]
    leaves = [t.detach().requires_grad_() for t in (o.x, *o.a, *o.b) if t is not None]
    o.call(leaves, dropout_ps=[0.2] * 5, seeds=range(5)).backward(o.dy)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))


class Products(TorchDispatchMode):
    """The operands' shapes of each product, and those whose left operand has gaps between its rows."""

    def __init__(self):
        super().__init__()
        self.shapes, self.apart = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2][-2:]
        if "mm" in op.__name__:
            self.shapes.append(tuple(tuple(a.shape) for a in matrices))
            self.apart += [op.__name__] * (not any(m.is_contiguous() for m in (matrices[0], matrices[0].T)))
        return op(*args, **(kwargs or {}))


def test_the_frozen_weight_is_multiplied_once_by_all_rows():
    o = Given(*CASES[5])
    n, k = o.w.shape
    with Products() as found:
        y = o.call(o.leaves())
    assert found.shapes.count(((81, k), (k, n))) == 1 and sum((k, n) in pair for pair in found.shapes) == 1
    with Products() as found:
        y.backward(o.dy)
    assert found.shapes.count(((81, n), (n, k))) == 1 and sum((n, k) in pair for pair in found.shapes) == 1


def test_no_product_has_a_left_operand_whose_rows_lie_apart():
    """torch 2.13 gets these wrong in bfloat16 on some CPUs."""
    o = Given(*CASES[5])
    wide, x = torch.randn(81, 90), o.x
    for o.x, dy in ((wide[:, :65], wide[:, 40:80]), (x, torch.ones(()).expand(81, 40))):
        with Products() as found:
            o.call(o.leaves()).backward(dy)
        assert len(found.shapes) >= 3 * 6 + 2 and not found.apart


def test_leading_dimensions_and_a_stretched_gradient():
    o = Given([(4, 2), (8, 3)], 10, 8)
    x = o.x.view(2, 2, 3, 8).requires_grad_()
    y = pf.lora_linear_grouped(x, o.w, o.a, o.b, o.cuts, o.scalings)
    assert y.shape == (2, 2, 3, 10)
    y.sum().backward()
    o.bias = None
    leaves = o.leaves()
    want = grads(o.alone(leaves), leaves[:1], torch.ones(12, 10))[0]
    torch.testing.assert_close(x.grad.reshape(12, 8), want)
    one = pf.lora_linear_grouped(x[0, 0, 0].detach(), o.w, o.a[:1], o.b[:1], [0, 1], [1.0])
    assert one.shape == (10,)


def test_frozen_transposed_weight_view():
    o = Given(*CASES[0])
    turned = o.w.T.contiguous().T  # as GPT-2's Conv1D keeps it
    args = o.a, o.b, o.cuts, o.scalings
    torch.testing.assert_close(pf.lora_linear_grouped(o.x, turned, *args), pf.lora_linear_grouped(o.x, o.w, *args))


def test_codes_are_decoded_again_and_never_kept():
    o = Given([(5, 4), (3, 0), (6, 2)], 24, 64)
    codes = NF4(*torch_codes.encode_nf4(o.w), o.w.shape, torch.float32)
    whole = codes.new()
    found = []
    for weight in (codes, whole):
        leaves, kept = o.leaves(), []
        o.w = weight
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
            y = o.call(leaves)
        assert ((24, 64) in kept) == (weight is whole)
        found.append((y, *grads(y, leaves, o.dy)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_codes_take_the_dtype_of_x():
    o = Given([(5, 4), (6, 2)], 24, 64, torch.bfloat16, torch.float32, bias=False)
    o.w = NF4(*torch_codes.encode_nf4(o.w.float()), o.w.shape, torch.float32)
    assert o.call(o.leaves()).dtype == torch.bfloat16


def test_autocast():
    o = Given(*CASES[0])
    leaves = o.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        y = o.call(leaves)
        want = o.alone(leaves)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
    for leaf, one, two in zip(leaves, grads(y, leaves, o.dy), grads(want, leaves, o.dy), strict=True):
        assert one.dtype == leaf.dtype == torch.float32
        assert (one - two).norm() < 0.02 * two.norm()


def test_copies_of_the_adapters_in_the_dtype_of_x_are_used():
    o = Given(*CASES[5], torch.bfloat16, torch.float32)
    low = [None if a is None else (a.bfloat16(), b.bfloat16()) for a, b in zip(o.a, o.b, strict=True)]
    found = []
    for given in (None, low):
        leaves = o.leaves()
        y = o.call(leaves, low=given)
        found.append((y, *grads(y, leaves, o.dy)))
    assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(*found, strict=True))
    zeros = [None if pair is None else tuple(torch.zeros_like(t) for t in pair) for pair in low]
    leaves = o.leaves()
    y = o.call(leaves, low=zeros)
    torch.testing.assert_close(y, torch.nn.functional.linear(o.x, o.w, o.bias))
    assert not any(gradient.any() for gradient in grads(y, leaves[1:], o.dy))
    wide = [None if a is None else (torch.zeros_like(a), torch.zeros_like(b)) for a, b in zip(o.a, o.b, strict=True)]
    assert torch.equal(o.call(o.leaves(), low=wide), found[0][0])  # float32 copies aren't taken


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("shape", [CASES[1], CASES[5]], ids=str)
def test_compiled_it_is_the_eager_one(shape, drop):
    torch._dynamo.reset()
    o = Given(*shape)
    count = len(o.a)
    how = {"dropout_ps": [0.3] * count, "seeds": [7 + e for e in range(count)]} if drop else {}
    found = []
    for call in (o.call, torch.compile(o.call, fullgraph=True, backend="aot_eager")):
        leaves = o.leaves()
        y = call(leaves, **how)
        found.append((y, *grads(y, leaves, o.dy)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", ["auto", "torch", "fused"])
@pytest.mark.parametrize("drop", [False, True])
def test_shapes_on_the_meta_device(backend, drop):
    o = Given(*CASES[1], bias=False)
    o.w = o.w.to("meta")
    leaves = [t.detach().to("meta").requires_grad_() for t in o.leaves()]
    y = o.call(leaves, backend=backend, **({"dropout_ps": [0.3] * 6, "seeds": range(6)} if drop else {}))
    y.sum().backward()
    assert y.is_meta and y.shape == o.dy.shape
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]


def test_flops_of_the_operation_are_those_of_its_products():
    o = Given(*CASES[5])
    lists = o.a, o.b
    how = o.cuts, o.scalings, [], [], "torch"
    ops = torch.ops.plopfast
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counted:
        _, s = ops.many_forward(o.x, o.w, *lists, None, *how)
        ops.many_backward(o.dy, o.x, s, o.w, *lists, *how, True, [True] * 5, [True, False, True, True, False])
    way = library_many.way_of(o.x, o.w, o.a, *how[:4], "torch")
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as made:
        _, s = torch_many.forward(o.x, o.w, *lists, None, way)
        needed = [True] * 5, [True, False, True, True, False]
        torch_many.backward(o.dy, o.x, s, o.w, *lists, way, True, *needed, library_many.dtypes_of(*lists))
    assert counted.get_total_flops() == made.get_total_flops()


def test_gradients_come_in_the_dtypes_that_were_asked_for():
    """Without autograd, which casts what it is given."""
    o = Given([(9, 4), (0, 2), (7, 3)], 6, 8, torch.bfloat16)
    way = library_many.way_of(o.x, o.w, o.a, o.cuts, o.scalings, (), (), "torch")
    _, s = library_many.forward(o.x, o.w, o.a, o.b, None, way)
    wide, low, every = torch.float32, torch.bfloat16, [True] * 3
    asked = [(wide, low), (wide, low), (low, wide)]
    _, da, db = library_many.backward(o.dy, o.x, s, o.w, o.a, o.b, way, True, every, every, asked)
    assert [(one.dtype, other.dtype) for one, other in zip(da, db, strict=True)] == asked


A, B = torch.randn(3, 8), torch.randn(10, 3)
GOOD = {
    "x": torch.randn(2, 2, 8),
    "weight": torch.randn(10, 8),
    "lora_As": [A, None, A],
    "lora_Bs": [B, None, B],
    "cuts": [0, 2, 2, 4],
    "scalings": [1.0, 0.0, 2.0],
}
BAD = {
    "lora_As: expected 3 entries": {"lora_As": [A, A]},
    "lora_Bs: expected 3 entries": {"lora_Bs": [B] * 4},
    "scalings: expected 3 entries.*got 1": {"scalings": [1.0]},
    "dropout_ps: expected 3 entries": {"dropout_ps": [0.5]},
    "seeds: expected 3 entries": {"dropout_ps": [0.5] * 3, "seeds": [1]},
    "low: expected 3 entries": {"low": [(A, B)]},
    "cuts: expected 0 first and 4 last.*got .1, 2, 2, 4": {"cuts": [1, 2, 2, 4]},
    "cuts: expected 0 first and 4 last.*got .0, 2, 2, 5": {"cuts": [0, 2, 2, 5]},
    "cuts: expected 0 first and 4 last.*got .0, 2, 2, 3": {"cuts": [0, 2, 2, 3]},
    "cuts: segment 1 ends at row 1, before its start at 2": {"cuts": [0, 2, 1, 4]},
    "cuts.1.: expected an int, got 2.0 of type float": {"cuts": [0, 2.0, 2, 4]},
    "on the host, got a tensor; cuts.tolist": {"cuts": torch.tensor([0, 2, 2, 4])},
    "segment 1: expected a tensor in both.*got one in lora_As and None in lora_Bs": {"lora_As": [A, A, A]},
    "segment 2: expected a tensor in both.*got one in lora_Bs and None in lora_As": {"lora_As": [A, None, None]},
    "segment 2: lora_A: expected .rank, 8., got .8, 3.: transposed?": {"lora_As": [A, None, A.T]},
    "segment 0: lora_B: expected .10, 3., got .9, 3.": {"lora_Bs": [torch.randn(9, 3), None, B]},
    "segment 2: lora_A: expected float32 or x's dtype": {"lora_As": [A, None, A.half()]},
    "segment 0: lora_A is on meta, x on cpu": {"lora_As": [A.to("meta"), None, A]},
    "segment 2: scaling: expected a finite number, got inf": {"scalings": [1.0, 0.0, float("inf")]},
    "segment 0: dropout_p: expected 0 <= p < 1, got 1.0": {"dropout_ps": [1.0, 0.0, 0.0], "seeds": [1, 2, 3]},
    "segment 2: dropout_p > 0 needs a seed": {"dropout_ps": [0.0, 0.0, 0.5], "seeds": [1, 2, None]},
    "segment 0: dropout_p > 0 needs a seed": {"dropout_ps": [0.1, 0.0, 0.5]},
    "segment 0: seed: expected a 64-bit integer": {"dropout_ps": [0.5] * 3, "seeds": [1 << 64, 1, 1]},
    "^lora_linear: expected x .*, got x .2, 2, 7. and weight": {"x": torch.randn(2, 2, 7)},
    "^weight requires a gradient": {"weight": torch.randn(10, 8, requires_grad=True)},
    "^weight is torch.float64": {"weight": torch.randn(10, 8).double(), "lora_As": [None] * 3, "lora_Bs": [None] * 3},
    "^bias: expected .10., got .3.": {"bias": torch.randn(3)},
    "expected x .*, got x .*; pass x.view": {"x": torch.randn(())},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    given = GOOD | BAD[message]
    with pytest.raises(ValueError, match=message):
        pf.lora_linear_grouped(**given)


def test_what_is_not_used_is_not_asked_for():
    """A segment without an adapter needs no seed; without rows there is nothing to cut."""
    y = pf.lora_linear_grouped(**GOOD, dropout_ps=[0.0, 0.9, 0.0])
    assert torch.equal(y, pf.lora_linear_grouped(**GOOD))
    none = pf.lora_linear_grouped(torch.randn(0, 8), GOOD["weight"], [], [], [0], [])
    assert none.shape == (0, 10)


@pytest.mark.parametrize("backend", ["triton", "fused", "lora-first", "tritn"])
def test_a_backend_that_cannot_run_is_an_error(backend):
    with pytest.raises(pf.BackendError, match=r"cannot run on cpu|expected one of"):
        pf.lora_linear_grouped(**GOOD, backend=backend)
