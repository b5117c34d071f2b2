"""Several adapters on one frozen weight: chooses the path, and registers the operations that torch.compile and tensors without
values take. Autograd is added by plopfast/lora/many_ops.py.

`backend` "auto" takes the Triton kernels wherever they run, as products by segments do: plain torch makes three to five
launches for each segment. A call with one adapter, or with dropout, goes segment by segment, on the plan of a LoRA linear.

M rows, K in, N out, R rank, E segments.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from . import library, library_segments, philox, torch_many
from .codes import Weight
from .library import DEVICES, LIBRARY
from .torch_many import Matrices, Way

MOST_ROWS = 1 << 31  # `ends` are int32

LIBRARY.define(
    "many_forward(Tensor x, Tensor w, Tensor?[] a, Tensor?[] b, Tensor? bias, SymInt[] cuts, float[] scalings, float[] ps, "
    "Tensor?[] seeds, str backend) -> (Tensor, Tensor[])"
)
LIBRARY.define(
    "many_backward(Tensor dy, Tensor x, Tensor[] s, Tensor w, Tensor?[] a, Tensor?[] b, SymInt[] cuts, float[] scalings, "
    "float[] ps, Tensor?[] seeds, str backend, bool need_x, bool[] need_a, bool[] need_b) -> Tensor[]"
)


def way_of(
    x: torch.Tensor, w: Weight, a: Matrices, cuts: Sequence[int], scalings: Sequence[float], ps: Sequence[float],
    seeds: Sequence[philox.Seed | None], backend: str,
) -> Way:  # fmt: skip
    """How x [M, K] goes through w [N, K] and adapters A_e [R_e, K]; `ps` and `seeds` are empty without dropout. A seed is a
    number, or a tensor. Raises UnsupportedError if `backend` cannot run."""
    cuts = tuple(cuts)
    busy: list[int] = []
    bare: list[int] = []
    sizes, rank = [], 0
    for e, one in enumerate(a):
        rows = cuts[e + 1] - cuts[e]
        sizes.append(rows)
        if one is not None:
            rank = max(rank, one.shape[0])
        if rows:
            (bare if one is None else busy).append(e)
    drop = any(ps[e] for e in busy) if ps else False
    plan = library.plan_of(x, w, rank or 1, backend, drop)
    return Way(cuts, sizes, _factors(scalings, ps, seeds), busy, bare, plan, _together(x, rank, busy, drop, backend))


def _together(x: torch.Tensor, rank: int, busy: Sequence[int], drop: bool, backend: str) -> bool:
    if drop or len(busy) < (2 if backend == "auto" else 1) or x.shape[0] >= MOST_ROWS:
        return False
    return library_segments.runs_kernels(x, rank, backend)


def _factors(
    scalings: Sequence[float], ps: Sequence[float], seeds: Sequence[philox.Seed | None]
) -> list[tuple[float, float, philox.Seed]]:
    """(c, p, seed) of each segment. A seed on a GPU is not waited for."""
    if not ps:
        return [(c, 0.0, 0) for c in scalings]
    found: list[tuple[float, float, philox.Seed]] = []
    for c, p, seed in zip(scalings, ps, seeds, strict=True):
        number = 0 if seed is None else int(seed) if isinstance(seed, torch.Tensor) and seed.is_cpu else seed
        found.append((c * philox.inverse_keep(p), p, number) if p else (c, 0.0, 0))
    return found


def dtypes_of(a: Matrices, b: Matrices) -> list[tuple[Any, Any]]:
    """Those of the gradients of each adapter."""
    return [
        (None, None) if one is None or other is None else (one.dtype, other.dtype)
        for one, other in zip(a, b, strict=True)
    ]


def forward(
    x: torch.Tensor, w: Weight, a: Matrices, b: Matrices, bias: torch.Tensor | None, way: Way
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Y [M, N], and S: [M, R] of all segments if `way.together`, else [rows, R_e] of each busy one."""
    if not way.together:
        return torch_many.forward(x, w, a, b, bias, way)
    from . import triton_many  # only where it can run

    return triton_many.forward(x, w, a, b, bias, way)


def backward(
    dy: torch.Tensor, x: torch.Tensor, s: Sequence[torch.Tensor], w: Weight, a: Matrices, b: Matrices, way: Way,
    need_x: bool, need_a: Sequence[bool], need_b: Sequence[bool], dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:  # fmt: skip
    """dX [M, K], and dA_e [R_e, K] and dB_e [N, R_e] of each segment in its `dtypes`; None where it is not needed."""
    if not way.together:
        return torch_many.backward(dy, x, s, w, a, b, way, need_x, need_a, need_b, dtypes)
    from . import triton_many

    return triton_many.backward(dy, x, s, w, a, b, way, need_x, need_a, need_b, dtypes)


def many_forward(x, w, a, b, bias, cuts, scalings, ps, seeds, backend):
    """Y [M, N] and S, see `forward`; `ps` and `seeds` (0-d int64) are empty without dropout."""
    return forward(x, w, a, b, bias, way_of(x, w, a, cuts, scalings, ps, seeds, backend))


def many_backward(dy, x, s, w, a, b, cuts, scalings, ps, seeds, backend, need_x, need_a, need_b):
    """[dX, dA_e ..., dB_e ...]. One that is not needed is empty and costs nothing."""
    way = way_of(x, w, a, cuts, scalings, ps, seeds, backend)
    dtypes = dtypes_of(a, b)
    dx, da, db = backward(dy, x, s, w, a, b, way, need_x, need_a, need_b, dtypes)
    shared = way.together  # parts of one stack, and an operation's results are no views of one another
    return [dy.new_empty(0) if g is None else g.clone() if shared else g for g in (dx, *da, *db)]


for _op in (many_forward, many_backward):
    for _device in DEVICES:
        LIBRARY.impl(_op.__name__, _op, _device)


@torch.library.register_fake("plopfast::many_forward", lib=LIBRARY)
def _(x, w, a, b, bias, cuts, scalings, ps, seeds, backend):
    y, rows = x.new_empty(x.shape[0], w.shape[0]), [end - start for start, end in itertools.pairwise(cuts)]
    busy = [e for e, one in enumerate(a) if one is not None and rows[e]]
    rank = max((one.shape[0] for one in a if one is not None), default=0)
    if _together(x, rank, busy, any(ps[e] for e in busy) if ps else False, backend):
        return y, [x.new_empty(x.shape[0], rank)]
    return y, [x.new_empty(rows[e], a[e].shape[0]) for e in busy]


@torch.library.register_fake("plopfast::many_backward", lib=LIBRARY)
def _(dy, x, s, w, a, b, cuts, scalings, ps, seeds, backend, need_x, need_a, need_b):
    needed = (need_x, *need_a, *need_b)
    return [torch.empty_like(of) if need else dy.new_empty(0) for of, need in zip((x, *a, *b), needed, strict=True)]
