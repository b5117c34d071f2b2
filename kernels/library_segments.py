"""Registers products by segments, as library.py does: rows sorted into segments, each with weights of its own (the experts of a
mixture). Autograd is added by plopfast/lora/experts.py.

`ends` [E] (int32) says where each segment ends; segments may be empty, and the last one ends with the rows.

E segments, S rows, N out, K in, R rank.
"""

import torch

from . import torch_segments
from .library import DEVICES, LIBRARY

LIBRARY.define("segment_product(Tensor x, Tensor w, Tensor ends) -> Tensor")
LIBRARY.define("segment_outer(Tensor one, Tensor other, Tensor ends) -> Tensor")
LIBRARY.define(
    "segment_forward(Tensor x, Tensor w, Tensor a, Tensor b, Tensor ends, float scaling) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "segment_backward(Tensor dy, Tensor x, Tensor s, Tensor w, Tensor a, Tensor b, Tensor ends, float scaling, bool need_x, "
    "bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)"
)


def segment_product(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """X W_e^T [S, N] of x [S, K] and w [E, N, K]."""
    return torch_segments.product(x, w, ends)


def segment_outer(one: torch.Tensor, other: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """one^T other of each segment's rows: one [S, N], other [S, K] -> [E, N, K]."""
    return torch_segments.outer(one, other, ends)


def segment_forward(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y = X W_e^T + S B_e^T [S, N] and S = scaling X A_e^T [S, R] of a [E, R, K] and b [E, N, R]."""
    return torch_segments.forward(x, w, a, b, ends, scaling)


def segment_backward(
    dy: torch.Tensor, x: torch.Tensor, s: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
    ends: torch.Tensor, scaling: float, need_x: bool, need_a: bool, need_b: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dX [S, K], dA [E, R, K], dB [E, N, R]. One that is not needed is empty and costs nothing."""
    return torch_segments.backward(dy, x, s, w, a, b, ends, scaling, (need_x, need_a, need_b))


for _op in (segment_product, segment_outer, segment_forward, segment_backward):
    for _device in DEVICES:
        LIBRARY.impl(_op.__name__, _op, _device)


@torch.library.register_fake("plopfast::segment_product", lib=LIBRARY)
def _(x, w, ends):
    return x.new_empty(x.shape[0], w.shape[1])


@torch.library.register_fake("plopfast::segment_outer", lib=LIBRARY)
def _(one, other, ends):
    return one.new_empty(ends.shape[0], one.shape[1], other.shape[1])


@torch.library.register_fake("plopfast::segment_forward", lib=LIBRARY)
def _(x, w, a, b, ends, scaling):
    return x.new_empty(x.shape[0], w.shape[1]), x.new_empty(x.shape[0], a.shape[1])


@torch.library.register_fake("plopfast::segment_backward", lib=LIBRARY)
def _(dy, x, s, w, a, b, ends, scaling, need_x, need_a, need_b):
    empty = x.new_empty(0)
    return (
        torch.empty_like(x) if need_x else empty,
        torch.empty_like(a) if need_a else empty,
        torch.empty_like(b) if need_b else empty,
    )
