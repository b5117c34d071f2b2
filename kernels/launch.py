"""What every launcher needs: the device, rounded-up ranks, the precision of products, and the sum of parts.

N out, R rank.
"""

import contextlib

import torch
import triton

from . import dispatch
from .reduce import sum_partials

REDUCE_BLOCK = 1024


def sum_parts(partials: torch.Tensor, scale: float, dtype: torch.dtype, root: bool = False) -> torch.Tensor:
    """scale * the sum over the first dimension, in a fixed order; its square root if `root`."""
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    if out.numel():
        sum_partials[(triton.cdiv(out.numel(), REDUCE_BLOCK),)](
            partials, out, partials.shape[0], out.numel(), scale, ROOT=root, BLOCK=REDUCE_BLOCK, num_warps=4
        )
    return out


def padded_rank(rank: int) -> int:
    """The rank in a tile: a power of two, and at least 16, because matrix instructions reduce no fewer."""
    return max(16, triton.next_power_of_2(rank))


def rank_chunk(rank: int) -> int:
    """Ranks that an epilogue adds at once. 64 would spill beside a 128 x 128 accumulator."""
    return min(32, padded_rank(rank))


def precision(x: torch.Tensor) -> str:
    """The precision that torch's own float32 products take, or "ieee", which every target has."""
    name = dispatch.target_of(x.device).name
    chosen = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if chosen and (name.startswith("sm_") or name in ("gfx942", "interpreter")) else "ieee"


def near(b_NR: torch.Tensor) -> torch.Tensor:
    """B for an epilogue, which reads it by 32-bit offsets to save registers: copied if those don't reach."""
    reach = sum((size - 1) * stride for size, stride in zip(b_NR.shape, b_NR.stride(), strict=True))
    return b_NR if reach < 2**31 else b_NR.contiguous()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one, on which Triton launches."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
