"""gate and gate_grad: y = act(g) u."""

import pytest
import torch
from cases import BF16, DEVICE, FAR, FP16, FP32, far, name_of, normal, view

from plopfast.kernels import block_ops, reference, torch_blocks, triton_blocks
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.models.lean import LeanMLP, LeanNorm

ACTS = torch_blocks.ACTS
# M, N, dtype, layout of g, of u, of dy
CASES = [
    (1, 1, FP32, "dense", "dense", "dense"),
    (33, 123, FP32, "odd", "aligned", "dense"),
    (7, 1100, BF16, "odd", "odd", "odd"),
    (40, 64, FP16, "aligned", "odd", "aligned"),
    (3, 48, BF16, "aligned", "aligned", "odd"),
]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_float64(case, act, watched):
    m, n, dtype, *layouts = case
    g, u, dy = (normal(m, n, dtype=dtype, seed=1 + i, layout=layout) for i, layout in enumerate(layouts))
    g = g.mul_(4)
    for seed in (0, 1):
        with watched("y", seed=seed):
            y = triton_blocks.gate(g, u, act)
        assert_no_worse(y, torch_blocks.gate(g, u, act), reference.gate(g, u, act))
        with watched("dg", "du", seed=seed):
            found = triton_blocks.gate_grad(dy, g, u, act)
        plain, exact = torch_blocks.gate_grad(dy, g, u, act), reference.gate_grad(dy, g, u, act)
        for got, one, other in zip(found, plain, exact, strict=True):
            assert_no_worse(got, one, other)


@pytest.mark.parametrize("act", ACTS)
def test_far_from_zero(act, watched):
    """exp overflows there, and 0 times infinity would be no number."""
    g = torch.tensor([[-3e4, -1e3, -90.0, -20.0, 0.0, 20.0, 90.0, 1e3, 3e4]], device=DEVICE)
    u = torch.ones_like(g)
    with watched("y", "dg", "du"):
        y, (dg, du) = triton_blocks.gate(g, u, act), triton_blocks.gate_grad(u, g, u, act)
    torch.testing.assert_close(y, g.clamp(min=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(du, y)
    torch.testing.assert_close(dg, torch.where(g == 0, 0.5, (g > 0).float()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("m, n", [(0, 64), (5, 0), (0, 0)])
def test_empty(m, n, watched):
    g = normal(m, n, dtype=BF16)
    with watched():
        y, grads = triton_blocks.gate(g, g, "silu"), triton_blocks.gate_grad(g, g, g, "silu")
    assert {one.shape for one in (y, *grads)} == {(m, n)} and {one.dtype for one in (y, *grads)} == {BF16}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("backend", [torch_blocks, triton_blocks], ids=["torch", "triton"])
@pytest.mark.parametrize("place", ["inputs", "halves", "apart"])
def test_gradients_in_given_tensors(place, backend, act, watched):
    """Over g and u, which lie in one matrix; in the halves of another; or in two of their own."""
    merged, dy = normal(20, 2 * 48, dtype=BF16, seed=1, layout="odd"), normal(20, 48, dtype=BF16, seed=2)
    g, u = merged.chunk(2, dim=1)
    expected = torch_blocks.gate_grad(dy, g, u, act)
    apart = view(torch.zeros_like(dy), "odd"), view(torch.zeros_like(dy), "aligned")
    out = {"inputs": (g, u), "halves": torch.full_like(merged, float("nan")).chunk(2, dim=1), "apart": apart}[place]
    with watched():
        found = backend.gate_grad(dy, g, u, act, out)
    for got, given, one in zip(found, out, expected, strict=True):
        assert got.data_ptr() == given.data_ptr()
        torch.testing.assert_close(got, one, rtol=2e-2, atol=1e-3)


def test_int32_offsets_do_not_overflow_beyond_2_31_elements(watched):
    g, u, dy = (normal(5, 48, dtype=BF16, seed=i) for i in range(3))
    out = far(torch.zeros_like(g), FAR), far(torch.zeros_like(g), FAR)
    with watched("y", "dg", "du"):
        y = triton_blocks.gate(far(g, FAR), far(u, FAR), "silu")
        triton_blocks.gate_grad(far(dy, FAR), far(g, FAR), far(u, FAR), "silu", out)
        near = triton_blocks.gate(g, u, "silu"), *triton_blocks.gate_grad(dy, g, u, "silu")
    assert all(torch.equal(*pair) for pair in zip((y, *out), near, strict=True))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_autograd(needs, act, watched):
    """Of any shape, and twice over one graph: nothing that is saved is overwritten."""
    g, u, dy = (normal(2, 3, 40, seed=i) for i in range(3))
    exact = reference.gate_grad(dy, g, u, act)
    for backend in ("torch", "triton"):
        one, two = (tensor.clone().requires_grad_(need) for tensor, need in zip((g, u), needs, strict=True))
        with watched() as check:
            y = block_ops.gate(one, two, act, backend=backend)
            for _ in range(2):
                y.backward(dy, retain_graph=True)
        assert not check or len(check.launches) == 3 * (backend == "triton")
        torch.testing.assert_close(y.detach().double(), reference.gate(g, u, act), rtol=1e-4, atol=1e-5)
        for tensor, need, gradient in zip((one, two), needs, exact, strict=True):
            assert (tensor.grad is not None) == need
            if need:
                torch.testing.assert_close(tensor.grad.double(), 2 * gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ACTS)
def test_autograd_of_a_merged_matrix(act, watched):
    merged, dy = normal(2, 3, 80, seed=1), normal(2, 3, 40, seed=2)
    g, u = merged.chunk(2, dim=-1)
    exact = torch.cat(reference.gate_grad(dy, g, u, act), dim=-1)
    for backend in ("torch", "triton"):
        one = merged.clone().requires_grad_()
        with watched("y", "dg", "du") if backend == "triton" else watched():
            y = block_ops.merged_gate(one, act, backend=backend)
            y.backward(dy)
        torch.testing.assert_close(y.detach().double(), reference.gate(g, u, act), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.grad.double(), exact, rtol=1e-4, atol=1e-5)


def test_shapes_and_dtypes_must_agree():
    g = normal(3, 40)
    for u in (normal(1, 40), normal(3, 40, dtype=BF16)):
        with pytest.raises(
            ValueError, match="gate and up: expected one shape and dtype, got torch.float32 .*: expand or"
        ):
            block_ops.gate(g, u, "silu")


class Norm(torch.nn.Module):
    eps = 1e-5

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(normal(40, scale=0.3, seed=1), requires_grad=False)

    def forward(self, x):
        return (1 + self.weight) * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class MLP(torch.nn.Module):
    def __init__(self, merged):
        super().__init__()
        linear = lambda n, k: torch.nn.Linear(k, n, device=DEVICE)  # noqa: E731
        names = {"gate_up_proj": 96} if merged else {"gate_proj": 48, "up_proj": 48}
        for name, n in names.items():
            setattr(self, name, linear(n, 40))
        self.down_proj = linear(40, 48)

    def forward(self, x):
        if hasattr(self, "gate_up_proj"):
            g, u = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            g, u = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(torch.nn.functional.gelu(g) * u)


@pytest.mark.parametrize("merged", [False, True])
def test_lean_modules_on_the_kernels(merged, watched):
    """A norm, then a gated MLP, whose gradient comes expanded from a sum."""
    torch.manual_seed(0)
    norm, mlp = Norm(), MLP(merged)
    lean, found = (LeanNorm(norm, "offset", norm.eps, "triton"), LeanMLP(mlp, "gelu", "triton")), []
    for first, then in ((norm, mlp), lean):
        x = normal(2, 9, 40, seed=2).requires_grad_()
        with watched("y", "rstd", "dx", "dg", "du") if first is lean[0] else watched() as check:
            y = then(first(x))
            y.sum().backward()
        found.append((y.detach(), x.grad))
    assert not check or [one.kernel for one in check.launches] == ["rms_norm", "gate", "gate_grad", "rms_norm_grad"]
    for got, one in zip(*found, strict=True):
        torch.testing.assert_close(got, one)
