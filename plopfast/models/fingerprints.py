"""What tells a base model from another: the first values of the weights that an adapter is put on."""

from collections.abc import Iterable

import torch
from torch import nn

from .experts import weight_at

SAME = 0.01
# nf4 moves the four weights of a module by 0.09 of their norm, and rarely by 0.3; those of another model are 1.4 away
SAME_QUANTIZED = 0.35


def fingerprint(model: nn.Module, names: Iterable[str]) -> list[float]:
    """The first four values of each named weight, in the order of their names: an adapter knows its base by them."""
    return [value for name in sorted(names) for value in weight_at(model, name).fingerprint()]


def kinds_of(model: nn.Module, names: Iterable[str]) -> str:
    """How the named weights are stored: "dense", or "nf4", or "dense, nf4"."""
    return ", ".join(sorted({weight_at(model, name).kind for name in names}))


def same_fingerprint(one: list[float], two: list[float], within: float = SAME) -> bool:
    """True where they agree within 1 %: rounding to bfloat16 moves a weight by at most 0.4 %. Between a dense and a quantised
    model, `within` is `SAME_QUANTIZED`."""
    a, b = torch.tensor(one), torch.tensor(two)
    return a.shape == b.shape and bool((a - b).norm() <= within * a.norm())
