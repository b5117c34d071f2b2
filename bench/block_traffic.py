"""Bytes that a whole Llama block moves, forward and backward, against the floor, PEFT and liger-kernel. Needs no GPU.

    python bench/block_traffic.py

The block is transformers' own, on the meta device. Every operation that torch dispatches counts its operands and results
once, as if it began with an empty cache that is large enough; a view costs nothing. Triton launches count as
tests/gpu/formulas.py says, which tests compare with the checked interpreter's exact count. liger-kernel's count the tensors
that their source loads and stores. Attention counts as flash attention does, for all alike: its operands and results once.
Nothing is recomputed.

The floor: each operation (a norm, the linears that read one input, rotary embedding, attention, a gate, an addition of
two branches) moves each of its inputs, weights, outputs and saved tensors once, and the adapters cost nothing.

Times are a roofline model, not measured: for every operation the longer of FLOPs / peak and bytes / bandwidth by the data
sheet, without a cache between operations and without launch overhead. The model of a step is that of all blocks, the
output head and the loss.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from plopfast.support import threads

threads.set_waiting_policy()

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "gpu"))

import formulas  # tests/gpu/formulas.py
import measure
import torch
import traffic  # tests/gpu/traffic.py, which comes before this file's folder
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import plopfast as pf
from plopfast.kernels import block_ops, dispatch, library_rows, triton_blocks
from plopfast.lora import ops, shared
from plopfast.lora.layer import adapters
from plopfast.models import lean, rotary
from plopfast.models.linears import linear_modules
from plopfast.training.blocks import liger

ROWS, TOKENS, RANK, LAYERS, VOCABULARY = 2, 4096, 16, 32, 128256
HIDDEN, HEADS, KV_HEADS, INNER = 4096, 32, 8, 14336
MIB, MODEL = 1 << 20, "model, not measured"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARED = (TARGETS[:3], TARGETS[4:6])
NEMO = 12473  # tokens/s of NeMo AutoModel: Llama-3-8B, LoRA of rank 16, one H100, 2 rows of 4,096 tokens
GPUS = {  # dense bfloat16 TFLOP/s and TB/s by the data sheet
    "H100 SXM": (989, 3.35), "A100 80GB SXM": (312, 2.04), "RTX 4090": (165, 1.01), "MI300X": (1307, 5.3),
}  # fmt: skip
FREE = ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "detach", "_unsafe_view", "alias")
LIGER = {  # kernel -> what it loads and what it stores
    "_rms_norm_forward_kernel": (("X_ptr", "W_ptr"), ("Y_ptr", "RSTD_ptr")),
    "_rms_norm_backward_kernel": (("dY_ptr", "X_ptr", "W_ptr", "RSTD_ptr"), ("dX_ptr",)),
    "_swiglu_forward_kernel": (("a_ptr", "b_ptr"), ("c_ptr",)),
    "_swiglu_backward_kernel": (("dc_ptr", "a_ptr", "b_ptr"), ("a_ptr", "b_ptr")),
    "_triton_rope": (("q_ptr", "k_ptr", "cos", "sin"), ("q_ptr", "k_ptr")),
}


@dataclass(frozen=True)
class Op:
    """What one operation or launch moves and computes."""

    name: str
    bytes: int
    flops: int = 0


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements: a broadcast dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


class Counter(TorchDispatchMode):
    """Records an Op for everything that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        found = function(*args, **options)
        name = function.overloadpacket.__name__
        if function.is_view or name in FREE:
            return found
        given = [*args, *(value for key, value in options.items() if key != "out")]
        loads = {id(t): t for t in tree_leaves(given) if isinstance(t, torch.Tensor)}
        if name in ("fill_", "zero_", "copy_") or (name == "addmm_" and not options.get("beta", 1)):
            del loads[id(args[0])]
        stores = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        flops = 0
        if name in ("mm", "addmm", "addmm_"):
            one, other = args[-2:]
            flops = 2 * one.shape[0] * one.shape[1] * other.shape[1]
        self.ops.append(Op(name, sum(map(size_of, [*loads.values(), *stores])), flops))
        return found


class _Attention(torch.autograd.Function):
    """Flash attention's bytes and FLOPs, causal; the backward pass computes S again."""

    @staticmethod
    def forward(ctx: Any, q, k, v, counter):
        ctx.save_for_backward(q, k, v)
        ctx.counter = counter
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        ctx.log_sums, ctx.flops = q.numel() // q.shape[-1] * 4, 2 * q.numel() * q.shape[2]
        counter.ops.append(Op("attention", sum(map(size_of, (q, k, v, out))) + ctx.log_sums, ctx.flops))
        return out

    @staticmethod
    def backward(ctx: Any, d_out):
        q, k, v = ctx.saved_tensors
        moved = 2 * sum(map(size_of, (q, k, v))) + 2 * size_of(d_out) + 2 * ctx.log_sums
        ctx.counter.ops.append(Op("attention", moved, ctx.flops * 5 // 2))
        gradients = [t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v)]
        return *gradients, None


def config_of(**sizes: int) -> transformers.LlamaConfig:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS} | sizes
    return transformers.LlamaConfig(num_key_value_heads=KV_HEADS, num_hidden_layers=1, vocab_size=64, **sizes)


def frozen() -> Any:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config_of()).to(torch.bfloat16).requires_grad_(False)


def with_adapters(backend: str) -> Any:
    """plopfast's block: its adapters, and the modules that share an input together."""
    model = frozen()
    placement = pf.Placement({info.name: (RANK, 32.0) for info in linear_modules(model)}, [], "explicit", 0)
    pf.inject(model, placement, backend=backend)
    for names in SHARED:  # find_shared_inputs needs values, as transformers' masks do
        members = [module for name, module in adapters(model).items() if name.endswith(names)]
        group = shared.SharedInput(members)
        for module in members:
            module.shared = group
    return model


def of_peft() -> Any:
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=list(TARGETS))
    return get_peft_model(frozen(), config, autocast_adapter_dtype=False)


def counted(model: Any, *contexts: contextlib.AbstractContextManager[Any]) -> list[Op]:
    """The operations of one block's forward and backward pass."""
    counter, (layer,) = Counter(), [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    x = torch.empty(ROWS, TOKENS, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    angles = x.new_empty(1, TOKENS, HIDDEN // HEADS)
    attention = lambda module, q, k, v, *_, **__: (_Attention.apply(q, k, v, counter), None)  # noqa: E731
    layer.self_attn.config._attn_implementation = "sdpa"
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
        launches = stack.enter_context(traffic.recorded(dispatch.Target("sm_90", 132)))
        stack.enter_context(counter)
        y = layer(x.view_as(x), position_embeddings=(angles, angles))
        y.backward(torch.empty_like(y))
    for launch in launches:
        if launch.grid:
            cost = formulas.cost(launch)
            counter.ops.append(Op(launch.kernel, cost.bytes, cost.useful))
    return counter.ops


def floor() -> list[Op]:
    """The block's operations, each of whose tensors is moved once. Weights are read once each way."""
    m, kv, two = ROWS * TOKENS, HIDDEN * KV_HEADS // HEADS, 2  # bytes of an element
    found = []

    def op(name: str, elements: int, flops: int = 0, more: int = 0) -> None:
        found.append(Op(name, two * m * elements + more, flops))

    for k, columns in ((HIDDEN, (HIDDEN, kv, kv)), (HIDDEN, (HIDDEN,)), (HIDDEN, (INNER, INNER)), (INNER, (HIDDEN,))):
        n = sum(columns)
        weights = two * k * n
        op("linear", k + n, 2 * m * k * n, weights)  # X, Y
        op("linear, backward", n + k + k, 2 * m * k * n, weights)  # dY, X for dA, dX
    for _ in range(2):
        op("norm", 2 * HIDDEN, more=4 * m)  # x, y, 1 / rms
        op("norm, backward", 3 * HIDDEN, more=4 * m)  # dy, x, dx
        op("addition", 3 * HIDDEN)
        op("addition, backward", 3 * HIDDEN)  # the gradients of two branches
        op("rotary embedding", 2 * (HIDDEN + kv))  # each way
    op("gate", 3 * INNER)
    op("gate, backward", 5 * INNER)
    sums, flops = 4 * m * HEADS, 2 * m * HIDDEN * TOKENS
    op("attention", 2 * HIDDEN + 2 * kv, flops, sums)
    op("attention, backward", 4 * HIDDEN + 4 * kv, flops * 5 // 2, 2 * sums)
    return found


def head_and_loss(way: str) -> list[Op]:
    """The output head and the loss of all tokens, forward and backward."""
    m, chunk = ROWS * TOKENS, 512 * MIB
    product = 2 * m * HIDDEN * VOCABULARY
    if way != "peft":
        chunks = -(-2 * m * VOCABULARY // chunk)
        weights, logits, hidden = 2 * HIDDEN * VOCABULARY * chunks, 2 * m * VOCABULARY, 2 * m * HIDDEN
        passes = (hidden + logits, logits + logits, logits + hidden)  # product, kernel, product
        return [
            Op("head", passes[0] + weights, product), Op("cross_entropy", passes[1]),
            Op("head, backward", passes[2] + weights, product),
        ]  # fmt: skip
    counter = Counter()
    hidden = torch.empty(m, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight, labels = hidden.new_empty(VOCABULARY, HIDDEN), hidden.new_empty(1, m, dtype=torch.long)
    with counter:
        logits = torch.nn.functional.linear(hidden.view_as(hidden), weight)
        loss = transformers.loss.loss_utils.ForCausalLMLoss(logits[None], labels, VOCABULARY)
        loss.backward()
    return counter.ops


def milliseconds(found: list[Op], gpu: str) -> float:
    """The roofline's."""
    peak, bandwidth = GPUS[gpu]
    return sum(max(op.flops / (peak * 1e9), op.bytes / (bandwidth * 1e9)) for op in found)


def per_token(found: list[Op]) -> float:
    """Bytes."""
    return sum(op.bytes for op in found) / (ROWS * TOKENS)


def by_operation(found: list[Op]) -> dict[str, float]:
    """Bytes a token, by the operation's name."""
    return {name: per_token([op for op in found if op.name == name]) for name in sorted({op.name for op in found})}


def plopfast(backend: str) -> list[Op]:
    """With the kernels that a GPU would take, which the meta device and the interpreter leave aside."""
    model = with_adapters(backend)
    layer = model.model.layers[0]
    for norm, members in zip((layer.input_layernorm, layer.post_attention_layernorm), SHARED, strict=True):
        norm.forward = lean.LeanNorm(norm, "narrow", norm.variance_epsilon)
        first = next(module for name, module in adapters(model).items() if name.endswith(members))
        first.shared.producer = norm
    layer.mlp.forward = lean.LeanMLP(layer.mlp, "silu")
    source = sys.modules[type(layer).__module__]
    return counted(
        model,
        mock.patch.object(dispatch, "interpreting", lambda: False),
        mock.patch.object(ops, "is_direct", lambda x: True),
        mock.patch.object(shared, "is_direct", lambda x: True),
        mock.patch.object(torch, "is_autocast_enabled", lambda device: False),
        mock.patch.object(block_ops, "_ops", lambda x, backend: triton_blocks),
        mock.patch.object(rotary, "_op", lambda q: library_rows.rotary),
        mock.patch.object(source, rotary.NAME, lambda q, k, cos, sin, unsqueeze_dim=1: rotary.rotary(q, k, cos, sin)),
        shared.Prepared(model),
    )


def of_liger() -> list[Op]:
    """PEFT with liger-kernel's norms, SwiGLU and rotary embedding."""
    model = of_peft()
    formulas.FORMULAS.update(
        {name: formulas.elementwise(*loads, stores=stores) for name, (loads, stores) in LIGER.items()}
    )
    with liger(model.base_model.model):
        return counted(model)


def main() -> None:
    ways: dict[str, Callable[[], list[Op]]] = {
        "floor": floor,
        "plopfast, fused": lambda: plopfast("fused"),
        "plopfast, LoRA-first": lambda: plopfast("lora-first"),
        "plopfast, plain torch's linears": lambda: plopfast("torch"),
        "PEFT": lambda: counted(of_peft()),
    }
    if importlib.util.find_spec("liger_kernel"):
        ways[f"PEFT, liger-kernel {importlib.metadata.version('liger_kernel')}"] = of_liger
    else:
        print("no row for liger-kernel, which is not installed", file=sys.stderr)
    found = {way: count() for way, count in ways.items()}
    least, most = per_token(found["floor"]), per_token(found["PEFT"])
    lines = [
        f"One block of Llama-3-8B, {ROWS} x {TOKENS} tokens, rank {RANK} on all seven linears, bfloat16, grids of H100 SXM",
        f"{'':<33}{'bytes a token':>14}{'of the floor':>14}{'of PEFT':>9}",
    ]
    for way, one in found.items():
        lines.append(f"{way:<33}{per_token(one):>14,.0f}{per_token(one) / least:>14.3f}{per_token(one) / most:>9.3f}")
    lines += [
        "",
        f"Roofline ({MODEL}): ms of a block, and tokens/s of a step of {LAYERS} blocks, output head and loss",
        f"{'':<33}" + "".join(f"{gpu:>22}" for gpu in GPUS),
    ]
    modelled = {}
    for way, one in found.items():
        loss = head_and_loss("peft" if way.startswith("PEFT") else "ours")
        rates = {}
        for gpu in GPUS:
            block = milliseconds(one, gpu)
            rates[gpu] = block, ROWS * TOKENS / (LAYERS * block + milliseconds(loss, gpu)) * 1e3
        modelled[way] = {gpu: {"block, ms": block, "tokens/s": rate} for gpu, (block, rate) in rates.items()}
        lines.append(f"{way:<33}" + "".join(f"{block:>12.2f}{rate:>10,.0f}" for block, rate in rates.values()))
    lines.append(f"NeMo AutoModel measured {NEMO:,} tokens/s on one H100 (its own figure, not run here).")
    figures = {
        "bytes_a_token": {way: per_token(one) for way, one in found.items()},
        "by_operation": {way: by_operation(one) for way, one in found.items()},
        MODEL: modelled,
    }  # fmt: skip
    measure.save("block_traffic", "\n".join(lines), figures)


if __name__ == "__main__":
    main()
