"""LoRA linears that read one X (query, key and value; gate and up) as one: see plopfast/lora/shared.py.

X is read once for all S and once for all dA. dX is one matrix, to which each member's frozen product is added in place:
no three matrices to add up.

M tokens, K in, N_i out, R_i rank; all members have one scaling, so S of all is one product with the stack of their A.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import dispatch, library, philox, torch_ops
from .codes import Weight, dense


@dataclass(frozen=True, slots=True)
class Group:
    """What the members share: c = scaling / (1 - p), the rate of dropout, their seeds, ranks and path."""

    c: float
    p: float
    seeds: tuple[philox.Seed, ...]
    ranks: tuple[int, ...]
    plan: dispatch.Plan


def shrink(
    x: torch.Tensor, adapters: Sequence[torch.Tensor], stacked: torch.Tensor, group: Group
) -> list[torch.Tensor]:
    """S_i = c drop_i(X) A_i^T [M, R_i] of each member. `stacked` holds the members' A [R_i, K], one below the other."""
    if not group.p:
        parts = library.shrink(x, stacked, group.c, 0.0, 0, group.plan).split(group.ranks, dim=1)
        # torch 2.13's bfloat16 product on the CPU reads row-strided left operands wrongly
        return [part.contiguous() for part in parts] if x.device.type == "cpu" else list(parts)
    return library.shrink_each(x, adapters, group.c, group.p, group.seeds, group.plan)


def forward(
    x: torch.Tensor, s: Sequence[torch.Tensor], weights: Sequence[Weight], b: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None], group: Group,
) -> list[torch.Tensor]:  # fmt: skip
    """Y_i = X W_i^T + S_i B_i^T + bias_i [M, N_i] of each member."""
    if group.plan.backend == "triton" and group.plan.strategy != "fused":
        from . import triton_groups

        if triton_groups.fits(s, b):
            low = triton_groups.low_ranks(s, b, biases)
            return [y.addmm_(x, dense(w).T) for y, w in zip(low, weights, strict=True)]
    members = zip(s, weights, b, biases, strict=True)
    return [library.forward(x, one, w, other, bias, group.plan) for one, w, other, bias in members]


def backward(
    dy: Sequence[torch.Tensor], x: torch.Tensor, s: Sequence[torch.Tensor], weights: Sequence[Weight],
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], group: Group, needed: tuple[bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:  # fmt: skip
    """dX [M, K], dA_i [R_i, K] and dB_i [N_i, R_i]; None where they are not `needed`. `dtypes` are those of dA and dB."""
    need_x, need_a, need_b = needed
    pairs = [
        library.grad_s_and_b(one, other, factor, group.c, group.plan, need_a or need_x, need_b, dtypes[1])
        for one, other, factor in zip(dy, s, b, strict=True)
    ]
    ds, db = [pair[0] for pair in pairs if pair[0] is not None], [pair[1] for pair in pairs]
    da: list[torch.Tensor | None] = [None] * len(dy)
    if not (need_a or need_x):
        return None, da, db
    whole = None if group.p else torch.cat(ds, dim=1)
    if need_a and whole is not None:
        da = list(torch_ops.grad_a(whole, x, 0.0, 0).to(dtypes[0]).split(group.ranks))
    elif need_a:
        da = [
            library.grad_a(one, x, group.p, seed, group.plan, dtypes[0])
            for one, seed in zip(ds, group.seeds, strict=True)
        ]
    return _grad_x(dy, ds, whole, weights, a, group) if need_x else None, da, db


def _grad_x(dy, ds, whole, weights, a, group: Group) -> torch.Tensor:
    """sum over i of mask_i (dS_i A_i) + dY_i W_i; `whole` holds the dS_i side by side where there is no mask."""
    dx = None
    if group.plan.backend == "triton":
        from . import triton_groups

        columns = [one.T for one in a]
        if triton_groups.fits(ds, columns):
            dx = triton_groups.low_rank_sum(ds, columns, group.p, group.seeds)
    if dx is None and whole is not None:
        dx = whole @ torch.cat(a).to(whole.dtype)
    if dx is None:
        dx, *others = (torch_ops.low_rank(*member, group.p) for member in zip(ds, a, group.seeds, strict=True))
        for other in others:
            dx.add_(other)
    for one, w in zip(dy, weights, strict=True):
        dx.addmm_(one, dense(w))
    return dx
