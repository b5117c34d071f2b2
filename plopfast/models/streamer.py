"""Frozen blocks that pass through two slots of memory on the device, one copy ahead of the products that read them.

    forward   enter 0, 1, ..., n-1: block i is there, and i + 1 is on its way into the other slot
    backward  enter n-1, ..., 0: likewise with i - 1

Nothing is evicted at the turns: the forward pass ends with n-1 and n-2 in the slots, which the backward pass reads first, and
that ends with 0 and 1. So n blocks take 2 n - 4 copies for a forward and a backward pass.

On a GPU the copies run on a stream of their own. Two rules keep them right, and a trace shows whether they are kept:

    a product reads a slot only after the compute stream waited for the copy that filled it (`wait`)
    a copy into a slot waits for all products that were launched before it (`fence`)

Slots and events are made once, so the loop allocates nothing, and torch's allocator never sees memory of one stream used in
another. On the CPU the same calls copy at once.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ALIGNED = 256  # bytes, of each tensor in a slot: what the widest copies and kernels ask for


Tensors = Mapping[str, Mapping[str, torch.Tensor]]  # module -> name in the module -> tensor


@dataclass(frozen=True)
class Payload:
    """The frozen tensors of a block in host memory, and where each of them begins in a slot."""

    tensors: Tensors
    begins: Mapping[tuple[str, str], int]
    size: int
    whole: torch.Tensor | None = None  # uint8 [size], of which the tensors are views: one copy brings them all

    def copied_into(self, slot: torch.Tensor) -> None:
        """Copies the block to the start of a slot, without waiting for it on a GPU."""
        if self.whole is not None:
            slot[: self.size].copy_(self.whole, non_blocking=True)
            return
        there = self.views(slot)
        for module, of_module in self.tensors.items():
            for name, tensor in of_module.items():
                there[module][name].copy_(tensor, non_blocking=True)

    def views(self, slot: torch.Tensor) -> Tensors:
        """The tensors, as views of a slot."""
        return {
            module: {name: _part(slot, self.begins[module, name], tensor) for name, tensor in of_module.items()}
            for module, of_module in self.tensors.items()
        }


def payload_of(tensors: Tensors) -> Payload:
    """Lays the tensors of a block out, each at a multiple of `ALIGNED` bytes."""
    begins, size = {}, 0
    for module, of_module in tensors.items():
        for name, tensor in of_module.items():
            begins[module, name] = size
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
    return Payload(tensors, begins, size)


def in_one_buffer(payload: Payload, buffer: torch.Tensor) -> Payload:
    """The same block in one host buffer, uint8 [size]."""
    payload.copied_into(buffer)
    return Payload(payload.views(buffer), payload.begins, payload.size, buffer)


def _part(slot: torch.Tensor, begin: int, like: torch.Tensor) -> torch.Tensor:
    return slot[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


class _AtOnce:
    """Copies without a stream: the CPU's, and those of tensors without values. It notes each call in `trace`, if there is one."""

    def __init__(self) -> None:
        self.trace: list[tuple[Any, ...]] | None = None

    def note(self, *event: Any) -> None:
        if self.trace is not None:
            self.trace.append(event)

    def fence(self, slot: int) -> None:
        """What is copied from now on waits for the products that were launched so far."""
        self.note("fence", slot)

    def copy(self, payload: Payload, block: int, slot: int, memory: torch.Tensor) -> None:
        self.note("copy", slot, block)
        payload.copied_into(memory)

    def wait(self, slot: int) -> None:
        """Products that are launched from now on wait for the slot's copy."""
        self.note("wait", slot)


class _OnAStream(_AtOnce):
    """Copies on a stream of their own, of a GPU."""

    def __init__(self, slots: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.device = slots[0].device
        self.stream: Any = torch.cuda.Stream(self.device)
        self.used: list[Any] = [torch.cuda.Event() for _ in slots]
        self.ready: list[Any] = [torch.cuda.Event() for _ in slots]
        for slot in slots:
            slot.record_stream(self.stream)  # freed while a copy is under way, it is given away after it

    def fence(self, slot: int) -> None:
        super().fence(slot)
        self.used[slot].record(torch.cuda.current_stream(self.device))
        self.stream.wait_event(self.used[slot])

    def copy(self, payload: Payload, block: int, slot: int, memory: torch.Tensor) -> None:
        with torch.cuda.stream(self.stream):
            super().copy(payload, block, slot, memory)
            self.ready[slot].record(self.stream)

    def wait(self, slot: int) -> None:
        super().wait(slot)
        torch.cuda.current_stream(self.device).wait_event(self.ready[slot])


class Streamer:
    """Brings the blocks of `payloads` into two slots on `device`.

    Call `enter(i, 1)` before block i's forward pass and `enter(i, -1)` before its backward pass. `views(i)` gives its tensors
    in their slot; they are to be used at once, and brings the block first where it is not there. `owner[slot]` is the block
    that a slot holds.

    A test may set `queue.trace` to a list; it gets ("enter", block), ("fence", slot), ("copy", slot, block), ("wait", slot)
    and ("use", slot, block) in their order.
    """

    def __init__(
        self, payloads: Sequence[Payload], device: torch.device, slots: list[torch.Tensor] | None = None
    ) -> None:
        self.payloads, self.device = list(payloads), device
        size = max(payload.size for payload in self.payloads)
        count = min(2, len(self.payloads))
        self.slots = slots or [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        real = type(self.slots[0]) is torch.Tensor
        self.queue = _OnAStream(self.slots) if real and device.type == "cuda" else _AtOnce()
        self.owner: list[int | None] = [None] * count
        self.waited = [False] * count  # whether the compute stream has waited for the slot's last copy
        self._views: dict[tuple[int, int], Tensors] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Streamer":
        """A streamer with slots of its own, and the same payloads: no copy of a model takes its weights again. Where tensors
        are copied as tensors without values, the payloads are, too."""
        slots = copy.deepcopy(self.slots, memo)
        faked = type(slots[0]) is not type(self.slots[0])
        payloads = copy.deepcopy(self.payloads, memo) if faked else self.payloads
        made = memo[id(self)] = Streamer(payloads, self.device, slots)
        return made

    @property
    def nbytes(self) -> int:
        """The bytes of all blocks in host memory."""
        modules = [of_module for payload in self.payloads for of_module in payload.tensors.values()]
        return sum(tensor.nbytes for of_module in modules for tensor in of_module.values())

    def enter(self, block: int, step: int) -> None:
        """Begins a block's pass: it is there for the products that follow, and the next one, `step` further, is copied
        meanwhile."""
        self.queue.note("enter", block)
        self._wait(self._bring(block, block + step))
        if 0 <= block + step < len(self.payloads):
            self._bring(block + step, block)

    def views(self, block: int) -> Tensors:
        """The block's tensors, as views of its slot that are right until another block is brought."""
        slot = self._bring(block, block + 1)
        if not self.waited[slot]:
            self._wait(slot)
        self.queue.note("use", slot, block)
        found = self._views.get((slot, block))
        if found is None:
            found = self._views[slot, block] = self.payloads[block].views(self.slots[slot])
        return found

    def _bring(self, block: int, keep: int) -> int:
        """The slot that holds the block, after a copy where none does: not into that of `keep`."""
        if block in self.owner:
            return self.owner.index(block)
        owner = self.owner
        slot = min(range(len(owner)), key=lambda number: (owner[number] == keep, owner[number] is not None))
        self.owner[slot], self.waited[slot] = None, False  # an exception below leaves it empty
        self.queue.fence(slot)
        self.queue.copy(self.payloads[block], block, slot, self.slots[slot])
        self.owner[slot] = block
        return slot

    def _wait(self, slot: int) -> None:
        self.queue.wait(slot)
        self.waited[slot] = True
