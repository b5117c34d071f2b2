"""segment_shrink, segment_gemm and segment_grads: rows sorted into segments, each with a weight and an adapter of its own."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, name_of, normal, view

from plopfast.kernels import dispatch, library_segments, reference, torch_codes, triton_segments
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.kernels.codes import NF4, Stack

C = 1.7
OUT = "segment_shrink.s", "segment_gemm.y", "segment_grads.g", "segment_grads.ds", "out", "other_out"
# rows of each segment, N, K, R, dtype of activations, of adapters, layout of X, dY, W, A and B, units of the GPU
CASES = [
    ((1,), 1, 1, 1, FP32, FP32, "dense", 4),
    ((3, 0, 40, 1), 33, 47, 5, FP32, FP32, "odd", 4),
    ((0, 70, 0, 0, 33, 0), 40, 64, 16, BF16, FP32, "aligned", 4),
    ((16, 16, 32), 64, 32, 3, BF16, BF16, "columns", 64),
    ((0, 0, 130), 100, 70, 16, FP16, FP32, "odd", 64),
    ((97, 5), 30, 530, 8, BF16, FP32, "sparse", 64),
    ((20, 31), 70, 24, 64, FP16, FP16, "odd", 16),
    ((9, 0, 30), 24, 40, 256, BF16, FP32, "aligned", 4),
]


def stacked(count, *shape, layout="dense", **options):
    """Matrices one behind the other in one buffer of NaN, all of the same layout."""
    each = [normal(*shape, layout=layout, **options | {"seed": options["seed"] + 100 * e}) for e in range(count)]
    room = max(sum((size - 1) * step for size, step in zip(one.shape, one.stride(), strict=True)) + 1 for one in each)
    buffer = each[0].new_full((count, -(-room // 16) * 16), float("nan"))
    whole = buffer.as_strided((count, *shape), (buffer.stride(0), *each[0].stride()))
    for one, there in zip(each, whole, strict=True):
        there.copy_(one)
    return whole


def operands(rows, n, k, r, dtype, wide, layout="dense"):
    e, m = len(rows), sum(rows)
    found = {
        "x": normal(m, k, dtype=dtype, seed=1, layout=layout),
        "w": stacked(e, n, k, dtype=dtype, scale=k**-0.5, seed=2, layout=layout),
        "a": stacked(e, r, k, dtype=wide, scale=k**-0.5, seed=3, layout=layout),
        "b": stacked(e, n, r, dtype=wide, scale=r**-0.5, seed=4, layout=layout),
        "ends": torch.tensor(rows).cumsum(0).int().to(DEVICE),
    }
    return found, normal(m, n, dtype=dtype, scale=n**-0.5, seed=5, layout=layout)


def forward(o):
    return triton_segments.forward(*o.values(), C)


def backward(o, dy, s, needs):
    x, w, a, b, ends = o.values()
    return triton_segments.backward(dy, x, s, w, a, b, ends, C, needs)


def plain(x, w, a, b, ends, c):
    """The same in torch, in the operands' dtype."""
    parts = torch.tensor_split(x, ends[:-1].tolist())
    low = [(part @ a[e].to(x.dtype).T) * c for e, part in enumerate(parts)]
    return torch.cat([p @ w[e].T + s @ b[e].to(x.dtype).T for e, (p, s) in enumerate(zip(parts, low, strict=True))])


def gradients(of, x, w, a, b, ends, c, dy):
    """(Y, dX, dA, dB) by autograd, of dense operands: torch's 16-bit products on the CPU take no others."""
    leaves = [t.contiguous().requires_grad_() for t in (x, a, b)]
    y = of(leaves[0], w.contiguous(), leaves[1], leaves[2], ends, c)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def exact(x, w, a, b, ends, c, dy):
    return gradients(
        lambda x, w, a, b, ends, c: reference.segments(x, w, a, b, ends.tolist(), c),
        x.double(), w.double(), a.double(), b.double(), ends, c, dy.double(),
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_float64(case, seed, watched, units):
    units(case[-1])
    o, dy = operands(*case[:7])
    with watched(*OUT, seed=seed):
        y, s = forward(o)
        dx, da, db = backward(o, dy, s, (True,) * 3)
    assert s.dtype == y.dtype == dx.dtype == case[4] and da.dtype == db.dtype == case[5]
    for got, theirs, of in zip((y, dx, da, db), gradients(plain, **o, c=C, dy=dy), exact(**o, c=C, dy=dy), strict=True):
        assert_no_worse(got, theirs, of)
    for e, rows in enumerate(case[0]):
        assert rows or not (da[e].any() or db[e].any())
    with watched(*OUT):
        bare = triton_segments.product(o["x"], o["w"], o["ends"])
    without = o | {"b": torch.zeros_like(o["b"])}
    assert_no_worse(bare, gradients(plain, **without, c=C, dy=dy)[0], exact(**without, c=C, dy=dy)[0])


def test_the_cases_see_every_kind_of_sum(units):
    """Of S, dS and dB in one part and in several."""
    found = set()
    for rows, n, k, r, dtype, _, _, count in CASES:
        target = replace(dispatch.Target("interpreter", 4), units=count)
        *_, parts, stripes = triton_segments.grads_grid(target, dtype, sum(rows), n, r, True, segments=len(rows))
        found |= {("dB", parts > 1), ("dS", stripes > 1)}
        found |= {("S", triton_segments.shrink_grid(target, dtype, sum(rows), k, 16, False)[3] > 1)}
    assert found == set(itertools.product(("S", "dS", "dB"), (False, True)))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=name_of)
def test_gradient_subsets(needs, watched, launched):
    """What is not needed is empty and launches nothing; what is needed has the bits it has together with the others."""
    o, dy = operands((9, 0, 30), 24, 40, 8, BF16, FP32)
    with watched():
        s = triton_segments.shrink(o["x"], o["a"], o["ends"], C)
        whole = backward(o, dy, s, (True,) * 3)
        launched.clear()
        found = backward(o, dy, s, needs)
    for need, one, of in zip(needs, found, whole, strict=True):
        assert_no_worse(one, of, of.double()) if need else None
        assert one.numel() == (of.numel() if need else 0)
    assert launched.count("segment_gemm") == needs[0]
    assert launched.count("segment_shrink") == ((needs[0] or needs[1]) and not needs[2])
    assert launched.count("segment_grads") == needs[1] + needs[2]


@pytest.mark.parametrize("rank, apart", [(dispatch.MOST_DS_RANK, 0), (dispatch.MOST_DS_RANK + 1, 1)])
def test_a_large_rank_takes_ds_by_itself(rank, apart, watched, launched):
    """Together with dB it would spill."""
    o, dy = operands((9, 0, 30), 24, 40, rank, BF16, FP32)
    with watched():
        s = forward(o)[1]
        launched.clear()
        backward(o, dy, s, (True, True, True))
    assert launched.count("segment_shrink") == apart


def test_rows_of_other_segments_do_not_count(watched):
    """NaN in one segment's rows and weights stays there."""
    rows = (5, 20, 0, 7)
    o, dy = operands(rows, 40, 36, 4, BF16, FP32)
    bad = slice(5, 25)
    with watched(*OUT):
        clean = forward(o)
    for tensor, where in (("x", bad), ("w", 1), ("a", 1), ("b", 1), ("w", 2), ("a", 2), ("b", 2)):
        o[tensor][where] = float("nan")
    dy[bad] = float("nan")
    with watched(*OUT):
        y, s = forward(o)
        dx, da, db = backward(o, dy, s, (True,) * 3)
    for rows_of in (slice(0, 5), slice(25, 32)):
        assert torch.equal(y[rows_of], clean[0][rows_of]) and torch.equal(s[rows_of], clean[1][rows_of])
        assert dx[rows_of].isfinite().all()
    for gradient in (da, db):
        assert gradient[[0, 2, 3]].isfinite().all() and gradient[1].isnan().all() and not gradient[2].any()


@pytest.mark.parametrize("rows, n, k", [((0, 0), 8, 8), ((3, 2), 0, 8), ((), 8, 8)], ids=name_of)
def test_empty(rows, n, k, watched):
    o, dy = operands(rows, n, k, 4, BF16, FP32) if n and rows else bare_operands(rows, n, k)
    with watched(*OUT):
        y, s = forward(o)
        dx, da, db = backward(o, dy, s, (True,) * 3)
    assert y.shape == dy.shape and dx.shape == o["x"].shape and s.shape == (sum(rows), 4)
    assert da.shape == o["a"].shape and db.shape == o["b"].shape and not da.any() and not db.any() and not dx.any()


def bare_operands(rows, n, k):
    e, m, ends = len(rows), sum(rows), torch.tensor(rows, dtype=torch.int64).cumsum(0).int().to(DEVICE)
    made = lambda *shape, dtype=BF16: torch.ones(shape, dtype=dtype, device=DEVICE)  # noqa: E731
    return {"x": made(m, k), "w": made(e, n, k), "a": made(e, 4, k, dtype=FP32), "b": made(e, n, 4, dtype=FP32),
            "ends": ends}, made(m, n)  # fmt: skip


@pytest.mark.parametrize("count", [4, 64])
def test_the_order_of_programs_changes_no_bit(count, watched, units):
    units(count)
    o, dy = operands((50, 0, 23), 70, 60, 16, BF16, FP32, "odd")
    found = []
    for seed in (5, 6):
        with watched(*OUT, seed=seed):
            y, s = forward(o)
            grads = backward(o, dy, s, (True,) * 3)
        found.append((y, s, *grads))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("most", [1, 16, 17, 200])
def test_any_split_of_the_rows_is_covered(most, watched):
    """Segments of random sizes, many of them empty: each row gets its own weight, once."""
    draw = torch.Generator().manual_seed(most)
    for _ in range(6):
        count = int(torch.randint(1, 40, (), generator=draw))
        rows = torch.randint(0, most + 1, (count,), generator=draw) * torch.randint(0, 2, (count,), generator=draw)
        ends = rows.cumsum(0).int().to(DEVICE)
        number = torch.arange(count).repeat_interleave(rows).to(DEVICE)
        w = torch.arange(count, dtype=FP32, device=DEVICE).view(-1, 1, 1)
        x = torch.ones(int(rows.sum()), 1, device=DEVICE)
        with watched(*OUT):
            y, s = triton_segments.product(x, w, ends), triton_segments.shrink(x, w, ends, 1.0)
            g = triton_segments.grads(x, x, ends, FP32)[0]
        assert torch.equal(y[:, 0], number.float()) and torch.equal(s, y)
        assert torch.equal(g.flatten(), rows.float().to(DEVICE))


def test_gradients_of_float32_adapters_are_not_rounded_on_the_way(watched):
    o, dy = operands((40, 30), 20, 24, 4, BF16, FP32)
    with watched(*OUT):
        s = triton_segments.shrink(o["x"], o["a"], o["ends"], C)
        db = backward(o, dy, s, (False, False, True))[2]
    want = torch.stack([dy[rows].double().T @ s[rows].double() for rows in (slice(0, 40), slice(40, 70))])
    assert (db - want).norm() < 1e-6 * want.norm()


def test_the_operations_take_the_kernels(launched, watched):
    """With "triton", and with "auto" where no interpreter stands for a GPU; plain torch else."""
    o, dy = operands((9, 0, 30), 24, 40, 8, BF16, FP32)
    ops = torch.ops.plopfast
    for backend, taken in (("triton", True), ("torch", False), ("auto", not dispatch.interpreting())):
        launched.clear()
        with watched():
            _, s = ops.segment_forward(o["x"], o["w"], o["a"], o["b"], o["ends"], C, backend)
            ops.segment_backward(dy, o["x"], s, o["w"], o["a"], o["b"], o["ends"], C, backend, True, True, True)
            ops.segment_product(o["x"], o["w"], o["ends"], backend)
        kernels = [name for name in launched if not name.startswith(("torch.", "sum_"))]
        wanted = ["segment_shrink", "segment_gemm", "segment_grads", "segment_grads", "segment_gemm", "segment_gemm"]
        assert kernels == (wanted if taken else [])
        assert not taken or not any(name.startswith("torch.") for name in launched)


def test_what_the_kernels_do_not_take_is_torchs_or_an_error(monkeypatch):
    monkeypatch.setattr(dispatch, "resolve", lambda device, backend="auto": "torch" if backend == "torch" else "triton")
    x = normal(4, 8)
    assert library_segments.runs_kernels(x, 4, "auto")
    assert not library_segments.runs_kernels(x.double(), 4, "auto")
    assert not library_segments.runs_kernels(x, dispatch.MAX_RANK + 1, "auto")
    assert not library_segments.runs_kernels(x, dispatch.MAX_RANK + 1, "torch")
    assert library_segments.runs_kernels(x, dispatch.MAX_RANK, "triton")
    for wrong, rank in ((x, dispatch.MAX_RANK + 1), (x.double(), 4)):
        with pytest.raises(dispatch.UnsupportedError, match="rank 257|float64"):
            library_segments.runs_kernels(wrong, rank, "triton")


def test_few_rows_take_small_tiles_and_many_large_ones():
    for name in dispatch.GEMM_TILES.keys() - {"interpreter"}:
        target = dispatch.Target(name, 100)
        small, large = (dispatch.segment_tiles(target, BF16, rows) for rows in (127, 128))
        assert (small.bm, large.bm) == (64, 128) and not small.descriptor and not large.descriptor
        assert dispatch.segment_tiles(target, FP32, 1000) == dispatch.FLOAT32_TILES
    assert dispatch.segment_tiles(dispatch.Target("sm_999", 7), BF16, 1000) == dispatch.SAFE_TILES[0]


def test_views_of_one_tensor_are_taken(watched):
    """GPT-OSS lays weights out as [E, K, N], and dX takes W and A transposed."""
    o, _ = operands((9, 4), 24, 40, 8, BF16, FP32)
    turned = o | {"w": o["w"].transpose(1, 2).contiguous().transpose(1, 2), "x": view(o["x"], "columns")}
    with watched(*OUT):
        one, two = (forward(of)[0] for of in (o, turned))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("turned", [False, True])
def test_codes_are_decoded_for_the_kernels(turned, watched, launched):
    """All of them into the workspace, and again for dX; plain torch decodes one at a time, and finds the same."""
    o, dy = operands((9, 0, 30), 24, 48 if turned else 64, 8, FP32, FP32)
    x, w, a, b, ends = o.values()
    packed, absmax = torch_codes.encode_nf4(w.reshape(-1, w.shape[2]))
    stack = Stack(NF4(packed, absmax, (w.shape[0] * w.shape[1], w.shape[2]), FP32), len(w))
    dense = stack.dense().clone()
    assert all(torch.equal(one, two) for one, two in zip(stack, dense, strict=True)) and stack.shape == dense.shape
    if turned:
        stack, dense, x, a = stack.transpose(1, 2), dense.transpose(1, 2), dy, b.transpose(1, 2).contiguous()
        b, dy = a.new_ones(len(w), 48, 8), normal(39, 48, seed=9)
    for backend in ("triton", "torch"):
        with watched():
            y, s = library_segments.run("segment_forward", x, stack, a, b, ends, C, backend)
            grads = library_segments.run("segment_backward", dy, x, s, stack, a, b, ends, C, backend, True, True, True)
            y2, s2 = torch.ops.plopfast.segment_forward(x, dense, a, b, ends, C, backend)
            grads2 = torch.ops.plopfast.segment_backward(dy, x, s, dense, a, b, ends, C, backend, True, True, True)
        for one, two in zip((y, s, *grads), (y2, s2, *grads2), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert launched.count("segment_gemm") == 4
