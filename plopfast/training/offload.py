"""What autograd saves, kept in CPU memory until the backward pass needs it, and fetched a block ahead.

On a GPU the copies run on a stream of their own, beside the products:

    out     the copy waits for the products that made the tensor. The tensor is held until the products have waited for
            the copy, two blocks later, so nothing else can get its memory before that.
    back    the first tensor that block i's backward pass asks for starts the copies of block i - 1's, too. The products
            wait for a copy where they use it.

With recomputation a block's input is what is saved.
"""

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..models.linears import blocks
from ..models.running import device_of, in_backward
from ..support import memory

OFFLOADED_BYTES = 1 << 20  # smaller tensors cost more in transfers than they free
HELD = 2  # blocks until a tensor that moved away is let go: one whose copy may be under way, beside the present one
CPU = torch.device("cpu")


class Lane(Protocol):
    """Where copies run, in their order."""

    def copy(self, source: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        """Begins a copy after the products so far; returns (it, what to wait for before it is used)."""

    def wait(self, event: Any) -> None:
        """Lets the products that follow wait for a copy."""


class Plain:
    """Copies that are in order with the products."""

    def copy(self, source: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        return torch.empty_like(source, device=device).copy_(source), None

    def wait(self, event: Any) -> None:
        pass


class Beside:
    """Copies on a GPU's stream of their own, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def copy(self, source: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        target = _pinned(source) if device.type == "cpu" else torch.empty_like(source, device=device)
        # the source is made by products, and the target's memory may be in use by products until here
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            if target.is_cuda:
                target.record_stream(self.stream)  # nobody may ever wait for it, after an error
            return target, self.stream.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)


def _pinned(source: torch.Tensor) -> torch.Tensor:
    """CPU memory for a tensor's values: pinned, so that the copy waits for nothing, as long as the system gives it."""
    target, is_pinned = memory.pinned(partial(torch.empty_like, source, device=CPU))
    if not is_pinned:
        warnings.warn(
            "the system gives no more pinned memory: offloaded tensors go to pageable memory, and are waited for",
            stacklevel=2,
        )
    return target


class _Moved:
    """A saved tensor's copy in CPU memory, and from the backward pass on another one on its `device`."""

    def __init__(self, tensor: torch.Tensor, number: int, lane: Lane) -> None:
        self.lane, self.number, self.device, self.origin = lane, number, tensor.device, weakref.ref(tensor)
        self.kept, self.away = lane.copy(tensor, CPU)
        self.back: tuple[torch.Tensor, Any] | None = None

    def fetch(self) -> None:
        if self.back is None:
            self.back = self.lane.copy(self.kept, self.device)

    def take(self) -> torch.Tensor:
        self.fetch()
        assert self.back is not None
        tensor, event = self.back
        self.lane.wait(event)
        return tensor


class Offload:
    """The hooks of `offloaded`. Parameters and small tensors stay. What several operations save is moved once."""

    def __init__(self, model: nn.Module, lane: Lane) -> None:
        self.lane = lane
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.number = 0  # of the block at work, counted over all forward passes
        self.moved: dict[int, weakref.WeakSet[_Moved]] = {}
        self._by_place: weakref.WeakValueDictionary[Any, _Moved] = weakref.WeakValueDictionary()
        self._leaving: list[tuple[int, torch.Tensor, Any]] = []

    def enter(self, *_: Any) -> None:
        """A block's forward pass begins."""
        if in_backward():  # it is computed again
            return
        self.number += 1
        self._let_go(self.number - HELD)
        self.moved = {number: moved for number, moved in self.moved.items() if moved}

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()._cdata
        if tensor.nbytes < OFFLOADED_BYTES or storage in self.weights or in_backward():
            return tensor
        shape = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        place = storage, tensor._version, *shape
        found = self._by_place.get(place)
        if found is None or found.origin() is None:  # else the address may have been given to another tensor
            found = self._by_place[place] = _Moved(tensor, self.number, self.lane)
            self.moved.setdefault(self.number, weakref.WeakSet()).add(found)
            self._leaving.append((self.number, tensor.detach(), found.away))
        return found

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._let_go(self.number)
        tensor = packed.take()
        for number in (packed.number, packed.number - 1):
            for other in self.moved.get(number, ()):
                other.fetch()
        return tensor

    def _let_go(self, last: int) -> None:
        """Lets go of what was saved up to a block, once the products have waited for the copies."""
        for number, _, event in self._leaving:
            if number <= last:
                self.lane.wait(event)
        self._leaving = [one for one in self._leaving if one[0] > last]


@contextlib.contextmanager
def offloaded(model: nn.Module, lane: Lane | None = None) -> Iterator[Offload]:
    """Keeps tensors that autograd saves in CPU memory while it lasts, until the backward pass needs them."""
    device = device_of(model)
    if lane is None:
        on_gpu = device.type == "cuda" and not isinstance(next(model.parameters()), FakeTensor)
        lane = Beside(device) if on_gpu else Plain()
    hooks = Offload(model, lane)
    with contextlib.ExitStack() as stack:
        for block in blocks(model).values():
            stack.callback(block.register_forward_pre_hook(hooks.enter).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack))
        yield hooks
