"""One product for the modules that read the same input, and one cast of the adapters for a whole training step."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..models.running import body, device_of, evaluating
from .layer import LoRALinear, adapters
from .ops import shrink

MAX_RANKS = 256  # together, in a group: the limit of the shrink kernel


class SharedInput:
    """Modules that read one input (query, key and value; gate and up): their S = c x A^T come from one product.

    It works between `stack` and `clear`; at other times each module computes its own S.
    """

    def __init__(self, members: list[LoRALinear]) -> None:
        self.members = members
        self._stacked_A: torch.Tensor | None = None
        self._x: Callable[[], torch.Tensor | None] = lambda: None
        self._version = 0  # of x, which could be changed in place
        self._parts: dict[LoRALinear, torch.Tensor] = {}

    def stack(self) -> None:
        """Puts the members' `low` copies of A into one matrix."""
        self._stacked_A = torch.cat([m.low[0] for m in self.members if m.low])

    def clear(self) -> None:
        self._stacked_A, self._parts = None, {}

    def s_of(self, member: LoRALinear, x: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor | None:
        """This member's S [M, rank], or None where the member has to compute it."""
        if self._stacked_A is None or self._stacked_A.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        if torch.compiler.is_compiling():
            return None
        if self._x() is not x or self._version != x._version or member not in self._parts:
            s_MR = shrink(x, weight_NK, self._stacked_A, member.scaling, member.backend)
            parts = s_MR.split([m.rank for m in self.members], dim=1)
            # contiguous: torch 2.13's bfloat16 product on the CPU reads row-strided left operands wrongly
            self._parts = {m: part.contiguous() for m, part in zip(self.members, parts, strict=True)}
            self._x, self._version = weakref.ref(x), x._version
        return self._parts.pop(member)


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Saves work in a training step: the adapters are cast to the weights' dtype once instead of in every call, and
    modules that share an input (see `find_shared_inputs`) shrink it in one product.

    The adapters must not change while the context lasts.
    """
    modules = list(adapters(model).values())
    groups = {id(m.shared): m.shared for m in modules if m.shared}.values()
    try:
        with torch.no_grad():
            for module in modules:
                module.low = module.lora_A.to(module.frozen.dtype), module.lora_B.to(module.frozen.dtype)
            for group in groups:
                group.stack()
        yield
    finally:
        for module in modules:
            module.low = None
        for group in groups:
            group.clear()


@torch.no_grad()
def find_shared_inputs(model: nn.Module) -> list[list[str]]:
    """Groups the adapters that read the same input tensor, for `prepared`; returns the names in each group.

    The groups are found by running the model on two tokens. All members of a group have one scaling, and their ranks
    sum to at most MAX_RANKS.
    """
    seen: list[tuple[torch.Tensor, list[LoRALinear]]] = []  # keeps the inputs alive, so that their identities differ
    names = {module: name for name, module in adapters(model).items()}

    def note(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if seen and seen[-1][0] is args[0] and seen[-1][1][0].scaling == module.scaling:
            seen[-1][1].append(module)
        else:
            seen.append((args[0], [module]))

    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))  # dropout would move torch's generator on
        for module in names:
            stack.enter_context(module.register_forward_pre_hook(note))
        body(model)(input_ids=torch.ones(1, 2, dtype=torch.long, device=device_of(model)), use_cache=False)
    groups = [members for _, members in seen if len(members) > 1 and sum(m.rank for m in members) <= MAX_RANKS]
    for members in groups:
        shared = SharedInput(members)
        for module in members:
            module.shared = shared
    return [[names[module] for module in members] for members in groups]
