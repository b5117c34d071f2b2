"""A launch that was recorded, and what it costs: see traffic.py and formulas.py."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel's grid and its arguments, which can be read as attributes."""

    kernel: str
    grid: tuple[int, ...]  # empty for what torch computes
    arguments: dict[str, Any]
    frozen: bool  # it holds the frozen product
    options: dict[str, int] = field(default_factory=dict)  # num_warps and num_stages

    def __getattr__(self, name: str) -> Any:
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(name) from None

    def itemsize(self, name: str) -> int:
        """Bytes of an element of an argument."""
        return tensor_of(self.arguments[name]).element_size()


@dataclass(frozen=True)
class Cost:
    """Bytes by argument, and FLOPs of dots: those of the formula, and those that tiles execute, beyond the edges too."""

    loads: dict[str, int]
    stores: dict[str, int]
    useful: int = 0
    executed: int = 0
    own: int = 0  # bytes of the frozen product's operands, which the bare GEMM moves too; with L for a library's GEMM

    @property
    def bytes(self) -> int:
        return sum(self.loads.values()) + sum(self.stores.values())

    @property
    def outside(self) -> int:
        return self.bytes - self.own


def tensor_of(value: Any) -> Any:
    """A tensor, or a descriptor's."""
    return value if isinstance(value, torch.Tensor) else getattr(value, "base", None)


def up(value: int, block: int) -> int:
    return -(-value // block) * block
