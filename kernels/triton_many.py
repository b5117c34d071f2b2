"""Several adapters on one frozen weight, by kernels that work on all segments at once. Nothing waits for the GPU.

    S = X (c A_e)^T;  Y = S B_e^T + bias + X W^T            dS = dY (c B_e);  dB_e = dY^T S;  dA_e = dS^T X;  dX = dS A_e + dY W

A and B of all segments are stacked and padded with zeros to the largest rank; a segment without an adapter has zeros. Each has a
scaling of its own, so the kernels have none: c goes into the copy of A that makes S, and into that of B that makes dS, in
float32 and before it is rounded. Autograd keeps no stack: the backward pass makes its own.

The frozen product is the vendor's, added to the low-rank term in place, or with the strategy "fused" it is segment_gemm's, whose
segments then share one W.

M rows, K in, N out, R the largest rank, E segments.
"""

from collections.abc import Sequence

import torch

from . import launch, triton_segments
from .codes import Weight, dense, few, linear_of_few
from .torch_many import Matrices, Way

MOST_COPIES = 256  # kept; then all are made anew
_copies: dict[tuple[object, ...], torch.Tensor] = {}


def forward(
    x_MK: torch.Tensor, w: Weight, a: Matrices, b: Matrices, bias_N: torch.Tensor | None, way: Way
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Y [M, N] and [S [M, R]]"""
    ends_E, c_E11 = _ends(x_MK, way), _factors(x_MK, way)
    s_MR = triton_segments.shrink(x_MK, stacked(a, 0, x_MK, c_E11), ends_E, 1.0)
    b_ENR = stacked(b, 1, x_MK)
    w = w if isinstance(w, torch.Tensor) else w.held()
    if not isinstance(w, torch.Tensor) and few(x_MK, w):
        return triton_segments.product(s_MR, b_ENR, ends_E).add_(linear_of_few(x_MK, w, bias_N)), [s_MR]
    w_NK = dense(w)
    if way.plan.strategy == "fused":
        return triton_segments.product(x_MK, _shared(w_NK, b_ENR), ends_E, s_MR, b_ENR, bias_N), [s_MR]
    return triton_segments.product(s_MR, b_ENR, ends_E, bias_N=bias_N).addmm_(x_MK, w_NK.T), [s_MR]


def backward(
    dy_MN: torch.Tensor, x_MK: torch.Tensor, s: Sequence[torch.Tensor], w: Weight, a: Matrices, b: Matrices, way: Way,
    need_x: bool, need_a: Sequence[bool], need_b: Sequence[bool], dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:  # fmt: skip
    """dX [M, K], and dA_e [R_e, K] and dB_e [N, R_e] in their `dtypes`, parts of one stack; None where it is not needed."""
    (s_MR,), ends_E, needed = s, _ends(x_MK, way), (need_x, any(need_a), any(need_b))
    b_ENR = stacked(b, 1, x_MK, _factors(x_MK, way)) if need_x or needed[1] else None
    wide = [torch.float32 if torch.float32 in kinds else x_MK.dtype for kinds in zip(*dtypes, strict=True)]
    ds_MR, da_ERK, db_ENR = triton_segments.low_rank_grads(dy_MN, x_MK, s_MR, b_ENR, ends_E, 1.0, needed, wide)
    da = _parts(da_ERK, a, 0, need_a, dtypes)
    db = _parts(db_ENR, b, 1, need_b, dtypes)
    if not need_x or ds_MR is None:
        return None, da, db
    a_EKR, w_NK = stacked(a, 0, x_MK).transpose(1, 2), dense(w)
    if way.plan.strategy == "fused":
        return triton_segments.product(dy_MN, _shared(w_NK.T, a_EKR), ends_E, ds_MR, a_EKR), da, db
    return triton_segments.product(ds_MR, a_EKR, ends_E).addmm_(dy_MN, w_NK), da, db


def stacked(of: Matrices, at: int, x: torch.Tensor, c_E11: torch.Tensor | None = None) -> torch.Tensor:
    """c A_e [E, R, K] (`at` 0: where the rank is), or c B_e [E, N, R] (`at` 1), in x's dtype, with zeros up to the largest rank.
    One launch puts them together, and another scales or casts them."""
    given = [one for one in of if one is not None]
    first, ranks = given[0], [one.shape[at] for one in given]
    rank = max(ranks)
    if len(given) == len(of) and min(ranks) == rank:
        whole = torch.stack(given)
    else:
        other = first.shape[1 - at]
        blank = first.new_zeros((rank, other) if at == 0 else (other, rank))
        parts = []
        for one in of:
            has = 0 if one is None else one.shape[at]
            parts += [] if one is None else [one]
            parts += [] if has == rank else [blank.narrow(at, 0, rank - has)]
        whole = torch.cat(parts, at)
        whole = whole.view(-1, rank, other) if at == 0 else whole.view(other, -1, rank).transpose(0, 1)
    if c_E11 is None:
        return whole.to(x.dtype)
    return torch.mul(whole, c_E11, out=x.new_empty(whole.shape))


def _shared(w_NK: torch.Tensor, like_E: torch.Tensor) -> torch.Tensor:
    """One W [N, K] for each segment."""
    return w_NK.expand(like_E.shape[0], *w_NK.shape)


def _parts(
    stack: torch.Tensor | None, of: Matrices, at: int, needed: Sequence[bool],
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
) -> list[torch.Tensor | None]:  # fmt: skip
    """The gradient of each adapter, without what is padding."""
    if stack is None:
        return [None] * len(of)
    return [
        None if one is None or not need else g.narrow(at, 0, one.shape[at]).to(pair[at])
        for g, one, need, pair in zip(stack.unbind(), of, needed, dtypes, strict=True)
    ]


def _ends(x: torch.Tensor, way: Way) -> torch.Tensor:
    """Where each segment ends [E], int32, on x's device."""
    return _copied(way.cuts[1:], torch.int32, x.device)


def _factors(x: torch.Tensor, way: Way) -> torch.Tensor:
    """c of each segment [E, 1, 1], float32, on x's device."""
    return _copied(tuple([c for c, _, _ in way.factors]), torch.float32, x.device).view(-1, 1, 1)


def _copied(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers of the host in the device's memory: every layer has the same, so they are copied once.

    The copy is queued on the current stream and not waited for, so each stream has its own.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        found = torch.empty(
            len(values), dtype=dtype, device=device
        )  # it belongs to the graph, which may outlive what is kept
        for place, value in zip(found, values, strict=True):
            place.fill_(value)
        return found
    key = (values, dtype, device, launch.current_stream(device.index) if on_gpu else 0)
    kept = _copies.get(key)
    if kept is None:
        if len(_copies) >= MOST_COPIES:
            _copies.clear()
        kept = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=on_gpu).to(device, non_blocking=True)
        _copies[key] = kept
    return kept
