"""rms_norm, rms_norm_grad and rms_norm_shrink: y = w x / rms(x), and S = c drop(y) A^T of the linears that read y."""

import pytest
import torch
from cases import BF16, FAR, FP16, FP32, far, keep_of, name_of, normal, product

from plopfast.kernels import block_ops, dispatch, reference, torch_blocks, triton_blocks
from plopfast.kernels.accuracy import assert_no_worse

C, EPS, SEED = 1.7, 1e-5, (1 << 62) + 12345
LOOP = 100  # elements of a row above which it is taken in parts, where a test asks for that

# M, K, dtype, layout, mode (None: no weight), whether rows are long, residual
CASES = [
    (1, 1, FP32, "dense", "narrow", False, False),
    (7, 123, FP32, "odd", "offset", False, True),
    (5, 123, BF16, "odd", "narrow", False, False),
    (5, 123, BF16, "odd", "narrow", True, True),
    (40, 24, FP16, "aligned", "wide", False, False),
    (33, 16, BF16, "aligned", None, False, True),
    (3, 300, FP16, "odd", "narrow", True, False),
    (3, 256, BF16, "aligned", "offset", True, True),
    (3, 200, FP32, "odd", None, True, False),
    (2, 130, BF16, "dense", "wide", True, False),
    (2, 1000, FP16, "aligned", "offset", False, True),
]


@pytest.fixture
def rows(monkeypatch):
    """`rows(long=True)` makes rows above LOOP elements too long for a program's registers."""

    def choose(long):
        if long:
            monkeypatch.setattr(triton_blocks, "LONGEST", 64)
            monkeypatch.setattr(triton_blocks, "LOOPED", 64)

    return choose


@pytest.fixture
def few(monkeypatch):
    """Few programs are enough."""
    monkeypatch.setattr(triton_blocks, "SHARE", 0.0)


def of(case):
    m, k, dtype, layout, mode, _, residual = case
    x, r, dy, dh = (normal(m, k, dtype=dtype, seed=seed, layout=layout) for seed in (1, 2, 3, 4))
    w = None if mode is None else normal(k, dtype=dtype, scale=0.3, seed=5, layout="odd") + (mode != "offset")
    return x * 3, r if residual else None, w, dy, dh if residual else None


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_float64(case, seed, watched, rows):
    (x, r, w, dy, dh), mode = of(case), case[4]
    rows(case[5])
    with watched("y", "rstd", "h", seed=seed) if r is not None else watched("y", "rstd", seed=seed):
        y, rstd, h = triton_blocks.rms_norm(x, w, EPS, mode, r)
    plain_y, plain_rstd, plain_h = torch_blocks.rms_norm(x, w, EPS, mode, r)
    assert torch.equal(h, plain_h) and (r is not None or h is x)
    torch.testing.assert_close(rstd, plain_rstd[:, 0].float(), rtol=1e-5, atol=0)
    assert_no_worse(y, plain_y, reference.rms_norm(h, w, EPS, mode == "offset"))
    with watched("dx", seed=seed):
        dx = triton_blocks.rms_norm_grad(dy, h, w, rstd, mode, dh)
    plain = torch_blocks.rms_norm_grad(dy, h, w, plain_rstd, mode, dh)
    exact = reference.rms_norm_grad(dy, h, w, EPS, mode == "offset")
    assert_no_worse(dx, plain, exact if dh is None else exact + dh.double())


@pytest.mark.parametrize("mode", torch_blocks.MODES)
@pytest.mark.parametrize("residual", [False, True])
def test_where_it_rounds(residual, mode, watched):
    """Bit by bit what transformers computes: Llama rounds before the weight, Gemma after it; one rounding tells them apart.
    The sum with a residual is rounded before it is normalised, as the backward pass has no other."""
    x, w = normal(64, 48, dtype=BF16, seed=1), normal(48, dtype=BF16, scale=0.3, seed=2)
    with watched("y", "rstd"):
        y, rstd, h = triton_blocks.rms_norm(x, w, EPS, mode, normal(64, 48, dtype=BF16, seed=3) if residual else None)
    x_hat = h.float() * rstd[:, None]
    factor = 1.0 + w.float() if mode == "offset" else w.float()
    expected = {"narrow": x_hat.to(BF16) * w}.get(mode, (x_hat * factor).to(BF16))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("k", [48, 200])
@pytest.mark.parametrize("residual", [False, True])
def test_empty(k, residual, watched, rows):
    rows(True)
    x, w = normal(0, k, dtype=BF16), normal(k, dtype=BF16)
    with watched():
        y, rstd, h = triton_blocks.rms_norm(x, w, EPS, "narrow", x if residual else None)
        dx = triton_blocks.rms_norm_grad(x, x, w, rstd, "narrow", x if residual else None)
    assert y.shape == h.shape == dx.shape == (0, k) and rstd.shape == (0,) and y.dtype == dx.dtype == BF16


def test_each_matrix_has_rows_of_its_own_stride(watched):
    x, r = normal(9, 40, dtype=BF16, seed=1, layout="odd"), normal(9, 40, dtype=BF16, seed=2, layout="aligned")
    dy, w = normal(9, 80, dtype=BF16, seed=3)[:, 40:], normal(40, dtype=BF16, seed=4)
    with watched("y", "h", "rstd", "dx"):
        y, rstd, h = triton_blocks.rms_norm(x, w, EPS, "narrow", r)
        dx = triton_blocks.rms_norm_grad(dy, x, w, rstd, "narrow", r)
        dense = triton_blocks.rms_norm(h, w, EPS, "narrow")[0]
        dense_dx = triton_blocks.rms_norm_grad(dy.contiguous(), x.contiguous(), w, rstd, "narrow", r.contiguous())
    assert torch.equal(h, x + r)
    torch.testing.assert_close((y, dx), (dense, dense_dx))


def test_a_weight_of_any_stride(watched, few):
    x, w = normal(9, 40, dtype=BF16, seed=1), normal(40, 3, dtype=BF16, seed=2)[:, 1]
    found = []
    with watched():
        for weight in (w, w.contiguous()):
            y, rstd, _ = triton_blocks.rms_norm(x, weight, EPS, "narrow")
            handed = triton_blocks.rms_norm_shrink(x, weight, EPS, "narrow", (x.float(),), C)
            found.append((y, triton_blocks.rms_norm_grad(x, x, weight, rstd, "narrow"), *handed))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("long", [False, True])
def test_int32_offsets_do_not_overflow_beyond_2_31_elements(long, watched, rows):
    rows(long)
    x, dy, w = (normal(*shape, dtype=BF16, seed=i) for i, shape in enumerate(((5, 70), (5, 70), (70,))))
    with watched("y", "h", "rstd", "dx"):
        y, rstd, h = triton_blocks.rms_norm(far(x, FAR), w, EPS, "narrow", far(dy, FAR))
        dx = triton_blocks.rms_norm_grad(far(dy, FAR), far(x, FAR), w, rstd, "narrow", far(x, FAR))
        near = triton_blocks.rms_norm(x, w, EPS, "narrow", dy)
        near_dx = triton_blocks.rms_norm_grad(dy, x, w, rstd, "narrow", x)
    torch.testing.assert_close((y, rstd, h, dx), (*near, near_dx))


# M, K, R, G, dtype of x, of A, mode, p
SHRINKS = [
    (1, 1, 1, 1, FP32, FP32, "narrow", 0.0),
    (37, 123, 5, 3, BF16, FP32, "narrow", 0.3),
    (20, 64, 16, 2, FP16, FP16, "offset", 0.0),
    (19, 100, 64, 1, BF16, BF16, None, 0.5),
    (18, 200, 3, 3, FP32, FP32, "wide", 0.2),
    (17, 72, 64, 3, BF16, FP32, "narrow", 0.1),  # too wide: two launches
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", SHRINKS, ids=name_of)
def test_shrink_against_float64(case, seed, watched, few):
    m, k, rank, count, dtype, wide, mode, p = case
    x = normal(m, k, dtype=dtype, scale=3.0, seed=1, layout="odd")
    w = None if mode is None else normal(k, dtype=dtype, scale=0.3, seed=2) + (mode != "offset")
    adapters = [normal(rank, k, dtype=wide, scale=k**-0.5, seed=10 + i, layout="odd") for i in range(count)]
    seeds = (7, SEED, -5)[:count]
    q = keep_of(p, SEED, m, k)[1]
    with watched("y", "rstd", "s", "out", seed=seed) as check:
        y, rstd, s = triton_blocks.rms_norm_shrink(x, w, EPS, mode, adapters, C * q, p, seeds)
    if check and rank * count <= 128:
        assert len(check.launches) == 1
        assert check.launches[0].args["x"].load.launch_bytes == x.numel() * x.element_size()
        assert not check.launches[0].args["y"].load.lanes
    with watched("y", "rstd"):
        alone = triton_blocks.rms_norm(x, w, EPS, mode)
    assert_no_worse(y, torch_blocks.rms_norm(x, w, EPS, mode)[0], reference.rms_norm(x, w, EPS, mode == "offset"))
    torch.testing.assert_close(rstd, alone[1], rtol=1e-6, atol=0)
    assert s.shape == (count, m, rank) and s.dtype == dtype
    for got, a, number in zip(s, adapters, seeds, strict=True):
        keep = keep_of(p, number, m, k)[0]
        y_drop = y if keep is None else y * keep
        plain = product(y_drop, a.to(dtype).T) * (C * q)
        assert_no_worse(got, plain, y_drop.double() @ a.double().T * (C * q))


@pytest.mark.parametrize("m, together", [(32, False), (33, True)])
def test_shrink_of_few_tokens_takes_more_programs(m, together, watched, monkeypatch):
    """Of four units three have to be busy. Alone, the shrink splits K."""
    x, a = normal(m, 500, dtype=BF16, seed=1), normal(4, 500, scale=0.05, seed=2)
    monkeypatch.setattr(triton_blocks.dispatch, "target_of", lambda device: dispatch.Target("interpreter", 4))
    with watched("y", "rstd", "s", "out") as check:
        y, _, (s,) = triton_blocks.rms_norm_shrink(x, None, EPS, "narrow", (a,), C)
    if check:
        assert check.launches[0].kernel == ("rms_norm_shrink" if together else "rms_norm")
    assert_no_worse(s, product(y, a.to(BF16).T) * C, y.double() @ a.double().T * C)


def test_shrink_of_nothing(watched):
    x, a = normal(0, 64, dtype=BF16), normal(4, 64)
    with watched():
        y, rstd, s = triton_blocks.rms_norm_shrink(x, None, EPS, "narrow", (a, a), C)
    assert y.shape == (0, 64) and rstd.shape == (0,) and s.shape == (2, 0, 4)


def test_shrink_rounds_once(watched, few):
    """Where float16 cannot hold the sum itself."""
    x, a = torch.ones(3, 64, dtype=FP16).to(normal(1).device), normal(2, 64) * 0 + 4000.0
    with watched("y", "rstd", "s"):
        s = triton_blocks.rms_norm_shrink(x, None, 0.0, "narrow", (a,), 2.0**-6)[2]
    assert torch.equal(s, torch.full_like(s, 4000.0))


def test_shrink_beyond_2_31_elements(watched, few):
    x, w, a = normal(5, 48, dtype=BF16, seed=1), normal(48, dtype=BF16, seed=2), normal(5, 48, dtype=BF16, seed=3)
    with watched("y", "rstd", "s"):
        got = triton_blocks.rms_norm_shrink(far(x, FAR), w, EPS, "narrow", (far(a, FAR),) * 2, C, 0.3, (SEED, 5))
        near = triton_blocks.rms_norm_shrink(x, w, EPS, "narrow", (a, a), C, 0.3, (SEED, 5))
    torch.testing.assert_close(got, near)


@pytest.mark.parametrize("mode", [None, *torch_blocks.MODES])
def test_autograd(mode, watched):
    """Of any shape; x alone has a gradient, which is that of torch's arithmetic."""
    x, w = normal(2, 3, 5, 40, seed=1).transpose(1, 2), None if mode is None else normal(40, seed=2)
    dy = normal(2, 5, 3, 40, seed=3)
    found = {}
    for backend in ("torch", "triton"):
        x.requires_grad_().grad = None
        with watched("y", "rstd", "dx") as check:
            y = block_ops.rms_norm(x, w, EPS, mode or "narrow", backend=backend)
            y.backward(dy)
        assert not check or bool(check.launches) == (backend == "triton")
        found[backend] = y.detach(), x.grad
    for got, plain in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(got, plain)
    torch.testing.assert_close(found["torch"][1].double(), reference.rms_norm_grad(dy, x.detach(), w, EPS, mode == "offset"),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("used", ["both", "y", "h"])
def test_autograd_of_a_residual(needs, backend, used, watched):
    """Of either input, through either output: what autograd gives for the float64 formula."""
    x, r, w = (normal(6, 40, seed=1), normal(6, 40, seed=2), normal(40, seed=3))
    dh, dy = normal(6, 40, seed=4), normal(6, 40, seed=5)
    (x.requires_grad_(needs[0]), r.requires_grad_(needs[1]))
    with watched():
        h, y = block_ops.add_rms_norm(x, r, w, EPS, "narrow", backend=backend)
        outputs, grads = {"both": ((h, y), (dh, dy)), "y": ((y,), (dy,)), "h": ((h,), (dh,))}[used]
        torch.autograd.backward(outputs, grads)
    exact = torch.zeros_like(dh, dtype=torch.float64)
    if used != "h":
        exact += reference.rms_norm_grad(dy, (x + r).detach(), w, EPS)
    if used != "y":
        exact += dh
    for tensor, needed in zip((x, r), needs, strict=True):
        assert (tensor.grad is not None) == needed
        if needed:
            torch.testing.assert_close(tensor.grad.double(), exact, rtol=1e-4, atol=1e-5)


def test_what_is_not_taken():
    x = normal(3, 40)
    for weight in (normal(40).requires_grad_(), normal(40, dtype=BF16), normal(41), normal(1)):
        with pytest.raises(ValueError, match="weight: expected a frozen torch.float32 .40. like x, got .*: freeze it"):
            block_ops.rms_norm(x, weight, EPS)
    with pytest.raises(ValueError, match="x and residual: expected one shape and dtype"):
        block_ops.add_rms_norm(x, normal(1, 40), None, EPS)


def test_tensors_without_values_take_torchs_operations():
    x = torch.empty(3, 40, dtype=BF16, device="meta", requires_grad=True)
    y = block_ops.rms_norm(x, None, EPS)
    y.backward(torch.empty_like(y))
    assert y.shape == x.grad.shape == (3, 40) and y.dtype == BF16


def test_columns_that_follow_each_other_and_a_gradient_that_is_expanded(watched):
    x, w = normal(40, 6, seed=1).T, normal(40, seed=2)
    x.requires_grad_()
    with watched("y", "rstd", "dx"):
        y = block_ops.rms_norm(x, w, EPS, backend="triton")
        y.sum().backward()
    torch.testing.assert_close(y.detach().double(), reference.rms_norm(x.detach(), w, EPS), rtol=1e-4, atol=1e-5)
    exact = reference.rms_norm_grad(torch.ones(6, 40).to(x.device), x.detach(), w, EPS)
    torch.testing.assert_close(x.grad.double(), exact, rtol=1e-4, atol=1e-5)
