"""Registers products by segments, as library.py does: rows sorted into segments, each with weights of its own (the experts of a
mixture). Autograd is added by plopfast/lora/experts.py.

`backend` "auto" takes the Triton kernels wherever they run: plain torch makes two to seven launches for each segment, and waits
for the GPU. So "fused" and "lora-first" are "triton" here.

Weights that are kept as codes (`Stack`) go through `run`. The kernels read all of them decoded, plain torch one at a time.

`ends` [E] (int32) says where each segment ends; segments may be empty, and the last one ends with the rows.

E segments, S rows, N out, K in, R rank.
"""

from typing import Any

import torch

from . import dispatch, torch_segments
from .codes import Stack
from .library import DEVICES, LIBRARY

LIBRARY.define("segment_product(Tensor x, Tensor w, Tensor ends, str backend) -> Tensor")
LIBRARY.define("segment_outer(Tensor one, Tensor other, Tensor ends) -> Tensor")
LIBRARY.define(
    "segment_forward(Tensor x, Tensor w, Tensor a, Tensor b, Tensor ends, float scaling, str backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "segment_backward(Tensor dy, Tensor x, Tensor s, Tensor w, Tensor a, Tensor b, Tensor ends, float scaling, str backend, "
    "bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)"
)


def runs_kernels(x: torch.Tensor, rank: int, backend: str) -> bool:
    """Whether the Triton kernels take x's device, its dtype and the rank. Raises UnsupportedError if `backend` cannot run."""
    if rank > dispatch.MAX_RANK and backend == "auto":
        return False
    if rank > dispatch.MAX_RANK and dispatch.resolve(x.device, backend) != "torch":
        raise dispatch.UnsupportedError(f"backend {backend!r}: rank {rank} is above {dispatch.MAX_RANK}")
    return dispatch.runs_kernels(x.device, x.dtype, backend)


def run(name: str, *arguments: Any) -> Any:
    """One of the operations below, of weights that may be a Stack. It has no gradient."""
    if any(isinstance(one, Stack) and one.is_real for one in arguments):
        return _OPS[name](*arguments)
    given = (one.dense() if isinstance(one, Stack) else one for one in arguments)
    return getattr(torch.ops.plopfast, name)(*given)


def _whole(w: torch.Tensor | Stack) -> torch.Tensor:
    return w.dense() if isinstance(w, Stack) else w


def segment_product(x: torch.Tensor, w: torch.Tensor | Stack, ends: torch.Tensor, backend: str) -> torch.Tensor:
    """X W_e^T [S, N] of x [S, K] and w [E, N, K]."""
    if not runs_kernels(x, 1, backend):
        return torch_segments.product(x, w, ends)
    from . import triton_segments  # only where it can run

    return triton_segments.product(x, _whole(w), ends)


def segment_outer(one: torch.Tensor, other: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """one^T other of each segment's rows: one [S, N], other [S, K] -> [E, N, K]."""
    return torch_segments.outer(one, other, ends)


def segment_forward(
    x: torch.Tensor,
    w: torch.Tensor | Stack,
    a: torch.Tensor,
    b: torch.Tensor,
    ends: torch.Tensor,
    scaling: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y = X W_e^T + S B_e^T [S, N] and S = scaling X A_e^T [S, R] of a [E, R, K] and b [E, N, R]."""
    if not runs_kernels(x, a.shape[1], backend):
        return torch_segments.forward(x, w, a, b, ends, scaling)
    from . import triton_segments

    return triton_segments.forward(x, _whole(w), a, b, ends, scaling)


def segment_backward(
    dy: torch.Tensor, x: torch.Tensor, s: torch.Tensor, w: torch.Tensor | Stack, a: torch.Tensor, b: torch.Tensor,
    ends: torch.Tensor, scaling: float, backend: str, need_x: bool, need_a: bool, need_b: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dX [S, K], dA [E, R, K], dB [E, N, R]. One that is not needed is empty and costs nothing."""
    needed = need_x, need_a, need_b
    if not runs_kernels(x, a.shape[1], backend):
        return torch_segments.backward(dy, x, s, w, a, b, ends, scaling, needed)
    from . import triton_segments

    return triton_segments.backward(dy, x, s, _whole(w) if need_x else x, a, b, ends, scaling, needed)


_OPS = {op.__name__: op for op in (segment_product, segment_outer, segment_forward, segment_backward)}
for _name, _op in _OPS.items():
    for _device in DEVICES:
        LIBRARY.impl(_name, _op, _device)


@torch.library.register_fake("plopfast::segment_product", lib=LIBRARY)
def _(x, w, ends, backend):
    return x.new_empty(x.shape[0], w.shape[1])


@torch.library.register_fake("plopfast::segment_outer", lib=LIBRARY)
def _(one, other, ends):
    return one.new_empty(ends.shape[0], one.shape[1], other.shape[1])


@torch.library.register_fake("plopfast::segment_forward", lib=LIBRARY)
def _(x, w, a, b, ends, scaling, backend):
    return x.new_empty(x.shape[0], w.shape[1]), x.new_empty(x.shape[0], a.shape[1])


@torch.library.register_fake("plopfast::segment_backward", lib=LIBRARY)
def _(dy, x, s, w, a, b, ends, scaling, backend, need_x, need_a, need_b):
    empty = x.new_empty(0)
    return (
        torch.empty_like(x) if need_x else empty,
        torch.empty_like(a) if need_a else empty,
        torch.empty_like(b) if need_b else empty,
    )
