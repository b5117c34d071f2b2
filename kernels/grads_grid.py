"""How lora_grads is cut into programs: stripes of columns by parts of rows.

M tokens, C columns of T, R rank.
"""

import torch
import triton

from . import dispatch
from .launch import padded_rank


def stripe_widths(target: dispatch.Target, dtype: torch.dtype, rank: int, with_ds: bool) -> list[int]:
    """Widths of a column stripe that lora_grads may take; none where dS should be a kernel of its own.

    The parts of dS cost 4 R / width of the bytes of T. If R is over a quarter of the width, reading T twice costs less.
    """
    padded, name = padded_rank(rank), target.name
    if name == "interpreter":
        return [32, 64] if padded <= 64 or not with_ds else []
    if dtype == torch.float32:
        widths = [64] if padded < 128 else [32]
    else:
        wide = name in dispatch.WIDE_SHARED_MEMORY
        most = 1024 if wide else 512 if name in ("sm_86", "sm_89", "sm_120") else 256
        most = min(most, (16384 if wide else 8192) // padded)
        widths = [width for width in (128, 256, 512, 1024) if width <= most] or [most]
    return [width for width in widths if 4 * padded <= width] if with_ds else widths[:1]


def grads_grid(
    target: dispatch.Target, dtype: torch.dtype, m: int, columns: int, rank: int, with_ds: bool
) -> tuple[int, int, int, int, int]:
    """(BM, BC, tiles in a stripe, row parts, column stripes) of lora_grads.

    About half a program for each SM, because the bytes of the parts grow with the root of the number of programs. With
    dS, the stripe is the one whose parts cost the fewest bytes.
    """
    programs, blocks = max(1, target.units // 2), triton.cdiv(m, 16)

    def split(width: int) -> tuple[int, int]:
        stripes = triton.cdiv(columns, width)
        return max(1, min(round(programs / stripes), blocks)), stripes

    def cost(width: int) -> int:
        parts, stripes = split(width)
        return (stripes * m if with_ds and stripes > 1 else 0) + (parts * columns if parts > 1 else 0)

    widths = stripe_widths(target, dtype, rank, with_ds)
    width = min(widths, key=cost) if with_ds else widths[0]
    if target.name == "interpreter":
        bm, tiles = 16, 1 + (with_ds and width == 64)
    else:
        tiles = 1 + (with_ds and width >= 512)
        roomy = width == 128 or (target.name in dispatch.WIDE_SHARED_MEMORY and width <= 512 and rank <= 128)
        bm = 64 if roomy and dtype != torch.float32 else 32
    parts, stripes = split(width)
    blocks = triton.cdiv(m, bm)
    parts = triton.cdiv(blocks, triton.cdiv(blocks, min(parts, blocks)))  # no part is empty
    return bm, width // tiles, tiles, parts, stripes
