"""What a training may do to a model's repeated blocks: recompute, offload, compile, or use liger-kernel or lean modules."""

import contextlib
import importlib.util
import sys
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..models.frozen import find_frozen, is_sharded
from ..models.linears import blocks
from ..models.rotary import rotated
from ..models.running import device_of, evaluating
from ..support.config import TrainConfig
from ..support.errors import ConfigError, TrainingError

OFFLOADED_BYTES = 1 << 20  # smaller tensors cost more in transfers than they free


@contextlib.contextmanager
def prepared_blocks(model: nn.Module, config: TrainConfig, lean: Collection[str] | None = None) -> Iterator[list[str]]:
    """Applies the config's choices while it lasts, and yields a line about each one that is in force. `lean` is what
    `lean_modules` takes as `known`; given it, no rotary embedding is replaced, as tensors may have no values to compare.

    Raises ConfigError for choices that this model or device does not allow.
    """
    device, notes = device_of(model), []
    if config.offload and device.type == "cpu":
        raise ConfigError("offload moves activations to CPU memory, but the model is on the CPU: leave it out")
    if config.offload and any(is_sharded(parameter) for parameter in model.parameters()):
        raise ConfigError("offload with --parallel fsdp would move the gathered weights too: use checkpointing instead")
    if config.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing in transformers: leave it out")
    with contextlib.ExitStack() as undo:
        if config.checkpointing:
            undo.enter_context(recomputed(model))
            notes.append("each block's activations are computed again in the backward pass")
        by_liger = config.liger and device.type == "cuda" and importlib.util.find_spec("liger_kernel")
        if lean is None and not by_liger and not config.compile and undo.enter_context(rotated(model)):
            notes.append("rotary embedding of queries and keys in one operation")
        if by_liger:
            undo.enter_context(liger(model))
            notes.append("norm, SwiGLU and RoPE by liger-kernel, as far as it knows this model")
        elif not config.compile and (found := lean_modules(model, lean)):
            for module in found.values():
                undo.callback(delattr, module, "forward")
            notes.append(f"{len(found)} norms and gated MLPs in fewer operations that keep less for the backward pass")
        if config.compile:
            for block in blocks(model).values():
                undo.callback(setattr, block, "_compiled_call_impl", block._compiled_call_impl)
                block.compile(dynamic=True)
            notes.append("blocks compiled by torch.compile")
        if config.offload:
            undo.enter_context(offloaded(model))
            notes.append("activations kept in CPU memory until the backward pass")
        try:
            yield notes
        except RuntimeError as error:
            if not (config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))):
                raise
            first = next(filter(None, str(error).splitlines()), type(error).__name__)
            raise TrainingError(
                f"torch.compile failed on this model or machine ({first}): leave out --compile"
            ) from error


@contextlib.contextmanager
def liger(model: nn.Module) -> Iterator[None]:
    """Puts liger-kernel's norm, SwiGLU and RoPE into the model while it lasts. Afterwards the model's modules are as before,
    and so are the names that liger replaces in the model's source file. Its losses are not used: ours needs no logits
    either, and knows the label positions."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    source = vars(sys.modules[type(model).__module__])
    names, states = dict(source), [(module, dict(vars(module))) for module in model.modules()]
    try:
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        yield
    finally:
        source.update(names)
        for module, state in states:
            for name in set(vars(module)) - set(state):
                del vars(module)[name]
            vars(module).update({name: state[name] for name in ("forward", "extra_repr") if name in state})


@contextlib.contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Switches transformers' gradient checkpointing on while it lasts. Afterwards the model is as before: transformers' own
    way to switch it off leaves a hook on the embeddings, and a checkpointing of the user's would be off too."""
    hooks = ("_require_grads_hooks", "_require_grads_hook")
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", *hooks)
    states = [(vars(m), {name: vars(m)[name] for name in names if name in vars(m)}) for m in model.modules()]
    # 5.23 renamed it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
        yield
    finally:
        for now, before in states:
            for name in names:
                if name in hooks and now.get(name) is not before.get(name):
                    for hook in now[name] if isinstance(now[name], list) else [now[name]]:
                        hook.remove()
                now.pop(name, None)
            now.update(before)


class _SwiGLU(torch.autograd.Function):
    """silu(g) u. The backward pass needs only g and u; torch's own graph keeps silu(g) too, a sixth of what a Llama block
    saves."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), nn.functional.silu(gate).mul_(dy)


class _RMSNorm(torch.autograd.Function):
    """y = w x / rms(x). The backward pass needs x and 1 / rms(x) [..., 1], and passes over x 8 times where autograd does 18:

    dx = (g - x mean(g x) / rms(x)^2) / rms(x),   g = w dy
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        g = (dy * weight).float()
        mean = (g * x).sum(-1, keepdim=True).div_(x.shape[-1])
        return g.mul_(scale).addcmul_(x.float(), mean.mul_(scale**3), value=-1).to(x.dtype), None, None


@torch.no_grad()
def lean_modules(model: nn.Module, known: Collection[str] | None = None) -> dict[str, nn.Module]:
    """Gives RMS norms and gated MLPs a forward with `_RMSNorm` and `_SwiGLU`, and returns these modules by name.
    `del module.forward` undoes it.

    A module is recognised by what it computes for a few random tokens. Where the tensors have no values, `known` names
    the modules that were found in a model like this one. Trained norms and sharded weights are left alone.
    """
    found = {}
    with evaluating(model):  # dropout would hide that two ways agree
        for name, module in model.named_modules():
            forward, width, like = _lean_forward(module)
            if forward is None or "forward" in vars(module):
                continue
            if name in known if known is not None else _agree(module, forward, width, like):
                found[name] = module, forward
    for module, forward in found.values():  # now that nothing more can raise
        module.forward = forward
    return {name: module for name, (module, _) in found.items()}


def _agree(module: nn.Module, forward: Any, width: int, like: torch.Tensor) -> bool:
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0)).to(like)
    one, other = module(x), forward(x)
    return one.shape == other.shape and bool((one - other).norm() <= 4 * torch.finfo(x.dtype).eps * one.norm())


def _lean_forward(module: Any) -> tuple[Any, int, Any]:
    """Returns (forward, width of its input, a tensor of the input's dtype and device); (None, 0, None) for other modules."""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up, down = parts
    frozen = find_frozen(gate) if all(isinstance(part, nn.Module) for part in parts) else None
    if frozen and not is_sharded(frozen.stored):
        return lambda x: down(_SwiGLU.apply(gate(x), up(x))), frozen.shape[1], frozen.stored
    weight: Any = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", None)
    is_frozen_vector = isinstance(weight, nn.Parameter) and weight.dim() == 1 and not weight.requires_grad
    if eps is not None and is_frozen_vector and not is_sharded(weight):
        plain = module.forward  # for inputs that are wider than the weights
        return lambda x: _RMSNorm.apply(x, weight, eps) if x.dtype == weight.dtype else plain(x), len(weight), weight
    return None, 0, None


class _Moved:
    """A tensor's copy in CPU memory, and the `device` it was on."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device, self.origin = tensor.device, weakref.ref(tensor)
        kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self.kept = kept.copy_(tensor, non_blocking=True)


def offloaded(model: nn.Module) -> Any:
    """Returns a context in which tensors that autograd saves move to CPU memory, until the backward pass needs them.

    Parameters and small tensors stay. What several operations save is moved once. The copies go to pinned memory without
    a wait: the stream keeps their order.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    moved: weakref.WeakValueDictionary[Any, _Moved] = weakref.WeakValueDictionary()

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.nbytes < OFFLOADED_BYTES or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        key = tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype
        found = moved.get(key)
        if found is None or found.origin() is None:  # else the address may have been given to another tensor
            found = moved[key] = _Moved(tensor)
        return found

    def unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed.kept.to(packed.device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
