"""What `plopfast bench` runs: the cases, their operands, and the modules that compete.

M tokens, K in, N out, R rank.
"""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..kernels import reference
from ..lora.layer import LoRALinear, replace_module
from ..support.errors import ConfigError

MODELS = {"llama-8b": (4096, 14336, 32, 8), "smollm2": (576, 1536, 9, 3)}  # hidden, MLP, heads, key-value heads
TINY = {"tiny": (64, 96, 4, 2)}  # of a dry run
C = 2.0  # alpha / rank
SEQUENCE = 2048  # tokens of a layer's sequences
Shapes = str | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """A linear with adapters, a whole layer of them, or the single kernels of one linear."""

    kind: str  # "linear", "layer" or "ops"
    label: str
    m: int
    n: int
    k: int
    rank: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """M, N, K, R"""
        return self.m, self.n, self.k, self.rank

    def __str__(self) -> str:
        return f"{self.label} {self.m}x{self.k}->{self.n} R{self.rank}"


def cases(shapes: Shapes, dry: bool) -> list[Case]:
    """The cases of models by name, of "all", or of pairs (in, out); a dry run has its own. Raises ConfigError."""
    many, few, rank = (48, 32, 4) if dry else (8192, 512, 16)
    if not dry and not isinstance(shapes, str):
        return [Case(kind, "pair", many, n, k, rank) for kind in ("linear", "ops") for k, n in shapes]
    if not dry and shapes not in ("all", *MODELS):
        raise ConfigError(f"shapes: expected {', '.join(MODELS)}, all or pairs (in, out), got {shapes!r}")
    found = []
    for model, (h, mlp, heads, kv) in (TINY if dry else MODELS).items():
        if dry or shapes in (model, "all"):
            sides = {"q/o": (h, h), "k/v": (h // heads * kv, h), "gate/up": (mlp, h), "down": (h, mlp)}
            linears = [Case("linear", f"{model} {name}", many, n, k, rank) for name, (n, k) in sides.items()]
            found += [*linears, replace(linears[0], m=few), replace(linears[0], rank=4 * rank)]
            if importlib.util.find_spec("transformers"):
                found.append(Case("layer", f"{model} layer", many, h, h, rank))
            found += [replace(case, kind="ops") for case in linears]
    return found


def operands(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The frozen linear or layer, x [..., K] and dy [..., N]."""
    torch.manual_seed(0)
    layer = case.kind == "layer"
    rows = (-1, min(case.m, SEQUENCE)) if layer else (case.m,)
    with torch.device(device):
        base = Layer(*{**MODELS, **TINY}[case.label.split()[0]]) if layer else nn.Linear(case.k, case.n, bias=False)
        x, dy = (torch.randn(case.m, side).to(dtype).view(*rows, side) for side in (case.k, case.n))
    return base.to(dtype).requires_grad_(False), x.requires_grad_(), dy


def ops(x, dy, w, a, b, s, ds, kernels: Any = None) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Each op in plain torch and in Triton. In float64, plain torch is the specification; else it is the yardstick."""
    return {
        "shrink": (lambda: C * (x @ a.to(x.dtype).T), lambda: kernels.shrink(x, a, C)),
        "expand": (lambda: s @ b.to(s.dtype).T, lambda: kernels.low_rank(s, b)),
        "grads dS+dB": (lambda: (C * (dy @ b.to(s.dtype)), dy.T @ s), lambda: kernels.grad_s_and_b(dy, s, b, C)),
        "grad dA": (lambda: ds.T @ x, lambda: kernels.grad_a(ds, x, 0.0, 0, a.dtype)),
        "row norms": (lambda: dy.norm(dim=1), lambda: kernels.row_norms(dy)),
        "gemm": (lambda: x @ w.T, lambda: kernels.gemm(x, w)[0]),
        "gemm + low rank": (lambda: (s @ b.to(s.dtype).T).addmm_(x, w.T), lambda: kernels.gemm(x, w, s, b)[0]),
    }


def op_work(op: str, case: Case, itemsize: int) -> tuple[float, float]:
    """FLOPs of a product, which arithmetic bounds, or bytes that another op has to move, as memory bounds it; else 0."""
    m, n, k, r = case.sizes
    if op.startswith("gemm"):
        return 2.0 * m * n * (k + r * (op != "gemm")), 0.0
    read = {"shrink": m * (k + r), "expand": m * (n + r), "grads dS+dB": m * (n + 2 * r), "grad dA": m * (k + r)}
    return 0.0, float(read.get(op, m * n) * itemsize)


class Plain(LoRALinear):
    """A LoRA linear as one writes it without a library: the yardstick, and for float64 inputs the specification."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, a, b = self.frozen.weight_NK, self.lora_A, self.lora_B
        if x.dtype == torch.float64:
            return reference.lora_linear(x.flatten(0, -2), w, a, b, C).unflatten(0, x.shape[:-1])
        return x @ w.T + C * (x @ a.to(x.dtype).T @ b.to(x.dtype).T)


class Layer(nn.Module):
    """transformers' Llama layer: attention through SDPA, rotary positions, seven linears. x [rows, tokens, hidden]."""

    def __init__(self, hidden: int, mlp: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        from transformers.models.llama import modeling_llama as llama

        config = llama.LlamaConfig(
            hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )  # fmt: skip
        self.layer = llama.LlamaDecoderLayer(config, 0)
        rotary = llama.LlamaRotaryEmbedding(config)
        self.angles = nn.Buffer(torch.stack(rotary(torch.empty(1), torch.arange(SEQUENCE)[None])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, position_embeddings=tuple(self.angles[:, :, : x.shape[1]]))


class LigerLayer(nn.Module):
    """A `Layer`, adapted or not, with liger-kernel's norms, SwiGLU and rotary positions in place of transformers'."""

    def __init__(self, inner: Layer) -> None:
        super().__init__()
        from liger_kernel.transformers import apply_liger_kernel_to_llama, liger_rotary_pos_emb
        from transformers.models.llama import modeling_llama

        layer, self.source = inner.layer, vars(modeling_llama)
        before = dict(self.source)
        model: Any = SimpleNamespace(base_model_prefix="", layers=[layer], norm=layer.input_layernorm)
        apply_liger_kernel_to_llama(rope=False, fused_linear_cross_entropy=False, model=model)
        self.source.update(before)  # other layers stay as they are
        self.inner, self.rotate = inner, liger_rotary_pos_emb

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.source["apply_rotary_pos_emb"]
        self.source["apply_rotary_pos_emb"] = self.rotate  # it is a name in a file of transformers', and no module's
        try:
            return self.inner(x)
        finally:
            self.source["apply_rotary_pos_emb"] = before


def adapted(base: nn.Module, kind: type[LoRALinear] | str, rank: int, backend: str = "torch") -> nn.Module:
    """`base` with adapters on every linear, its weights shared.

    `kind` "peft" is PEFT's, in the base's dtype; "liger" is that with liger-kernel in the rest of a layer.

    All variants have the same A and B, whatever order a library makes them in. bfloat16 holds these numbers exactly, so
    every other dtype does too.
    """
    root = nn.Sequential(copy.deepcopy(base, {id(p): p for p in base.parameters()}))
    linears = {name: module for name, module in root.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(kind, str):
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=int(C * rank), target_modules=list(linears)), root)
        root.to(next(base.parameters()).dtype)
    else:
        for name, module in linears.items():
            replace_module(root, name, kind(module, rank, C * rank, backend=backend))
    generator = torch.Generator().manual_seed(0)
    for p in adapters(root):
        p.data.copy_((torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5).bfloat16())
    return LigerLayer(root[0]) if kind == "liger" else root[0]  # type: ignore[arg-type]


def adapters(module: nn.Module) -> list[torch.Tensor]:
    """Every A and B of a module, ours or PEFT's."""
    return [parameter for name, parameter in module.named_parameters() if "lora_" in name]


def step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, trained: list[torch.Tensor]) -> list[torch.Tensor]:
    """Forward and backward: the output, then the gradients of x and of the adapters `trained`."""
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]
