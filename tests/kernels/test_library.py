"""The registered ops as torch sees them: opcheck, torch.compile without graph breaks, checkpointing, autocast."""

import itertools

import pytest
import torch
import torch._inductor.config
import transformers
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import plopfast as pf
from plopfast.kernels import dispatch, library_many, library_rows  # noqa: F401  # the last two register operations
from plopfast.lora.layer import replace_module

OPS = pf.lora_linear and torch.ops.plopfast  # the lookup registers the ops
S = 1.7


def operands(m=6, n=10, k=8, r=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return draw(m, k), draw(n, k), draw(r, k), draw(n, r), draw(n), draw(m, n)


@pytest.mark.parametrize(
    "m, p, dtype",
    [(6, 0.3, torch.float32), (6, 0.0, torch.bfloat16), (0, 0.3, torch.bfloat16), (1, 0.0, torch.float32)],
)
def test_opcheck(m, p, dtype):
    x, w, a, b, bias, dy = operands(m, dtype=dtype)
    seed = torch.tensor(7) if p else None
    for some_bias in (None, bias):
        torch.library.opcheck(OPS.lora_forward.default, (x, w, a, b, some_bias, S, p, seed, "auto"))
    s = OPS.lora_forward(x, w, a, b, None, S, p, seed, "auto")[1]
    for needs in itertools.product([False, True], repeat=3) if dtype == torch.float32 and p else [(True, False, True)]:
        torch.library.opcheck(OPS.lora_backward.default, (dy, x, s, w, a, b, S, p, seed, "auto", *needs))
    torch.library.opcheck(OPS.frozen_norms.default, (x, w, "auto"))
    for some_bias in (None, bias):
        torch.library.opcheck(OPS.row_norms.default, (dy, some_bias, "auto"))
        torch.library.opcheck(OPS.linear_and_norms.default, (x, w, some_bias, some_bias is None, "auto"))


@pytest.mark.parametrize("drop", [False, True])
def test_opcheck_of_several_adapters(drop):
    x, w, a, b, bias, dy = operands()
    lists = [a, None, a[:2]], [b, None, b[:, :2].contiguous()]
    ps, seeds = ([0.3, 0.0, 0.5], [torch.tensor(7), None, torch.tensor(8)]) if drop else ([], [])
    how = [0, 1, 3, 6], [S, 0.0, 0.5], ps, seeds, "auto"
    for some_bias in (None, bias):
        torch.library.opcheck(OPS.many_forward.default, (x, w, *lists, some_bias, *how))
    s = OPS.many_forward(x, w, *lists, bias, *how)[1]
    for need_x, first in itertools.product([False, True], repeat=2):
        needed = need_x, [first, False, True], [True, False, first]
        torch.library.opcheck(OPS.many_backward.default, (dy, x, s, w, *lists, *how, *needed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_rows(dtype):
    """Rotary embedding, and cross-entropy, which changes its logits and says so."""
    q, k = torch.randn(2, 3, 4, 8, dtype=dtype), torch.randn(2, 4, 1, 8, dtype=dtype).transpose(1, 2)
    cos, targets = torch.randn(1, 4, 6, dtype=dtype), torch.tensor([1, 0, 6])
    for interleaved, backward in itertools.product([False, True], repeat=2):
        torch.library.opcheck(OPS.rotary.default, (q, k, cos, cos, interleaved, backward, "auto"))
    for bias, gradient in itertools.product([None, torch.randn(7, dtype=dtype)], [False, True]):
        z = torch.randn(3, 7, dtype=dtype)
        torch.library.opcheck(OPS.cross_entropy_.default, (z, targets, bias, 1.5, 2.0, gradient, "auto"))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@torch._inductor.config.patch(fallback_random=True)  # else inductor draws other seeds than eager
def test_compiled_linear_is_the_eager_one(dropout, compiler):
    torch._dynamo.reset()
    module = pf.LoRALinear(torch.nn.Linear(16, 24), 4, 8, dropout=dropout).train()
    torch.nn.init.normal_(module.lora_B)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for shape in ((5, 16), (2, 7, 16)):
        results = []
        for call in (module, compiled):
            torch.manual_seed(3)
            x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
            y = call(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, module.lora_A.grad.clone(), module.lora_B.grad.clone()))
            module.zero_grad()
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-5)


def block(dropout=0.0):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0)
    for name, module in list(layer.named_modules()):
        if isinstance(module, torch.nn.Linear):
            wrapped = pf.LoRALinear(module, 4, 8, dropout=dropout)
            torch.nn.init.normal_(wrapped.lora_B, std=0.1)
            replace_module(layer, name, wrapped)
    for parameter_name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    x = torch.randn(2, 9, 32)
    angles = torch.randn(1, 9, 8)
    return layer, x, (angles.cos(), angles.sin())


def gradients(layer):
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    return found


def test_compiled_block_is_the_eager_one():
    torch._dynamo.reset()
    layer, x, rotary = block()
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(x, position_embeddings=rotary)
        y = y[0] if isinstance(y, tuple) else y
        y.square().sum().backward()
        results.append((y.detach(), gradients(layer)))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert len(results[0][1]) == 14
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_block_draws_the_same_masks(reentrant):
    layer, x, rotary = block(dropout=0.5)
    x.requires_grad_()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        call = lambda t: layer(t, position_embeddings=rotary)  # noqa: E731
        y = checkpoint(call, x, use_reentrant=reentrant) if checkpointed else call(x)
        y = y[0] if isinstance(y, tuple) else y
        y.square().sum().backward()
        results.append(gradients(layer))
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


def test_autocast_computes_in_its_dtype_with_gradients_in_the_adapters():
    x, w, a, b, bias, _ = operands()
    a, b = a.requires_grad_(), b.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = pf.lora_linear(x, w, a, b, scaling=S, bias=bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


def test_triton_on_a_cpu_says_why_not():
    x, w, a, b, *_ = operands()
    for backend in ("triton", "fused", "lora-first"):
        with pytest.raises(pf.BackendError, match=f"{backend}.*cpu.*needs an NVIDIA GPU"):
            pf.lora_linear(x, w, a, b, scaling=S, backend=backend)
        with pytest.raises(pf.BackendError, match="cannot run"):
            pf.LoRALinear(torch.nn.Linear(8, 10), 3, 6, backend=backend)
    with pytest.raises(pf.BackendError, match="expected one of auto, torch"):
        pf.lora_linear(x, w, a, b, scaling=S, backend="tritn")
    with pytest.raises(pf.BackendError, match="cannot run"):
        pf.linear_norms(x, w, backend="triton")


@pytest.fixture
def gpu(monkeypatch):
    """A meta tensor's device that stands for a GPU of our choice."""

    def choose(name, units=132):
        dispatch.plan.cache_clear()
        monkeypatch.setattr(dispatch, "_driver_target", lambda *_: dispatch.Target(name, units, "Test GPU"))
        return torch.device("meta")

    yield choose
    dispatch.plan.cache_clear()


@pytest.mark.parametrize("name", [*dispatch.GEMM_TILES, "sm_103", "sm_999", "gfx1201"])
def test_every_gpu_gets_a_plan_known_or_not(gpu, name):
    shape = torch.bfloat16, 8192, 4096, 4096, 16
    plan = dispatch.plan(gpu(name), *shape)
    assert (plan.backend, plan.tiles) == ("torch", None) and "not measured" in plan.why
    for dropped in (dispatch.plan(gpu(name), *shape, drop=True), dispatch.plan(gpu(name), *shape, "triton")):
        assert (dropped.backend, dropped.strategy) == ("triton", "lora-first")
        assert ("unknown" in dropped.why) == (name not in dispatch.GEMM_TILES)
    fused = dispatch.plan(gpu(name), torch.bfloat16, 8192, 4096, 4096, 16, "fused")
    assert fused.strategy == "fused" and fused.tiles in dispatch.GEMM_TILES.get(name, dispatch.SAFE_TILES)
    assert not dispatch.plan(gpu(name), torch.bfloat16, 8192, 4096, 4099, 16, "fused", False).tiles.descriptor


def test_what_triton_has_no_kernel_for_goes_to_torch_and_says_so(gpu):
    device = gpu("sm_90")
    assert dispatch.plan(device, torch.float64, 8, 8, 8, 4).why == "torch.float64 has no Triton kernels"
    assert dispatch.plan(device, torch.bfloat16, 8, 512, 512, 257).why == "rank 257 is above 256"
    for dtype, rank in ((torch.float64, 4), (torch.bfloat16, 257)):
        with pytest.raises(dispatch.UnsupportedError, match="choose 'torch'"):
            dispatch.plan(device, dtype, 8, 512, 512, rank, "fused")


def test_a_measured_row_decides(gpu):
    device = gpu("sm_90")
    row = ("fused", dispatch.SAFE_TILES[0])
    try:
        dispatch.use_table({dispatch.key(dispatch.target_of(device), torch.bfloat16, 5000, 4096, 4096, 13): row})
        plan = dispatch.plan(device, torch.bfloat16, 8192, 4096, 4096, 16)
        assert (plan.strategy, plan.tiles, plan.why) == (*row, "measured on this GPU")
        for m, near in ((8192, True), (2048, True), (32768, True), (1024, False), (65536, False), (1, False)):
            found = dispatch.plan(device, torch.bfloat16, m, 4096, 4096, 16)
            assert (found.strategy == "fused") is near, "four times as many tokens, or a quarter, at most"
        assert dispatch.plan(device, torch.bfloat16, 8192, 4096, 4096, 17).backend == "torch"
        assert dispatch.plan(device, torch.float16, 8192, 4096, 4096, 16).backend == "torch"
        dispatch.use_table(dict.fromkeys(dispatch.TABLE, ("torch", dispatch.SAFE_TILES[0])))
        plan = dispatch.plan(device, torch.bfloat16, 8192, 4096, 4096, 16)
        assert (plan.backend, plan.why) == ("torch", "measured on this GPU")
        assert dispatch.plan(device, torch.bfloat16, 8192, 4096, 4096, 16, drop=True).backend == "triton"
        assert dispatch.plan(device, torch.bfloat16, 8192, 4096, 4096, 16, "lora-first").strategy == "lora-first"
    finally:
        dispatch.use_table({})


def test_old_gpus_are_refused_with_the_reason(monkeypatch):
    dispatch.cannot_run.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    device = torch.device("cuda", 5)
    assert dispatch.resolve(device, "auto") == "torch"
    with pytest.raises(dispatch.UnsupportedError, match="Tesla T4 has compute capability 7.5; 8.0 is the lowest"):
        dispatch.resolve(device, "triton")
    dispatch.cannot_run.cache_clear()
