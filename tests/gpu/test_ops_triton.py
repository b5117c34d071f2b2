"""lora_linear and its relatives through autograd, with Triton's kernels under them."""

import itertools

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, keep_of, name_of, normal, operands, product
from torch.utils.checkpoint import checkpoint

import plopfast as pf
from plopfast.kernels import dispatch, reference
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.lora import ops

S, SEED = 1.7, 0xFEED_5EED
STRATEGIES = ["fused", "lora-first"]
# of all kernels of a forward and a backward pass; S and dS may be torch's too
OUTPUTS = ("y", "norms", "lora_shrink.s", "g", "lora_grads.ds", "out", "other_out")
NAMES = ("x", "lora_A", "lora_B")


def plain(x, w, a, b, bias, keep, q):
    """What one writes without a library, in x's dtype; gradients come through autograd."""
    dropped = x if keep is None else x * keep * q
    y = torch.nn.functional.linear(x, w, bias)
    return y + (dropped @ a.to(x.dtype).T @ b.to(x.dtype).T) * S


def leaves_of(o, needs=(True, True, True)):
    return [t.detach().clone().requires_grad_(need) for t, need in zip((o.x, o.a, o.b), needs, strict=True)]


def linear(leaves, o, backend, p=0.0, seed=SEED, bias=True):
    x, a, b = leaves
    options = {"scaling": S, "bias": o.bias if bias else None, "dropout_p": p, "seed": seed, "backend": backend}
    return pf.lora_linear(x, o.w, a, b, **options)


# M, N, K, R, dtype of X and W, of adapters; layout of X, W and adapters; bias, p
CASES = [
    (1, 24, 16, 8, BF16, FP32, "dense", True, 0.0),
    (63, 51, 123, 5, BF16, FP32, "odd", True, 0.3),
    (40, 70, 48, 16, BF16, BF16, "aligned", False, 0.0),
    (33, 16, 45, 3, FP16, FP32, "odd", False, 0.5),
    (17, 33, 40, 64, FP32, FP32, "odd", True, 0.0),
    (9, 20, 32, 256, FP16, FP16, "dense", True, 0.2),
    (5, 16, 17, 1, FP32, FP32, "dense", True, 0.4),
    (0, 24, 16, 4, BF16, FP32, "dense", True, 0.3),
    (6, 16, 520, 16, BF16, FP32, "dense", False, 0.1),
]


@pytest.mark.parametrize("backend, seed", [("fused", 0), ("lora-first", 1)])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward_and_gradients(case, backend, seed, watched):
    m, n, k, r, dtype, wide, layout, with_bias, p = case
    o = operands(m, n, k, r, dtype, wide, layout)
    keep, q = keep_of(p, SEED, m, k)
    leaves = [t.detach().requires_grad_() for t in (o.x, o.a, o.b)]
    with watched(*OUTPUTS, seed=seed):
        y = linear(leaves, o, backend, p, bias=with_bias)
        y.backward(o.dy)
    bias = o.bias.contiguous() if with_bias else None
    others = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (o.x, o.a, o.b)]
    same = plain(others[0], o.w.contiguous(), *others[1:], bias, keep, q)
    same.backward(o.dy.contiguous())
    assert y.dtype == dtype
    assert_no_worse(y, same, reference.lora_linear(o.x, o.w, o.a, o.b, S, bias, keep, q))
    exact = reference.lora_linear_grads(o.dy, o.x, o.w, o.a, o.b, S, keep, q)
    for name, ours, theirs in zip(NAMES, leaves, others, strict=True):
        assert_no_worse(ours.grad, theirs.grad, exact[name])


# what a backward pass launches for the needs of x, lora_A and lora_B; "gemm" stands for the strategy's own product
NEEDED = {
    (False, False, True): ["dB"],
    (False, True, False): ["dS", "dA"],
    (False, True, True): ["lora_grads", "dA"],
    (True, False, False): ["dS", "gemm"],
    (True, False, True): ["lora_grads", "gemm"],
    (True, True, False): ["dS", "dA", "gemm"],
    (True, True, True): ["lora_grads", "dA", "gemm"],
}
SMALL = {  # the small products are the vendor's, but for dS with dB, and for those with a mask
    True: {"S": ["lora_shrink"], "dS": ["torch.addmm"], "dB": ["torch.matmul"], "dA": ["lora_grads"]},
    False: {"S": ["torch.addmm"], "dS": ["torch.addmm"], "dB": ["torch.matmul"], "dA": ["torch.matmul"]},
}
GEMM = {"fused": ["lora_gemm"], "lora-first": ["lora_expand", "torch.addmm"]}


@pytest.mark.parametrize("backend", STRATEGIES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=name_of)
def test_gradients_that_nobody_needs_are_not_computed_nor_any_of_the_frozen_weight(
    needs, p, backend, watched, launched
):
    """Each subset is right, none is missing, and costs its own kernels alone."""
    o = operands(20, 40, 24, 4)
    leaves = leaves_of(o, needs)
    with watched(*OUTPUTS):
        y = linear(leaves, o, backend, p)
        kernels = {**SMALL[p > 0], "gemm": GEMM[backend]}
        assert [name for name in launched if not name.startswith("sum_")] == [*kernels["S"], *kernels["gemm"]]
        assert y.requires_grad == any(needs)
        if not any(needs):
            return
        launched.clear()
        y.backward(o.dy)
    wanted = [kernel for name in NEEDED[needs] for kernel in kernels.get(name, [name])]
    assert [name for name in launched if not name.startswith("sum_")] == wanted
    exact = reference.lora_linear_grads(o.dy, o.x, o.w, o.a, o.b, S, *keep_of(p, SEED, 20, 24))
    for name, leaf, need in zip(NAMES, leaves, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad.double(), exact[name], rtol=1e-5, atol=1e-5)
            assert leaf.grad.ne(0).any()
    assert o.w.grad is None and o.bias.grad is None


def test_no_product_is_silently_left_on_the_slow_path(watched, launched):
    """With "fused" torch multiplies no matrix; with "lora-first" the frozen products alone."""
    o = operands(20, 40, 24, 4, BF16, FP32)
    products = {}
    for backend in STRATEGIES:
        launched.clear()
        with watched(*OUTPUTS):
            linear(leaves_of(o), o, backend, 0.3).backward(o.dy)
        products[backend] = [name for name in launched if name.startswith("torch.")]
    assert products == {"fused": [], "lora-first": ["torch.addmm"] * 2}


@pytest.mark.parametrize("backend", STRATEGIES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_saved_tensors_are_not_overwritten_so_a_second_backward_gives_the_first_ones_bits(p, backend, watched):
    """And another order of programs changes no bit of them: nothing is added up by atomics."""
    o = operands(40, 40, 30, 16, BF16, FP32)
    operand_copies = {name: t.clone() for name, t in vars(o).items()}
    leaves = leaves_of(o)
    with watched(*OUTPUTS, seed=3):
        y = linear(leaves, o, backend, p)
        first = torch.autograd.grad(y, leaves, o.dy, retain_graph=True)
    with watched(*OUTPUTS, seed=4):
        second = torch.autograd.grad(y, leaves, o.dy)
    with watched(*OUTPUTS, seed=5):
        again = linear(leaves, o, backend, p)
        third = torch.autograd.grad(again, leaves, o.dy)
    assert torch.equal(y, again)
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert all(torch.equal(t, operand_copies[name]) for name, t in vars(o).items())


@pytest.mark.parametrize("backend", STRATEGIES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_saved_for_backward_are_x_and_s(p, backend, watched):
    """What else is saved is the caller's own memory: no dropped X, no mask, no copy of the weights."""
    o = operands(32, 24, 40, 4, BF16, FP32)
    leaves = leaves_of(o)
    known = {t.untyped_storage().data_ptr() for t in (*leaves, *vars(o).values())}
    new = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            new.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with watched(*OUTPUTS), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(leaves, o, backend, p)
    assert new == [((32, 4), BF16)]


@pytest.mark.parametrize("backend", STRATEGIES)
def test_dropped_x_never_reaches_the_frozen_product(backend, watched):
    """With A = 0 there is no low-rank term, and every element of x counts."""
    o = operands(20, 40, 24, 4)
    with watched(*OUTPUTS):
        y = pf.lora_linear(o.x, o.w, o.a * 0, o.b, scaling=S, dropout_p=0.5, seed=SEED, backend=backend)
    assert_no_worse(y, product(o.x, o.w.T), o.x.double() @ o.w.double().T)


@pytest.mark.parametrize("backend", STRATEGIES)
def test_the_mask_is_in_the_gradient_of_x_and_of_the_low_rank_term_alone(backend, watched):
    o = operands(20, 40, 24, 4)
    keep, _ = keep_of(0.5, SEED, 20, 24)
    x = o.x.clone().requires_grad_()
    with watched(*OUTPUTS):
        y = pf.lora_linear(x, o.w * 0, o.a, o.b, scaling=S, dropout_p=0.5, seed=SEED, backend=backend)
        y.backward(o.dy)
    assert torch.equal(x.grad != 0, keep)
    with watched(*OUTPUTS):
        y = pf.lora_linear(x, o.w, o.a * 0, o.b, scaling=S, dropout_p=0.5, seed=SEED, backend=backend)
        (dx,) = torch.autograd.grad(y, x, o.dy)
    assert_no_worse(dx, product(o.dy, o.w), o.dy.double() @ o.w.double())


@pytest.mark.parametrize("backend", STRATEGIES)
@pytest.mark.parametrize("seed", [SEED, (1 << 63) + 5, -2])
def test_the_mask_is_that_of_the_torch_backend(seed, backend, watched):
    """So a run may go on with another backend, on another machine."""
    o = operands(17, 24, 40, 4)
    found = []
    for name in (backend, "torch"):
        leaves = leaves_of(o)
        with watched(*OUTPUTS):
            y = linear(leaves, o, name, 0.5, seed)
            found.append((y, *torch.autograd.grad(y, leaves, o.dy)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend, reentrant", [("fused", False), ("lora-first", False), ("fused", True)])
def test_dropout_is_restored_under_checkpointing(backend, reentrant, watched):
    module = pf.LoRALinear(torch.nn.Linear(40, 24, device=DEVICE), 4, 8, dropout=0.5, backend=backend)
    o = operands(16, 24, 40, 4)
    with torch.no_grad():
        module.lora_B.copy_(o.b)
    gradients = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        torch.manual_seed(4)
        leaf = o.x.clone().requires_grad_()
        for adapter in (module.lora_A, module.lora_B):
            adapter.grad = None
        with watched(*OUTPUTS):
            y = run(leaf)
            y.backward(o.dy)
        gradients.append((y, leaf.grad, module.lora_A.grad, module.lora_B.grad))
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", STRATEGIES)
def test_float32_adapters_do_not_widen_the_activations_of_a_16_bit_base(backend, watched, monkeypatch):
    made, new_empty = [], torch.Tensor.new_empty

    def recorded(self, *shape, **options):
        made.append(new_empty(self, *shape, **options))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    o = operands(70, 40, 48, 4, BF16, FP32)
    leaves = leaves_of(o)
    with watched(*OUTPUTS):
        y = linear(leaves, o, backend, 0.2)
        y.backward(o.dy)
    assert y.dtype == leaves[0].grad.dtype == BF16
    for leaf in leaves[1:]:  # and their gradients are not 16-bit numbers in float32
        assert leaf.grad.dtype == FP32 and not torch.equal(leaf.grad.to(BF16).float(), leaf.grad)
    assert not [t.shape for t in made if t.dtype == FP32 and t.shape in ((70, 40), (70, 48))]


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 24, 96, 129])
def test_the_rank_need_not_be_a_power_of_two(rank, watched):
    o = operands(6, 20, 24, rank)
    leaves = leaves_of(o)
    with watched(*OUTPUTS):
        linear(leaves, o, "fused", 0.2).backward(o.dy)
    exact = reference.lora_linear_grads(o.dy, o.x, o.w, o.a, o.b, S, *keep_of(0.2, SEED, 6, 24))
    for name, leaf in zip(NAMES, leaves, strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["triton", *STRATEGIES])
def test_an_unknown_gpu_gets_safe_tiles_and_no_error(backend, watched, monkeypatch):
    monkeypatch.setattr(dispatch, "target_of", lambda device: dispatch.Target("sm_999", 3, "GPU of next year"))
    dispatch.plan.cache_clear()
    o = operands(70, 80, 96, 4, BF16, FP32)
    try:
        with watched(*OUTPUTS):
            y = linear((o.x, o.a, o.b), o, backend)
        if backend == "triton":
            why = dispatch.plan(DEVICE, BF16, 70, 80, 96, 4, backend).why
            assert "sm_999" in why and "unknown" in why
    finally:
        dispatch.plan.cache_clear()
    same = plain(o.x, o.w, o.a, o.b, o.bias, None, 1.0)
    assert_no_worse(y, same, reference.lora_linear(o.x, o.w, o.a, o.b, S, o.bias))


def test_gradients_are_not_written_by_hand_but_pass_hooks_and_accumulate(watched):
    o = operands(8, 20, 24, 4)
    leaves = leaves_of(o)
    seen = []
    for leaf in leaves:
        leaf.register_hook(lambda gradient: seen.append(gradient.shape) or gradient * 2)
    for _ in range(2):
        with watched(*OUTPUTS):
            linear(leaves, o, "fused").backward(o.dy)
    assert sorted(seen) == sorted(2 * [leaf.shape for leaf in leaves])
    exact = reference.lora_linear_grads(o.dy, o.x, o.w, o.a, o.b, S)
    for name, leaf in zip(NAMES, leaves, strict=True):
        torch.testing.assert_close(leaf.grad.double(), 4 * exact[name], rtol=1e-5, atol=1e-5)


def test_gradients_that_come_expanded_and_leading_dimensions(watched):
    """The gradient of a sum has stride 0."""
    o = operands(12, 10, 8, 4)
    x = o.x.view(2, 2, 3, 8).requires_grad_()
    with watched(*OUTPUTS):
        y = pf.lora_linear(x, o.w, o.a, o.b, scaling=S, backend="fused")
        y.sum().backward()
        vector = pf.lora_linear(x[0, 0, 0].detach(), o.w, o.a, o.b, scaling=S, backend="fused")
    assert y.shape == (2, 2, 3, 10) and vector.shape == (10,)
    exact = reference.lora_linear_grads(torch.ones(12, 10, device=DEVICE), o.x, o.w, o.a, o.b, S)["x"]
    torch.testing.assert_close(x.grad.view(12, 8).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", STRATEGIES)
def test_a_weight_that_is_stored_transposed(backend, watched):
    """As GPT-2's Conv1D stores it: no copy of it is made, forward or backward."""
    o = operands(20, 40, 24, 4, BF16, FP32)
    stored = o.w.T.contiguous()
    leaves = leaves_of(o)
    with watched(*OUTPUTS):
        y = pf.lora_linear(leaves[0], stored.T, *leaves[1:], scaling=S, bias=o.bias, backend=backend)
        y.backward(o.dy)
    same = plain(o.x, o.w, o.a, o.b, o.bias, None, 1.0)
    assert_no_worse(y, same, reference.lora_linear(o.x, o.w, o.a, o.b, S, o.bias))
    dx = product(o.dy, o.w) + product(product(o.dy, o.b.to(BF16)) * S, o.a.to(BF16))
    assert_no_worse(leaves[0].grad, dx, reference.lora_linear_grads(o.dy, o.x, o.w, o.a, o.b, S)["x"])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_linear_norms(dtype, watched, launched):
    """The outputs are never written; leading dimensions are kept."""
    x, w = normal(2, 9, 48, dtype=dtype, seed=1), normal(70, 48, dtype=dtype, scale=0.2, seed=2)
    with watched("norms", "out") as check:
        norms = pf.linear_norms(x, w, backend="triton")
    assert launched[0].startswith("lora_gemm") and launched[1:] == ["sum_partials"]
    if check:
        assert check.counts()["y"].store.bytes == 0
    assert norms.shape == (2, 9) and norms.dtype == FP32
    torch.testing.assert_close(norms.double(), (x.double() @ w.double().T).norm(dim=-1), rtol=2e-5, atol=0)


def test_row_norms(watched, launched):
    y, bias = normal(2, 9, 48, dtype=BF16, seed=1), normal(48, dtype=BF16, seed=2)
    with watched("norms"):
        norms = ops.row_norms(y, bias, backend="triton")
    assert launched == ["row_norms"] and norms.shape == (2, 9)
    torch.testing.assert_close(norms.double(), (y.double() - bias.double()).norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["triton", *STRATEGIES])
@pytest.mark.parametrize(
    "rank, dtype, reason", [(257, FP32, "rank 257 is above 256"), (4, torch.float64, "float64 has no Triton kernels")]
)
def test_what_no_kernel_can_do_raises_the_reason(rank, dtype, reason, backend):
    o = operands(5, 300, 300, rank, dtype)
    with pytest.raises(pf.BackendError, match=reason):
        linear((o.x, o.a, o.b), o, backend)
    y = linear((o.x, o.a, o.b), o, "auto")
    torch.testing.assert_close(y.double(), reference.lora_linear(o.x, o.w, o.a, o.b, S, o.bias), rtol=1e-4, atol=1e-4)


def test_float64_norms_have_no_kernel():
    o = operands(3, 5, 8, 1, torch.float64)
    with pytest.raises(pf.BackendError, match="float64 has no Triton kernels"):
        pf.linear_norms(o.x, o.w, backend="triton")


def test_a_measured_strategy_and_tiles_are_taken(watched, launched):
    """Rows of the tuning table decide for backend="triton", and for descriptors only where operands allow one."""
    o = operands(20, 48, 64, 4, BF16, FP32, layout="aligned")
    target = dispatch.target_of(DEVICE)
    tiles = dispatch.Tiles(32, 32, 32, 4, 2, descriptor=target.name in ("interpreter", "sm_90", "sm_100"))
    dispatch.use_table({dispatch.key(target, BF16, 20, 48, 64, 4): ("fused", tiles)})
    try:
        with watched(*OUTPUTS):
            pf.lora_linear(o.x, o.w, o.a, o.b, scaling=S, backend="triton")
    finally:
        dispatch.use_table({})
    assert launched[-1] == ("lora_gemm_tma" if tiles.descriptor else "lora_gemm")


if DEVICE.type == "cuda":

    @pytest.mark.parametrize("backend", STRATEGIES)
    def test_no_stream_is_captured_at_import(backend):
        """Kernels go to the stream that is current at the call: behind the work that makes their operands there."""
        o = operands(64, 96, 128, 8, BF16, FP32)
        expected = linear((o.x, o.a, o.b), o, backend)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            y = linear((o.x * 1.0, o.a, o.b), o, backend)
        assert not stream.query()
        stream.synchronize()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", ["fused", "lora-first"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck_of_the_triton_branch(p, backend):
    o = operands(6, 10, 16, 3, FP32)
    seed = torch.tensor(7) if p else None
    ops = torch.ops.plopfast
    torch.library.opcheck(ops.lora_forward.default, (o.x, o.w, o.a, o.b, o.bias, S, p, seed, backend))
    s = ops.lora_forward(o.x, o.w, o.a, o.b, None, S, p, seed, backend)[1]
    torch.library.opcheck(
        ops.lora_backward.default, (o.dy, o.x, s, o.w, o.a, o.b, S, p, seed, backend, True, False, True)
    )
    torch.library.opcheck(ops.frozen_norms.default, (o.x, o.w, backend))
    torch.library.opcheck(ops.row_norms.default, (o.dy, o.bias, backend))
    torch.library.opcheck(ops.linear_and_norms.default, (o.x.bfloat16(), o.w.bfloat16(), None, p > 0, backend))


@pytest.mark.parametrize("backend", ["fused", "lora-first"])
def test_a_bias_of_any_stride_is_read_as_it_lies(backend):
    o = operands(5, 24, 16, 3, FP32)
    for bias in (torch.randn(24, 2, device=DEVICE)[:, 0], torch.randn(1, device=DEVICE).expand(24)):
        o.bias = bias
        exact = reference.lora_linear(o.x, o.w, o.a, o.b, S, bias)
        torch.testing.assert_close(linear((o.x, o.a, o.b), o, backend).double(), exact, rtol=1e-5, atol=1e-5)
