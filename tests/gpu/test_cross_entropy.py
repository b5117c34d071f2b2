"""Cross-entropy with its gradient in place: triton_rows.cross_entropy and its twin against reference.py."""

import contextlib

import pytest
import torch
from cases import BF16, DEVICE, FAR, FP16, FP32, far, name_of, normal

from plopfast.kernels import library_rows, reference, torch_rows, triton_rows
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.models import cross_entropy
from plopfast.models.cross_entropy import chunked_cross_entropy

# n, V, dtype, layout; dtype of the bias, multiplier, cap
CASES = [
    (1, 1, FP32, "odd", None, 1.0, None),
    (5, 300, FP32, "dense", FP32, 1.0, None),
    (3, 1001, BF16, "odd", None, 1.0, None),
    (4, 512, FP16, "aligned", BF16, 0.25, None),
    (3, 700, BF16, "aligned", FP32, 1.0, 3.0),
    (2, 1500, FP32, "odd", BF16, 1.7, 5.0),
    (3, 768, FP16, "dense", None, 0.5, 30.0),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(triton_rows, "BLOCK", 256)


def operands(n, v, dtype, layout, bias, scale=3.0):
    z = normal(n, v, dtype=dtype, scale=scale, seed=1, layout=layout)
    targets = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return z, targets, None if bias is None else normal(v, dtype=bias, seed=3, layout="odd")


def exact_of(z, targets, bias, multiplier, cap):
    leaf = z.double().requires_grad_()
    losses = reference.cross_entropy(leaf, targets, bias, multiplier, cap)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_float64(case, seed, watched):
    *shape, bias, multiplier, cap = case
    z, targets, bias = operands(*shape, bias)
    options, before = {"multiplier": multiplier, "cap": cap}, z.clone()
    with watched("losses", seed=seed):
        alone = triton_rows.cross_entropy(z, targets, bias, gradient=False, **options)
    assert torch.equal(z, before), "without gradient the logits stay"
    plain, plain_dz = torch_rows.cross_entropy(z.clone(), targets, bias, **options)
    exact, exact_dz = exact_of(z, targets, bias, multiplier, cap)
    with watched("losses", seed=seed) as check:
        losses = triton_rows.cross_entropy(z, targets, bias, **options)
    assert losses.dtype == FP32 and torch.equal(losses, alone)
    assert_no_worse(losses, plain, exact)
    assert_no_worse(plain, exact.float(), exact)
    assert_no_worse(z, plain_dz.to(z.dtype), exact_dz)
    assert_no_worse(plain_dz, exact_dz.float(), exact_dz)
    if check:
        assert len(check.launches) == 1
        size, counts = before.numel() * before.element_size(), check.counts()
        target = len(before) * before.element_size()
        assert (counts["z"].load.bytes, counts["z"].store.bytes) == (2 * size + target, size)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_twin_reads_the_loss_alone(cap):
    z, targets, _ = operands(4, 50, FP32, "dense", None)
    both, alone = (torch_rows.cross_entropy(z.clone(), targets, cap=cap, gradient=g)[0] for g in (True, False))
    assert torch.equal(both, alone)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("shift", [-3e4, 0.0, 3e4])
def test_large_logits(shift, cap, dtype, watched):
    """One far above the others, and all of them far from 0: no exponential overflows, and none of them is 0 / 0."""
    z, targets, _ = operands(3, 600, dtype, "dense", None)
    z += shift
    z[0, 599], z[1, 0], z[2, 300] = shift + 400, shift + 400, shift - 400
    targets[0], targets[2] = 599, 300
    exact, exact_dz = exact_of(z, targets, None, 1.0, cap)
    plain, plain_dz = torch_rows.cross_entropy(z.clone(), targets, cap=cap)
    with watched("losses"):
        losses = triton_rows.cross_entropy(z, targets, cap=cap)
    assert_no_worse(losses, plain, exact)
    assert_no_worse(z, plain_dz.to(dtype), exact_dz)


def test_columns_of_minus_infinity_have_no_probability(watched):
    """As where a bias forbids tokens: a whole block of them, before and after the others."""
    z, targets, _ = operands(2, 900, FP32, "dense", None)
    z[0, :512], z[1, 256:] = -torch.inf, -torch.inf
    targets[:] = torch.tensor([700, 5])
    want = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    forbidden = z.isinf()
    with watched("losses"):
        losses = triton_rows.cross_entropy(z, targets)
    torch.testing.assert_close(losses, want)
    assert not z[forbidden].any() and not z.isnan().any()


@pytest.mark.parametrize("target", [-100, -1, 40, 1 << 32])
def test_a_target_outside_the_vocabulary_is_seen(target, watched):
    """It reads nothing that is not its row's, and other rows are right."""
    z, targets, _ = operands(3, 40, FP32, "odd", None)
    targets[1] = target
    want = torch.nn.functional.cross_entropy(z[::2], targets[::2], reduction="none")
    with watched("losses"):
        losses = triton_rows.cross_entropy(z, targets)
    assert losses[1].isnan() and losses[::2].isfinite().all()
    torch.testing.assert_close(losses[::2], want)


def test_nan_spreads(watched):
    z, targets, _ = operands(2, 300, FP32, "dense", None)
    z[0, 7] = torch.nan
    with watched("losses"):
        losses = triton_rows.cross_entropy(z, targets)
    assert losses[0].isnan() and z[0].isnan().all() and losses[1].isfinite() and z[1].isfinite().all()


def test_targets_and_bias_may_be_views(watched):
    z, targets, bias = operands(4, 300, FP32, "dense", FP32)
    want, dz = torch_rows.cross_entropy(z.clone(), targets, bias)
    with watched("losses"):
        losses = triton_rows.cross_entropy(z, targets.repeat_interleave(2)[::2], bias.repeat_interleave(3)[::3])
    torch.testing.assert_close(losses, want)
    torch.testing.assert_close(z, dz)


def test_no_rows(watched):
    z, targets, _ = operands(0, 40, BF16, "dense", None)
    with watched("losses"):
        losses = triton_rows.cross_entropy(z, targets)
    assert losses.shape == (0,) and losses.dtype == FP32
    assert torch_rows.cross_entropy(z, targets)[0].shape == (0,)


def test_logits_without_columns_side_by_side_are_refused():
    z, targets, _ = operands(2, 40, FP32, "dense", None)
    with pytest.raises(AssertionError):
        triton_rows.cross_entropy(z[:, ::2], targets // 2)
    with pytest.raises(AssertionError):
        triton_rows.cross_entropy(z[:, :0], targets)


def test_int32_offsets_do_not_overflow_beyond_2_31_elements(watched):
    z, targets, _ = operands(5, 300, BF16, "dense", None)
    want, dz = torch_rows.cross_entropy(z.clone(), targets)
    z = far(z, FAR)
    with watched("losses"):
        losses = triton_rows.cross_entropy(z, targets)
    torch.testing.assert_close(losses, want)
    torch.testing.assert_close(z, dz.to(BF16))


def test_the_order_of_programs_changes_no_bit(watched):
    found = []
    for seed in (5, 6):
        z, targets, _ = operands(6, 700, BF16, "dense", None)
        with watched("losses", seed=seed):
            found.append((triton_rows.cross_entropy(z, targets), z))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


# ------------------------------------------------------------------------------------------------- the loss made of it
# n, H, V, rows of a chunk, dtype, bias, multiplier, cap
LOSSES = [
    (7, 16, 300, 3, FP32, False, 1.0, None),
    (7, 16, 301, 2, BF16, False, 0.5, 4.0),
    (4, 24, 130, 100, FP16, True, 1.0, None),
    (5, 8, 65, 1, BF16, True, 1.3, 2.0),
]


def leaves_of(n, h, v, dtype, bias):
    hidden, weight = normal(n, h, dtype=dtype, seed=1), normal(v, h, dtype=dtype, scale=h**-0.5, seed=2)
    targets = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    leaves = [hidden, weight, normal(v, dtype=dtype, seed=4)] if bias else [hidden, weight]
    return [leaf.requires_grad_() for leaf in leaves], targets


def loss_of(leaves, targets, **options):
    hidden, weight, *bias = leaves
    return chunked_cross_entropy(hidden, weight, targets, *bias, **options)


@pytest.mark.parametrize("case", LOSSES, ids=name_of)
def test_the_loss_of_hidden_states(case, watched, monkeypatch):
    """With products around the kernel, for every gradient, chunk by chunk; the same number without gradients."""
    n, h, v, rows, dtype, bias, multiplier, cap = case
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, DEVICE.type, rows * v)
    options, (leaves, targets) = {"multiplier": multiplier, "cap": cap}, leaves_of(n, h, v, dtype, bias)
    results = []
    for backend in ("torch", "triton"):
        with watched("losses") if backend == "triton" else contextlib.nullcontext() as check:
            total = loss_of(leaves, targets, backend=backend, **options)
            results.append([total.detach(), *torch.autograd.grad(total * 3, leaves)])
            with torch.no_grad():
                alone = loss_of(leaves, targets, backend=backend, **options)
        assert torch.equal(alone, total)
    if check:
        assert len(check.launches) == 2 * -(-n // rows), "one launch a chunk"
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = reference.cross_entropy(wide[0] @ wide[1].T, targets, wide[2] if bias else None, multiplier, cap).sum()
    exact = [exact.detach(), *torch.autograd.grad(exact * 3, wide)]
    for plain, got, want in zip(*results, exact, strict=True):
        assert_no_worse(got, plain, want)


def test_only_what_is_needed(watched):
    (hidden, weight), targets = leaves_of(5, 8, 60, BF16, False)
    weight.requires_grad_(False)
    with watched("losses"):
        chunked_cross_entropy(hidden, weight, targets, backend="triton").backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0
    with watched("losses") as check:
        total = chunked_cross_entropy(hidden.detach(), weight, targets, backend="triton")
    assert not total.requires_grad
    assert not check or not check.counts()["z"].store.lanes


def test_the_logits_of_all_chunks_take_one_buffer_of_the_models_dtype(watched, monkeypatch):
    """Rows start at multiples of 64 columns."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, DEVICE.type, 2 * 67)
    (hidden, weight), targets = leaves_of(5, 8, 67, BF16, False)
    seen, plain = [], triton_rows.cross_entropy
    monkeypatch.setattr(triton_rows, "cross_entropy", lambda z, *a, **k: seen.append(z) or plain(z, *a, **k))
    with watched("losses"):
        chunked_cross_entropy(hidden, weight, targets, backend="triton")
    assert [tuple(z.shape) for z in seen] == [(2, 67), (2, 67), (1, 67)]
    assert {z.stride() for z in seen} == {(128, 1)} and {z.dtype for z in seen} == {BF16}
    assert len({z.data_ptr() for z in seen}) == 1


def test_the_op_in_plain_torch_changes_its_logits_too():
    for dtype in (FP32, BF16):
        z, targets, _ = operands(4, 50, dtype, "dense", None)
        want, dz = torch_rows.cross_entropy(z.clone(), targets, cap=2.0)
        losses = library_rows.cross_entropy_(z, targets, None, 1.0, 2.0, True, "torch")
        assert torch.equal(losses, want) and torch.equal(z, dz.to(dtype))
