"""Products by segments with the shapes of Qwen3-30B-A3B, and of several adapters on one weight, for aot_jobs.py to compile.

M rows, K in, N out, R rank, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch

from plopfast.kernels import triton_segments


def operands(
    m: int = 32768, n: int = 1536, k: int = 2048, r: int = 16, e: int = 128, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    """dY, X, S, W, A, B and ends on meta."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    a, b = empty(e, r, k, dtype=torch.float32), empty(e, n, r, dtype=torch.float32)
    return empty(m, n), empty(m, k), empty(m, r), empty(e, n, k), a, b, empty(e, dtype=torch.int32)


def experts(target: str, turned: bool = False, **shape: Any) -> None:
    """Forward and backward of one weight, stored as [E, N, K] or as [E, K, N], and without adapters."""
    dy, x, _, w, a, b, ends = operands(**shape)
    if turned:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    _, s = triton_segments.forward(x, w, a, b, ends, 2.0)
    triton_segments.backward(dy, x, s, w, a, b, ends, 2.0, (True, True, True))
    triton_segments.product(x, w, ends)


def others(target: str) -> None:
    """Sums in parts, a large rank, odd sizes, other dtypes."""
    experts(target, m=512, e=4, turned=True)
    experts(target, r=64, dtype=torch.float16)
    experts(target, m=8191, n=99, k=333, r=5, e=7)
    experts(target, dtype=torch.float32)


def many(
    target: str, m: int = 16384, n: int = 4096, k: int = 4096, r: int = 16, e: int = 16, padded: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Forward and backward of several adapters on one weight, by both strategies. Stacks of B that were padded have rows that lie
    E R apart."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy, w, s, a, bias = empty(m, k), empty(m, n), empty(n, k), empty(m, r), empty(e, r, k), empty(n)
    b = empty(n, e, r).transpose(0, 1) if padded else empty(e, n, r)
    ends = torch.empty(e, dtype=torch.int32, device="meta")
    triton_segments.shrink(x, a, ends, 1.0)
    triton_segments.low_rank_grads(dy, x, s, b, ends, 1.0, (True, True, True), (torch.float32, torch.float32))
    for own in (None, bias):
        triton_segments.product(s, b, ends, bias_N=own)
        triton_segments.product(x, w.expand(e, n, k), ends, s, b, own)
    triton_segments.product(s, a.transpose(1, 2), ends)
    triton_segments.product(dy, w.T.expand(e, k, n), ends, s, a.transpose(1, 2))


def few_rows_of_many(target: str) -> None:
    """64 adapters, for 8 rows each."""
    many(target, m=512, n=1536, k=576, r=8, e=64)
    many(target, m=512, n=1536, k=576, r=32, e=64, padded=True)


def other_adapters(target: str) -> None:
    """Odd ranks and sizes, larger ranks, other dtypes."""
    many(target, r=12, e=3, padded=True)
    many(target, r=64, e=8, dtype=torch.float16)
    many(target, m=8191, n=99, k=333, r=5, e=7, padded=True)
    many(target, r=16, e=8, dtype=torch.float32)


def launchers(m: int, n: int, k: int, r: int) -> dict[str, Callable[[], Any]]:
    """What a step with `m` rows may call."""
    dy, x, s, w, a, b, ends = operands(m, n, k, r, 4)
    return {
        "segment_shrink": lambda: triton_segments.shrink(x, a, ends, 2.0),
        "segment_product": lambda: triton_segments.product(x, w, ends, s, b),
        "segment_expand": lambda: triton_segments.product(s, b.to(s.dtype), ends, bias_N=dy[0]),
        "segment_shared": lambda: triton_segments.product(x, w[:1].expand(4, n, k), ends, s, b, dy[0]),
        "segment_dx": lambda: triton_segments.product(dy, w.transpose(1, 2), ends, s, a.transpose(1, 2)),
        "segment_db": lambda: triton_segments.grads(dy, s, ends, b.dtype, b, 2.0),
        "segment_da": lambda: triton_segments.grads(x, s, ends, a.dtype, transposed=True),
    }
