"""Streams a model's frozen blocks: their weights stay in host memory, and pass through two slots on the device.

    model = load(...)                       # on the host
    stream(model, torch.device("cuda"))     # everything else moves to the device
    unstream(model)                         # a plain model on the device again

A streamed weight is no parameter: nothing trains it, moves it, broadcasts it or writes into it. Products ask a `Streamed`
object in its place for what a slot holds now (streamed.py), forward and backward, so no graph ever keeps a view of a slot.
Scores, fingerprints and files are made from the host's copy, which is complete.

Streamed are the weights of nn.Linear, Conv1D and QuantizedLinear in the repeated blocks. Norms, biases, embedding, head,
fused experts and shared weights live on the device.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..support import memory
from ..support.errors import ModelError
from .frozen import FrozenWeight, find_frozen, is_sharded, is_transposed, streamed_in
from .linears import blocks, linear_modules
from .quantized import QuantizedLinear
from .running import exchanged, in_backward
from .streamed import Streamed, StreamedWeight, streamed_class
from .streamer import Streamer, in_one_buffer, payload_of

MIB = 2**20
PINNED_FOR = ("cuda",)  # types of devices that copy from pinned memory while they compute


class _Forward:
    """A hook before a block's forward pass. An object, so that a copied model has its own."""

    def __init__(self, streamer: Streamer, block: int) -> None:
        self.streamer, self.block = streamer, block

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not in_backward():  # else it is computed again, and has been brought for that already
            self.streamer.enter(self.block, 1)


class _Backward(_Forward):
    """A hook after a block's forward pass: the gradient of its output begins its backward pass.

    torch's full backward pre-hook would say the same, and warn at the first block, whose input has no gradient.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        outputs = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
        for one in outputs:
            if isinstance(one, torch.Tensor) and one.requires_grad:
                one.register_hook(self.begin)

    def begin(self, gradient: torch.Tensor) -> None:
        self.streamer.enter(self.block, -1)


class _Stays:
    """`model._apply`, for as long as it streams: refuses what would move or cast all but the streamed weights."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for dtype in {p.dtype for p in self.model.parameters() if p.is_floating_point()}:
            probe = torch.empty(0, dtype=dtype, device=self.device)
            made = fn(probe)
            if (made.device, made.dtype) != (probe.device, dtype):
                raise ModelError(
                    f"{type(self.model).__name__}: its blocks are streamed to {self.device}, so it stays there and in its "
                    f"dtype; it was to be moved or cast to {made.device}, {made.dtype}: unstream(model) first, or load it so"
                )
        return type(self.model)._apply(self.model, fn, recurse)


@dataclass(frozen=True)
class Streaming:
    """What `stream` did; kept as `model.streaming`. `streamed` and `resident` count blocks."""

    streamer: Streamer
    streamed: int
    resident: int
    host: str  # where the blocks are kept, in words

    def __str__(self) -> str:
        """A line for the user."""
        slots, kept = sum(slot.nbytes for slot in self.streamer.slots), self.streamer.nbytes
        left = f", {self.resident} stay on {self.streamer.device}" if self.resident else ""
        return (
            f"streamed: {self.streamed} blocks, {kept / MIB:.0f} MiB of {self.host}, through "
            f"{len(self.streamer.slots)} slots of {slots / len(self.streamer.slots) / MIB:.1f} MiB{left}"
        )


def stream(model: nn.Module, device: str | torch.device, resident_share: float = 0.0) -> Streaming:
    """Streams the linear weights of a model's repeated blocks to `device`, and moves everything else there, in place.

    `resident_share` of the blocks, spread evenly, are not streamed: they live on the device, too. Freeze and adapt the model
    afterwards (`inject` does both). `unstream` undoes it.

        streaming = stream(model, "cuda", resident_share=0.5)
        print(streaming)

    Raises ModelError, before anything is changed, for a model that is streamed already, that has adapters or weights spread
    over several processes, or that has no repeated blocks with linear weights; and where `resident_share` leaves none to stream.
    """
    device, name = torch.device(device), type(model).__name__
    device = torch.empty(0, device=device).device  # as tensors there name it: "cuda:0", not "cuda"
    if streamed_in(model):
        raise ModelError(f"{name} is streamed already: unstream(model) first")
    if any(isinstance(vars(module).get("frozen"), FrozenWeight) for module in model.modules()):
        raise ModelError(f"{name} has adapters: stream it before they are injected")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ModelError(f"{name} is spread over several processes: stream it without --parallel fsdp")
    found = _streamable(model)
    if not 0 <= resident_share < 1:
        raise ModelError(f"resident_share: expected a number from 0 to below 1, got {resident_share}")
    stay = resident(len(found), resident_share)
    chosen = [one for number, one in enumerate(found) if number not in stay]
    return _stream(model, device, chosen, len(stay))


def resident(count: int, share: float) -> set[int]:
    """Which of `count` blocks stay on the device, spread evenly."""
    return {number for number in range(count) if int((number + 1) * share) > int(number * share)}


def _streamable(model: nn.Module) -> list[tuple[nn.Module, dict[str, nn.Module]]]:
    """Each block that has weights to stream, and its modules that own them, by their names in the block."""
    infos = {info.name: info.module for info in linear_modules(model) if info.layer is not None}
    found = []
    for begin, block in blocks(model).items():
        inside = {n.removeprefix(f"{begin}."): m for n, m in infos.items() if n.startswith(f"{begin}.")}
        whole = {n: m for n, m in inside.items() if _is_plain(m)}  # weights that modules share are no infos
        if whole:
            found.append((block, whole))
    if not found:
        raise ModelError(
            f"{type(model).__name__}: none of its repeated blocks has a linear weight that can be streamed (nn.Linear, Conv1D "
            "or plopfast's codes, each in one place): leave out --stream"
        )
    return found


def _is_plain(module: Any) -> bool:
    """Whether its forward is y = x W^T + bias, and nobody has put another in its place."""
    kind = type(module)
    plain = isinstance(module, QuantizedLinear) or kind.forward is nn.Linear.forward or is_transposed(module)
    return plain and "forward" not in vars(module)


def _stream(model: Any, device: torch.device, chosen: list[Any], stay: int) -> Streaming:
    pageable, payloads = False, []
    for _, modules in chosen:
        payload = payload_of({n: {key: p.detach() for key, p in _weights(m).items()} for n, m in modules.items()})
        if device.type in PINNED_FOR:
            buffer, pinned = memory.pinned(partial(torch.empty, payload.size, dtype=torch.uint8))
            payload, pageable = in_one_buffer(payload, buffer), pageable or not pinned
            for n, m in modules.items():
                for key, p in _weights(m).items():
                    p.data = payload.tensors[n][key]  # so the memory that it was read into is free for the next block
        payloads.append(payload)
    if pageable:
        warnings.warn(
            "the system gives no more pinned memory: some blocks are kept in pageable memory, from which copies are slower "
            "and wait for each other (ulimit -l, or --resident-share, may help)",
            stacklevel=3,
        )
    streamer = Streamer(payloads, device)
    frozen: dict[Any, StreamedWeight] = {}
    for index, (_, modules) in enumerate(chosen):
        for name, module in modules.items():
            host: Any = find_frozen(module)
            frozen[module] = StreamedWeight(host, Streamed(streamer, index, name, host))
    taken = {module: _weights(module) for module in frozen}
    try:
        for module, weight in frozen.items():
            plain: Any = type(module)
            module.frozen, module.__class__ = weight, streamed_class(plain)
            module._parameters.update(dict.fromkeys(taken[module]))
        _move(model, device)
    except BaseException:  # no room on the device, or Ctrl-C
        for module in [module for module in frozen if "frozen" in vars(module)]:
            module.__class__ = type(module).plain
            del module.frozen
            module._parameters.update(taken[module])
        raise
    for index, (block, _) in enumerate(chosen):
        block.register_forward_pre_hook(_Forward(streamer, index))
        block.register_forward_hook(_Backward(streamer, index))
    model._apply = _Stays(model, device)
    pinned_words = "partly pageable memory" if pageable else "pinned memory"
    where = pinned_words if device.type in PINNED_FOR else "memory and mapped files"
    model.streaming = Streaming(streamer, len(chosen), stay, where)
    return model.streaming


def _move(model: nn.Module, device: torch.device) -> None:
    """As `model.to(device)`, for tensors without values, too."""
    if all(type(parameter) is nn.Parameter for parameter in model.parameters()):
        model.to(device)
    else:
        exchanged(model, lambda tensor: tensor.to(device))


def _weights(module: nn.Module) -> dict[str, Any]:
    """The parameters of a linear module that make its weight."""
    return {key: p for key, p in module._parameters.items() if key != "bias" and p is not None}


def unstream(model: Any) -> list[str]:
    """Puts all weights of a streamed model on its device, as plain parameters in memory of their own; returns the names of
    the modules that were streamed."""
    names = streamed_in(model)
    for name in names:
        module: Any = model.get_submodule(name)
        weight: Streamed = module.frozen.weight
        tensors = {key: tensor.to(weight.device, copy=True) for key, tensor in weight.host_tensors.items()}
        module.__class__ = type(module).plain
        del module.frozen
        for key, tensor in tensors.items():
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    for module in model.modules():
        if isinstance(carried := vars(module).get("frozen"), StreamedWeight):  # of the adapter around a module
            module.frozen = carried.host
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Forward)]:
                del hooks[key]
    for attribute in {"_apply", "streaming"} & vars(model).keys():
        delattr(model, attribute)
    return names


def plain_copy(model: nn.Module) -> Any:
    """A copy of the model with all of its weights in place, also where the model is streamed."""
    made = copy.deepcopy(model)
    unstream(made)
    return made
