"""What a training may do to a model's repeated blocks: recompute, offload, compile, or use liger-kernel or lean modules."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..lora.layer import every_adapter
from ..lora.shared import apart
from ..models.frozen import is_sharded, streamed_in
from ..models.lean import lean_modules
from ..models.linears import blocks
from ..models.rotary import rotated
from ..models.running import device_of
from ..models.tiles import Tiled, token_wise
from ..support.config import TrainConfig
from ..support.errors import ConfigError, TrainingError, first_line
from .moments import library
from .offload import offloaded


@contextlib.contextmanager
def prepared_blocks(
    model: nn.Module, config: TrainConfig, lean: Mapping[str, str] | None = None
) -> Iterator[list[str]]:
    """Applies the config's choices while it lasts, and yields a line about each one that is in force. `lean` is what
    `lean_modules` and `token_wise` take as `known`; given it, no rotary embedding is replaced, as tensors may have no values
    to compare.

    Raises ConfigError for choices that this model or device does not allow.
    """
    device, notes = device_of(model), []
    if config.offload and device.type == "cpu":
        raise ConfigError("offload moves activations to CPU memory, but the model is on the CPU: leave it out")
    if config.offload and any(is_sharded(parameter) for parameter in model.parameters()):
        raise ConfigError("offload with --parallel fsdp would move the gathered weights too: use checkpointing instead")
    if streamed_in(model):
        _check_streamed(model, config)
    if config.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing in transformers: leave it out")
    if config.liger and device.type == "cpu":
        raise ConfigError("liger-kernel runs on GPUs, but the model is on the CPU: leave out --liger")
    if config.liger and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("liger-kernel is not installed: pip install liger-kernel, or leave out --liger")
    with contextlib.ExitStack() as undo:
        if config.checkpointing:
            undo.enter_context(recomputed(model))
            notes.append("each block's activations are computed again in the backward pass")
        if lean is None and not config.liger and not config.compile and undo.enter_context(rotated(model)):
            notes.append("rotary embedding of queries and keys in one operation")
        if config.liger:
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
        if config.mlp_rows:
            notes.append(undo.enter_context(tiled(model, config.mlp_rows, lean)))
        if config.optimizer == "adamw8bit":
            notes.append(f"AdamW's moments in 8 bits, by {library()}")
        if config.keep_best == "cpu" and device.type != "cpu":
            notes.append("the best adapters so far kept in CPU memory")
        if config.offload:
            undo.enter_context(offloaded(model))
            notes.append("activations kept in CPU memory until the backward pass, and fetched a block ahead")
        try:
            yield notes
        except RuntimeError as error:
            if not (config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))):
                raise
            first = first_line(error) or type(error).__name__
            raise TrainingError(
                f"torch.compile failed on this model or machine ({first}): leave out --compile"
            ) from error


def _check_streamed(model: nn.Module, config: TrainConfig) -> None:
    """Raises ConfigError where all weights were to be trained, or compiled."""
    if config.compile:
        raise ConfigError("torch.compile would keep what a slot held when it was traced: leave out compile, or stream")
    if not every_adapter(model):
        raise ConfigError(
            "streamed weights are frozen: inject(model, placement) first, or load the model without stream"
        )


@contextlib.contextmanager
def tiled(model: nn.Module, rows: int, known: Mapping[str, str] | None = None) -> Iterator[str]:
    """Lets MLPs compute `rows` tokens at a time while it lasts, and yields a line about it. `known` is what `token_wise`
    takes. Raises ConfigError where no MLP can, and for weights that are spread over several processes."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ConfigError(
            "mlp_rows computes MLPs again when --parallel fsdp may have given their weights back: leave it out"
        )
    if (kind := device_of(model).type) not in ("cpu", "cuda", "meta"):
        raise ConfigError(f"mlp_rows: random numbers of a {kind} device cannot be drawn again: leave it out")
    found, others = token_wise(model, known)
    left = f"{', '.join(others)}: not known to act on each token alone" if others else ""
    if not found:
        raise ConfigError(
            f"mlp_rows: {type(model).__name__} has no MLP that can be computed some tokens at a time"
            f"{f' ({left})' if left else ''}: leave it out"
        )
    before = {module: vars(module).get("forward") for module in found.values()}
    try:
        with apart(found.values()):
            for module in found.values():
                module.forward = Tiled(module, module.forward, rows)
            yield f"{len(found)} MLPs {rows} tokens at a time, and again in the backward pass{f'; left whole: {left}' if left else ''}"
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


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
