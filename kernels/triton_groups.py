"""Launchers for the low-rank terms of two or three linears that read one X, in one launch each. See triton_ops.py.

M tokens, N columns, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from . import dispatch, philox
from .expand import lora_expand_sum, lora_expands
from .launch import Planned, is_near, plan, precision, rank_chunk

MOST = 3  # linears of a group


def fits(s: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Whether the members have one rank and one layout, which the kernels take."""
    shape, row, strides, dtype = s[0].shape, s[0].stride(), b[0].stride(), b[0].dtype
    for one, other in zip(s, b, strict=True):
        if one.shape != shape or one.stride() != row or other.stride() != strides or other.dtype != dtype:
            return False
    return 2 <= len(s) <= MOST and shape[0] > 0 and all(is_near(other.shape, other.stride()) for other in b)


def low_ranks(
    s: Sequence[torch.Tensor], b: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """L_i = S_i B_i^T + bias_i [M, N_i] of each member, in S's dtype; `fits(s, b)` holds."""
    run = plan(
        _low_ranks, s[0].device, s[0].dtype, s[0].shape, s[0].stride(0), b[0].dtype, b[0].stride(),
        tuple(len(one) for one in b), tuple(bias is not None for bias in biases), precision(s[0]),
    )  # fmt: skip
    return run(s, b, biases)


def _three(members: Sequence[Any]) -> tuple[Any, ...]:
    return (*members, members[0])[:MOST] if len(members) < MOST else tuple(members)


def _low_ranks(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, row: int, b_dtype: torch.dtype,
    b_strides: tuple[int, ...], columns: tuple[int, ...], biased: tuple[bool, ...], exact: str,
) -> Callable[..., list[torch.Tensor]]:  # fmt: skip
    (m, rank), (bm, bn), count = shape, dispatch.expand_tiles(dtype), len(columns)
    launch = Planned(
        lora_expands, (triton.cdiv(m, bm), sum(triton.cdiv(n, bn) for n in columns)), (*_three(columns), row, *b_strides),
        {"RANK": rank, "BR": rank_chunk(rank), "COUNT": count,
         **{f"BIAS{i}": there for i, there in enumerate(_three(biased))}, "PRECISION": exact, "BM": bm, "BN": bn},
        device, num_warps=4, num_stages=2,
    )  # fmt: skip

    def run(
        s: Sequence[torch.Tensor], b: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        y = [s[0].new_empty(m, n) for n in columns]
        dense = [one if bias is None else bias.contiguous() for one, bias in zip(s, biases, strict=True)]
        launch((*_three(s), *_three(b), *_three(dense), *_three(y)), (m,))
        return y

    return run


def low_rank_sum(
    s: Sequence[torch.Tensor], b: Sequence[torch.Tensor], p: float, seeds: Sequence[philox.Seed]
) -> torch.Tensor:
    """The sum over the members of mask_i (S_i B_i^T) [M, N], in S's dtype; `fits(s, b)` holds, and each B is [N, R]."""
    run = plan(
        _low_rank_sum, s[0].device, s[0].dtype, s[0].shape, s[0].stride(0), b[0].dtype, b[0].shape[0], b[0].stride(),
        len(s), p, precision(s[0]),
    )  # fmt: skip
    return run(s, b, seeds)


def _low_rank_sum(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, row: int, b_dtype: torch.dtype, n: int,
    b_strides: tuple[int, ...], count: int, p: float, exact: str,
) -> Callable[..., torch.Tensor]:  # fmt: skip
    (m, rank), (bm, bn) = shape, dispatch.expand_tiles(dtype)
    bn = min(bn, 64) if p else bn  # a masked term has an accumulator of its own
    launch = Planned(
        lora_expand_sum, (triton.cdiv(m, bm), triton.cdiv(n, bn)), (n, philox.threshold(p), row, *b_strides),
        {"RANK": rank, "BR": rank_chunk(rank), "COUNT": count, "MASK": p > 0, "PRECISION": exact, "BM": bm, "BN": bn},
        device, num_warps=4, num_stages=2,
    )  # fmt: skip

    def run(s: Sequence[torch.Tensor], b: Sequence[torch.Tensor], seeds: Sequence[philox.Seed]) -> torch.Tensor:
        y = s[0].new_empty(m, n)
        launch((*_three(s), *_three(b), y), (m, *(_three(seeds) if p else (0, 0, 0))))
        return y

    return run
