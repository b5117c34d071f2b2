"""What a trainer may do to a model's repeated blocks: recompute, offload, compile, or run liger-kernel's operations."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .config import TrainConfig
from .errors import ConfigError
from .models import blocks, device_of

OFFLOADED_BYTES = 1 << 20  # smaller tensors cost more in transfers than they free


@contextlib.contextmanager
def prepared_blocks(model: nn.Module, config: TrainConfig) -> Iterator[list[str]]:
    """Puts the config's choices in force while it lasts, and yields a line for each one that is.

    Raises ConfigError for choices that this model or device cannot take.
    """
    device, notes = device_of(model), []
    lean: list[nn.Module] = []
    if config.offload and device.type == "cpu":
        raise ConfigError(
            "offload moves activations from a GPU to CPU memory, but the model is on the CPU: leave it out"
        )
    if config.checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ConfigError(f"{type(model).__name__} has no gradient checkpointing in transformers: leave it out")
        _checkpointing(model, "enable")({"use_reentrant": False})
        notes.append("each block's activations are computed again in the backward pass")
    if config.liger and device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        # its losses stay out: ours needs no logits either, and knows the label positions
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        notes.append("norm, SwiGLU and RoPE by liger-kernel")
    elif not config.compile:
        lean = lean_mlps(model)
        if lean:
            notes.append(f"{len(lean)} gated MLPs save two tensors instead of three for the backward pass")
    if config.compile:
        for block in blocks(model).values():
            block.compile(dynamic=True)
        notes.append("blocks compiled by torch.compile")
    if config.offload:
        notes.append("activations kept in CPU memory until the backward pass")
    try:
        with offloaded(model) if config.offload else contextlib.nullcontext():
            yield notes
    finally:
        for module in lean:
            del module.forward
        if config.checkpointing:
            _checkpointing(model, "disable")()
        if config.compile:
            for block in blocks(model).values():
                block._compiled_call_impl = None


def _checkpointing(model: Any, what: str) -> Any:
    """transformers' switch, which 5.23 renamed."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")


class _SwiGLU(torch.autograd.Function):
    """silu(g) u, from g and u alone in the backward pass: torch's own graph keeps silu(g) too, a sixth of what a Llama
    block saves."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), nn.functional.silu(gate).mul_(dy)


@torch.no_grad()
def lean_mlps(model: nn.Module) -> list[nn.Module]:
    """Gives each MLP that computes down(silu(gate(x)) up(x)), as two random tokens show, a forward of its own with
    `_SwiGLU`; `del module.forward` undoes it. Returns those modules. (Sharded weights are left alone.)"""
    found, training = [], model.training
    model.eval()  # dropout would hide that two ways agree
    for module in model.modules():
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        weight = getattr(parts[0], "weight", None)
        if not all(isinstance(part, nn.Module) for part in parts) or type(weight) is not nn.Parameter:
            continue
        forward = _swiglu_mlp(*parts)
        x = torch.randn(2, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight)
        if "forward" not in vars(module) and torch.equal(module(x), forward(x)):
            module.forward = forward
            found.append(module)
    model.train(training)
    return found


def _swiglu_mlp(gate: Any, up: Any, down: Any) -> Any:
    return lambda x: down(_SwiGLU.apply(gate(x), up(x)))


def offloaded(model: nn.Module) -> Any:
    """A context in which tensors that autograd saves go to CPU memory and come back when the backward pass asks.

    Parameters and small tensors stay. The copies go to pinned memory without a wait: the stream keeps their order.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.nbytes < OFFLOADED_BYTES or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, kept.copy_(tensor, non_blocking=True)

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, kept = packed
        return kept.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
