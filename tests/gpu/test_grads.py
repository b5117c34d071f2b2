"""lora_grads: dB = dY^T S with dS = c dY B from one read of dY, and dA = dS^T drop(X)."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import BF16, DEVICE, FAR, FP16, FP32, far, keep_of, name_of, normal, operands, product

from plopfast.kernels import dispatch, triton_ops
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.kernels.grids import grads_grid, grads_tiles

C, SEED = 1.7, 0x8765_4321_0FED

# M, columns, R, dtype of activations, of adapters; layouts of the large operand, of B; p; units of the GPU
CASES = [
    (1, 1, 1, FP32, FP32, "dense", "dense", 0.0, 4),
    (63, 30, 5, FP32, FP32, "odd", "sparse", 0.3, 4),
    (100, 24, 16, BF16, FP32, "aligned", "odd", 0.2, 12),
    (50, 123, 3, BF16, BF16, "sparse", "columns", 0.0, 4),
    (97, 100, 16, FP16, FP32, "odd", "odd", 0.5, 32),
    (33, 70, 64, FP16, FP16, "columns", "odd", 0.4, 16),
    (40, 40, 256, BF16, FP32, "odd", "odd", 0.1, 16),
    (130, 33, 1, FP32, FP32, "columns", "columns", 0.6, 24),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", [case for case in CASES if case[2] <= dispatch.MOST_DS_RANK], ids=name_of)
def test_grad_s_and_b(case, seed, watched, units):
    m, n, r, dtype, wide, layout, b_layout, _, count = case
    units(count)
    dy = normal(m, n, dtype=dtype, seed=1, layout=layout)
    s = normal(m, r, dtype=dtype, seed=2, layout="odd")
    b = normal(n, r, dtype=wide, scale=n**-0.5, seed=3, layout=b_layout)
    with watched("g", "ds", "out", "other_out", seed=seed):
        ds, db = triton_ops.grad_s_and_b(dy, s, b, C)
    assert_no_worse(ds, product(dy, b.to(dtype)) * C, dy.double() @ b.double() * C)
    assert db.dtype == wide and db.shape == b.shape and ds.dtype == dtype
    assert_no_worse(db, product(dy.T, s).to(wide), dy.double().T @ s.double())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_grad_a(case, seed, watched, units):
    m, k, r, dtype, wide, layout, _, p, count = case
    units(count)
    x = normal(m, k, dtype=dtype, seed=1, layout=layout)
    ds = normal(m, r, dtype=dtype, seed=2, layout="odd")
    keep, _ = keep_of(p, SEED, m, k)
    with watched("g", "out", seed=seed):
        da = triton_ops.grad_a(ds, x, p, SEED, wide)
    dropped = x if keep is None else x * keep
    assert da.dtype == wide and da.shape == (r, k)
    assert_no_worse(da, product(ds.T, dropped).to(wide), ds.double().T @ dropped.double())


def test_gradients_of_float32_adapters_are_not_rounded_on_the_way(watched):
    """Of 16-bit activations too: float32 gradients are as exact as float32 sums."""
    dy, s = normal(70, 20, dtype=BF16, seed=1), normal(70, 4, dtype=BF16, seed=2)
    b = normal(20, 4, seed=3)
    with watched("g", "ds", "out", "other_out"):
        db = triton_ops.grad_s_and_b(dy, s, b, C)[1]
        da = triton_ops.grad_a(s, dy, 0.0, SEED, FP32)
    exact = dy.double().T @ s.double()
    assert (db - exact).norm() < 1e-6 * exact.norm() and (da.T - exact).norm() < 1e-6 * exact.norm()


# M, columns, units: all kinds of grids, with one and with several parts and stripes
PARTS = [
    (16, 32, 4), (9, 45, 4), (40, 70, 8), (20, 130, 4), (33, 257, 8), (40, 32, 8), (40, 33, 8), (97, 70, 32),
    (40, 70, 16), (12, 100, 1),
]  # fmt: skip


@pytest.mark.parametrize("m, columns, count", PARTS)
def test_parts_and_stripes(m, columns, count, watched, units):
    """However a sum is split, it is read once, its parts are float32, and the result is the same."""
    units(count)
    dy, s = normal(m, columns, dtype=BF16, seed=1), normal(m, 8, dtype=BF16, seed=2)
    b = normal(columns, 8, dtype=BF16, scale=columns**-0.5, seed=3)
    parts, stripes = grads_grid(dispatch.target_of(DEVICE), BF16, m, columns, 8, True)[-2:]
    with watched("g", "ds", "out", "other_out") as check:
        ds, db = triton_ops.grad_s_and_b(dy, s, b, C)
    if check:
        first = check.launches[0]
        assert first.kernel == "lora_grads" and first.grid == (stripes, parts, 1)
        sums = [[], ["sum_partials"], ["sum_both"]][(parts > 1) + (stripes > 1)]
        assert [launch.kernel for launch in check.launches[1:]] == sums
        assert first.args["t"].load.bytes == first.args["t"].load.launch_bytes == dy.numel() * 2
        for name, number, whole in (("g", parts, db), ("ds", stripes, ds)):
            assert first.args[name].store.launch_bytes == number * whole.numel() * (4 if number > 1 else 2)
    assert_no_worse(db, product(dy.T, s), dy.double().T @ s.double())
    assert_no_worse(ds, product(dy, b) * C, dy.double() @ b.double() * C)


def test_the_interpreter_sees_every_kind_of_grid():
    target = dispatch.Target("interpreter", 4)
    grids = [grads_grid(replace(target, units=u), BF16, m, c, 8, True) for m, c, u in PARTS]
    kinds = {(parts > 1, stripes > 1) for *_, parts, stripes in grids}
    assert kinds == set(itertools.product((False, True), (False, True)))


@pytest.mark.parametrize("name, units", [("sm_80", 108), ("sm_86", 84), ("sm_90", 132), ("gfx942", 304), ("sm_999", 7)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize("with_ds", [False, True])
def test_grids_of_gpus(name, units, dtype, with_ds):
    """Parts cover the rows and stripes the columns, none is empty, accumulators fit, and most SMs have work."""
    target = dispatch.Target(name, units)
    for m in (1, 63, 64, 65, 1000, 8192, 8193, 100_000):
        for columns in (1, 64, 576, 4096, 4099, 14336):
            for rank in (1, 8, 32) if with_ds else (1, 8, 64, 256):
                bm, bc, warps, parts, stripes = grads_grid(target, dtype, m, columns, rank, with_ds, not with_ds)
                assert (bm, bc, warps) in grads_tiles(target, dtype, rank, with_ds)
                blocks = -(-m // bm)
                chunk = -(-blocks // parts)
                assert (parts - 1) * chunk < blocks <= parts * chunk
                assert (stripes - 1) * bc < columns <= stripes * bc
                assert bc * max(16, rank) <= 16384 and bc & (bc - 1) == 0 and bm & (bm - 1) == 0
                assert stripes * parts <= max(4 * units, stripes)
                if m * columns >= 8192 * 4096:
                    assert stripes * parts >= 0.75 * units, (m, columns, rank, bm, bc, parts, stripes)


@pytest.mark.parametrize("m, columns", [(0, 40), (5, 0), (0, 0)])
def test_empty(m, columns, watched):
    """Sums over nothing are zeros, not what the memory held."""
    o = operands(m, columns, columns, 4, BF16, FP32)
    ds = normal(m, 4, dtype=BF16)
    with watched("g", "ds", "out", "other_out"):
        found_s, db = triton_ops.grad_s_and_b(o.dy, o.s, o.b, C)
        da = triton_ops.grad_a(ds, o.x, 0.5, SEED, FP32)
    assert found_s.shape == (m, 4) and found_s.dtype == BF16 and db.shape == (columns, 4)
    assert da.shape == (4, columns)
    assert all(t.eq(0).all() for t in (found_s, db, da))


@pytest.mark.parametrize("count", [4, 32])
def test_the_order_of_programs_changes_no_bit(count, watched, units):
    """Sums that are split are added up in a fixed order; atomics would give other bits from run to run."""
    units(count)
    columns = {4: 30, 32: 100}[count]
    o = operands(50, columns, columns, 16, BF16, FP32, layout="odd")
    found = []
    for seed in (5, 6):
        with watched("g", "ds", "out", seed=seed):
            found.append((*triton_ops.grad_s_and_b(o.dy, o.s, o.b, C), triton_ops.grad_a(o.s, o.x, 0.3, SEED, FP32)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_int32_offsets_do_not_overflow_beyond_2_31_elements(p, watched):
    t, v = normal(5, 48, dtype=BF16, seed=1), normal(5, 4, dtype=BF16, seed=2)
    b = normal(48, 4, scale=0.2, seed=3)
    far_t, far_v = far(t, FAR), far(v, FAR)
    keep, _ = keep_of(p, SEED, 5, 48)
    with watched("g", "ds", "out", "other_out"):
        ds, db = triton_ops.grad_s_and_b(far_t, far_v, b, C)
        da = triton_ops.grad_a(far_v, far_t, p, SEED, FP32)
    dropped = t if keep is None else t * keep
    assert_no_worse(ds, product(t, b.to(BF16)) * C, t.double() @ b.double() * C)
    assert_no_worse(db, product(t.T, v).float(), t.double().T @ v.double())
    assert_no_worse(da, product(v.T, dropped).float(), v.double().T @ dropped.double())
