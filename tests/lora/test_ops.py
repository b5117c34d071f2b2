"""lora_linear against the float64 reference, against PEFT, and the defects that other implementations had."""

import itertools

import pytest
import torch
from helpers import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import plopfast as pf
from plopfast.kernels import philox, reference
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.lora import ops
from plopfast.lora.layer import adapters
from plopfast.lora.shared import Prepared, find_shared_inputs
from plopfast.models.linears import linear_modules

CASES = [
    (1, 64, 64, 8),
    (63, 507, 123, 5),
    (0, 64, 64, 8),
    (17, 33, 65, 16),
    (5, 16, 16, 1),
    (40, 300, 256, 64),
]  # M, N, K, R
S = 1.7
SHAPES = (3, 5, 8), (6, 8), (2, 8), (6, 2)  # x, W, A, B


def make(m, n, k, r, dtype=torch.float32, adapter_dtype=None, seed=0, strided=False):
    """Random operands; `strided` gives views inside NaN-filled buffers, so that a read outside shows."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape, scale=1.0, dtype=dtype):
        value = (torch.randn(*shape, generator=generator) * scale).to(dtype)
        if not strided or len(shape) < 2:
            return value
        buffer = torch.full((shape[0] * 2 + 3, shape[1] + 5), float("nan"), dtype=dtype)
        view = buffer[1 : 1 + 2 * shape[0] : 2, 2 : 2 + shape[1]]
        view.copy_(value)
        return view

    wide = adapter_dtype or dtype
    x, w = tensor(m, k), tensor(n, k, scale=k**-0.5)
    a, b = tensor(r, k, scale=k**-0.5, dtype=wide), tensor(n, r, scale=r**-0.5, dtype=wide)
    return x, w, a, b, tensor(n), tensor(m, n)


def plain(x, w, a, b, s, bias, keep=None, q=1.0):
    """What one writes without a library, in the operands' own dtype."""
    dropped = x if keep is None else x * keep * q
    y = torch.nn.functional.linear(x, w, bias)
    return y + (dropped @ a.to(x.dtype).T @ b.to(x.dtype).T) * s


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.bfloat16, None)], ids=str
)
def test_forward_and_gradients(case, dtypes, with_bias, p, strided):
    x, w, a, b, bias, dy = make(*case, *dtypes, strided=strided)
    bias = bias if with_bias else None
    keep, q = (philox.keep_mask(5, x.shape[0], x.shape[1], p), philox.inverse_keep(p)) if p else (None, 1.0)
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = pf.lora_linear(leaves[0], w, leaves[1], leaves[2], scaling=S, bias=bias, dropout_p=p, seed=5)
    y.backward(dy)
    other = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, a, b)]
    same = plain(other[0], w, other[1], other[2], S, bias, keep, q)
    same.backward(dy.contiguous())
    assert y.dtype == x.dtype
    assert_no_worse(y, same, reference.lora_linear(x, w, a, b, S, bias, keep, q))
    exact = reference.lora_linear_grads(dy, x, w, a, b, S, keep, q)
    for name, ours, theirs in zip(("x", "lora_A", "lora_B"), leaves, other, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert_no_worse(ours.grad, theirs.grad, exact[name])


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradient_subsets(needs):
    x, w, a, b, bias, dy = make(7, 9, 11, 3)
    leaves = [t.clone().requires_grad_(need) for t, need in zip((x, a, b), needs, strict=True)]
    y = pf.lora_linear(leaves[0], w, leaves[1], leaves[2], scaling=S, bias=bias)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    y.backward(dy)
    exact = reference.lora_linear_grads(dy, x, w, a, b, S)
    for name, leaf, need in zip(("x", "lora_A", "lora_B"), leaves, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad.double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    x, w, a, b, bias, _ = make(4, 5, 6, 2, torch.float64)
    for t in (x, a, b):
        t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b: pf.lora_linear(x, w, a, b, scaling=S, bias=bias, dropout_p=p, seed=1), (x, a, b)
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_backward_is_the_first_again(p):
    x, w, a, b, _, dy = make(8, 10, 12, 4)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y = pf.lora_linear(x, w, a, b, scaling=S, dropout_p=p, seed=2)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_saves_x_and_s_alone(p):
    """Saved bytes that did not exist before are S's; x, weight and adapters are the caller's own memory."""
    x, w, a, b, bias, _ = make(32, 24, 40, 4)
    known = {t.untyped_storage().data_ptr() for t in (x, w, a, b, bias)}
    new = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            new.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pf.lora_linear(
            x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_(), scaling=S, bias=bias, dropout_p=p, seed=1
        )
    assert new == [32 * 4], "S alone: the mask comes from the seed"


def test_inputs_are_never_written():
    operands = make(8, 10, 12, 4)
    copies = [t.clone() for t in operands]
    x, w, a, b, bias, dy = operands
    y = pf.lora_linear(
        x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_(), scaling=S, bias=bias, dropout_p=0.2, seed=1
    )
    y.backward(dy)
    assert all(torch.equal(t.detach(), copy) for t, copy in zip(operands, copies, strict=True))


def test_expanded_gradient_and_leading_dimensions():
    x, w, a, b, _, _ = make(12, 10, 8, 4)
    x = x.view(2, 2, 3, 8).requires_grad_()
    pf.lora_linear(x, w, a, b, scaling=S).sum().backward()  # the gradient of a sum has stride 0
    exact = reference.lora_linear_grads(torch.ones(12, 10), x.reshape(12, 8).detach(), w, a, b, S)["x"]
    torch.testing.assert_close(x.grad.reshape(12, 8).double(), exact, rtol=1e-5, atol=1e-5)
    vector = pf.lora_linear(x[0, 0, 0].detach(), w, a, b, scaling=S)
    assert vector.shape == (10,)


def test_frozen_transposed_weight_view():
    x, w, a, b, bias, _ = make(6, 10, 8, 2)
    stored = w.T.contiguous()  # [in, out], as Conv1D keeps it
    y = pf.lora_linear(x, stored.T, a, b, scaling=S, bias=bias)
    torch.testing.assert_close(y, pf.lora_linear(x, w, a, b, scaling=S, bias=bias))


def test_dropout_is_restored_under_checkpointing():
    x, w, a, b, _, dy = make(16, 12, 20, 4)
    module = pf.LoRALinear(torch.nn.Linear(20, 12, bias=False), 4, 8, dropout=0.5)
    with torch.no_grad():
        module.base.weight.copy_(w)
        module.lora_A.copy_(a)
        module.lora_B.copy_(b)
    gradients = []
    for run in (lambda x: module(x), lambda x: checkpoint(module, x, use_reentrant=False)):
        torch.manual_seed(4)
        leaf = x.detach().clone().requires_grad_()
        y = run(leaf)
        gradients.append((y, *torch.autograd.grad(y, [leaf, module.lora_A, module.lora_B], dy)))
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_autocast():
    x, w, a, b, bias, dy = make(9, 10, 12, 4)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    with torch.autocast("cpu", torch.bfloat16):
        y = pf.lora_linear(x, w, a, b, scaling=S, bias=bias)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    exact = reference.lora_linear_grads(dy, x.detach(), w, a.detach(), b.detach(), S)
    for name, leaf in zip(("x", "lora_A", "lora_B"), leaves, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad.double() - exact[name]).norm() < 0.02 * exact[name].norm()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_against_peft(with_bias, p):
    """Outputs and all gradients in fp32, 1e-6 relative. With dropout PEFT gets our mask through its own module."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    base = torch.nn.Linear(96, 80, bias=with_bias).requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=p)
    try:
        theirs = Linear(base, "default", config=config, r=8, lora_alpha=16, lora_dropout=p)
    except TypeError:  # before PEFT 0.18
        theirs = Linear(base, "default", r=8, lora_alpha=16, lora_dropout=p)
    torch.nn.init.normal_(theirs.lora_B["default"].weight, std=0.1)
    x, dy = torch.randn(50, 96), torch.randn(50, 80)
    if p:
        keep, q = philox.keep_mask(9, 50, 96, p), philox.inverse_keep(p)
        theirs.lora_dropout["default"].forward = lambda x: x * keep * q
    a, b = (part["default"].weight.detach().clone().requires_grad_() for part in (theirs.lora_A, theirs.lora_B))
    ours_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = pf.lora_linear(ours_x, base.weight, a, b, scaling=2.0, bias=base.bias, dropout_p=p, seed=9)
    want = theirs(their_x)
    y.backward(dy)
    want.backward(dy)
    pairs = [
        (y, want),
        (ours_x.grad, their_x.grad),
        (a.grad, theirs.lora_A["default"].weight.grad),
        (b.grad, theirs.lora_B["default"].weight.grad),
    ]
    for ours, peft in pairs:
        assert (ours - peft).norm() <= 1e-6 * peft.norm()


BAD = {
    "x [..., K]": {"x": torch.randn(4, 7)},
    "transposed?": {"lora_A": torch.randn(8, 3)},
    "lora_B: expected": {"lora_B": torch.randn(9, 3)},
    "bias: expected": {"bias": torch.randn(3)},
    "cast x": {"x": torch.randn(4, 8).half()},
    "float32 or x's dtype": {"lora_A": torch.randn(3, 8).half()},
    "rank >= 1": {"lora_A": torch.randn(0, 8), "lora_B": torch.randn(10, 0)},
    "frozen": {"weight": torch.randn(10, 8, requires_grad=True)},
    "needs a seed": {"dropout_p": 0.5},
    "0 <= p < 1": {"dropout_p": 1.0, "seed": 1},
    "finite": {"scaling": float("nan")},
    "is on meta": {"weight": torch.empty(10, 8, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    good = {
        "x": torch.randn(4, 8),
        "weight": torch.randn(10, 8),
        "lora_A": torch.randn(3, 8),
        "lora_B": torch.randn(10, 3),
        "scaling": 1.0,
    }
    arguments = good | BAD[message]
    positional = [arguments.pop(name) for name in ("x", "weight", "lora_A", "lora_B")]
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("?", r"\?").replace("...", r"\.\.\.")):
        pf.lora_linear(*positional, **arguments)


def test_every_bit_of_a_seed_counts():
    x, w, a, b = torch.randn(40, 16), torch.randn(8, 16), torch.randn(2, 16), torch.randn(8, 2)
    found = [
        pf.lora_linear(x, w, a, b, scaling=1.0, dropout_p=0.5, seed=5 + more)
        for more in (0, 8, 1 << 31, 1 << 32, 1 << 62, 1 << 63)
    ]
    assert all(not torch.equal(one, two) for one, two in itertools.combinations(found, 2))
    signed = pf.lora_linear(x, w, a, b, scaling=1.0, dropout_p=0.5, seed=5 - (1 << 63))
    torch.testing.assert_close(signed, found[-1], rtol=0, atol=0)


def test_a_gradient_whose_rows_lie_apart():
    x, w, a, b = (torch.randn(*s).bfloat16() for s in ((40, 64), (48, 64), (8, 64), (48, 8)))
    wide = torch.randn(40, 96).bfloat16()
    found = []
    for dy in (wide[:, :48], wide[:, :48].contiguous()):
        leaves = [t.clone().requires_grad_(t is not w) for t in (x, w, a, b)]
        pf.lora_linear(*leaves, scaling=0.5).backward(dy)
        found.append([leaf.grad for leaf in leaves if leaf.requires_grad])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


class Apart(TorchDispatchMode):
    """Finds products whose left operand has gaps between its rows, which torch 2.13 gets wrong in bfloat16 on some CPUs."""

    def __init__(self):
        super().__init__()
        self.products, self.apart = 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2]
        if "mm" in op.__name__:
            self.products += 1
            self.apart += [op.__name__] * (not any(m.is_contiguous() for m in (matrices[-2], matrices[-2].T)))
        return op(*args, **(kwargs or {}))


def test_no_product_has_a_left_operand_whose_rows_lie_apart():
    w, a, b = (torch.randn(*s) for s in ((48, 64), (8, 64), (48, 8)))
    for x, dy in (
        (torch.randn(40, 96)[:, :64], torch.randn(40, 96)[:, :48]),
        (torch.randn(40, 64), torch.ones(()).expand(40, 48)),
    ):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        with Apart() as found:
            pf.lora_linear(x.requires_grad_(), w, *leaves, scaling=0.5).backward(dy)
        assert found.products >= 7 and not found.apart


@pytest.mark.parametrize("backend", ["auto", "torch", "fused"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_shapes_on_the_meta_device(backend, p):
    """Tools that trace run models there. No driver is asked for, since nothing is computed."""
    x, w, a, b = (torch.empty(shape, device="meta", requires_grad=shape != (6, 8)) for shape in SHAPES)
    y = pf.lora_linear(x, w, a, b, scaling=1.0, dropout_p=p, seed=1 if p else None, backend=backend)
    y.sum().backward()
    assert y.is_meta and y.shape == (3, 5, 6)
    assert [t.grad.shape for t in (x, a, b)] == [t.shape for t in (x, a, b)]
    assert pf.linear_norms(x, w, backend=backend).shape == ops.row_norms(y, backend=backend).shape == (3, 5)
    y, norms = ops.linear_and_norms(x, w, None, backend=backend)
    assert y.shape == (3, 5, 6) and norms.shape == (3, 5)


def test_a_model_with_adapters_on_the_meta_device():
    model = build("llama")
    pf.inject(
        model, pf.Placement({info.name: (4, 8.0) for info in linear_modules(model)}, [], "explicit", 0), dropout=0.1
    )
    find_shared_inputs(model)
    mlp = model.to("meta").train().model.layers[0].mlp  # transformers' own masks read values
    x = torch.empty(2, 7, model.config.hidden_size, device="meta", requires_grad=True)
    with Prepared(model):
        mlp(x).sum().backward()
    assert x.grad.shape == x.shape and all(m.lora_A.grad.shape == m.lora_A.shape for m in adapters(mlp).values())
