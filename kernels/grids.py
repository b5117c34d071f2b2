"""How lora_shrink and lora_grads are cut into programs: enough of them for every SM, and no more parts than that takes.

The constants are fitted to a sweep on an H200 (bench/results/h200/grids.json, made by bench/card_grids.py). For the other
GPUs the same model takes their SMs and their bandwidth.

M tokens, K in, C columns of T, R rank.
"""

import torch
import triton

from . import dispatch
from .launch import padded_rank

# bytes a microsecond by the data sheet, and of shared memory in an SM (compute unit)
BANDWIDTH = {"sm_80": 2.0e6, "sm_86": 0.77e6, "sm_89": 1.0e6, "sm_90": 3.35e6, "sm_100": 8.0e6, "sm_103": 8.0e6, "sm_120": 1.8e6,
             "gfx90a": 1.6e6, "gfx942": 5.3e6, "gfx950": 8.0e6, "gfx1100": 0.96e6}  # fmt: skip
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_103": 227 << 10,
          "gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10, "gfx1100": 64 << 10}  # fmt: skip
START_US, STEP_US, DROP_US, SUM_US = (
    1.0,
    0.3,
    0.8,
    0.2,
)  # of a wave, of a tile, of one with a mask, of a part that is added
STAGES = 3
TYPICAL = 8192  # tokens


def shrink_grid(target: dispatch.Target, dtype: torch.dtype, m: int, k: int, width: int, drop: bool) -> tuple[int, ...]:
    """(BM, BK, programs over rows, programs over K, columns of X of each, warps) of lora_shrink; only the programs depend
    on M, so that one compiled kernel serves all.

    `width`: accumulators of a row. Four programs for each SM, or two of eight warps, each with eight steps or more; four
    steps where rows are few.
    """
    bk = 32 if dtype == torch.float32 or (width > (32 if drop else 64) and width != 64) else 64
    bm = 64 if dtype != torch.float32 or not drop else 32  # masked TF32 tiles of 64 rows would serialise wgmma
    bm = 16 if target.name == "interpreter" else bm
    rows, steps, warps = triton.cdiv(m, bm), max(1, triton.cdiv(k, bk)), 8 if width >= 64 else 4
    most = max(1, steps // (4 if 2 * rows < target.units else 8))
    splits = min(most, max(1, round(16 / warps * target.units / rows)))
    chunk = triton.cdiv(steps, splits) * bk
    return bm, bk, rows, max(1, triton.cdiv(k, chunk)), chunk, warps


def grads_tiles(target: dispatch.Target, dtype: torch.dtype, rank: int, with_ds: bool) -> list[tuple[int, int, int]]:
    """(BM, BC, warps) that lora_grads may take: STAGES tiles fit shared memory, the accumulators fit registers."""
    padded = padded_rank(rank)
    if target.name == "interpreter":
        return [(16, 32, 4)]
    if dtype == torch.float32:
        bm = 64 if with_ds and target.name == "sm_90" else 32  # 32 rows of TF32 under odd strides would serialise wgmma
        return [(bm, 64 if padded < 128 else 32, 8 if with_ds or padded > 32 else 4)]
    if not with_ds:
        return [(64 if padded <= 128 else 32, 64, 4 if padded <= 32 else 8)]
    room, found = SHARED.get(target.name, 99 << 10), []
    small = target.name.startswith("gfx1")  # RDNA has fewer registers
    for bc in (width for width in (64, 128, 256, 512) if width <= (128 if small else 8192 // padded)):
        bm = next((rows for rows in (64, 32) if 2 * (STAGES * rows * (bc + padded) + bc * padded) <= room), 0)
        found += [(bm, bc, 8 if small or bc >= 256 else 4)] if bm else []
    return found


def grads_us(
    target: dispatch.Target, size: int, m: int, columns: int, rank: int, with_ds: bool, drop: bool,
    bm: int, bc: int, warps: int, parts: int, segments: int = 1,
) -> float:  # fmt: skip
    """A model of lora_grads and the sum of its parts, in microseconds; T has `size` bytes an element. `segments` of equal size
    have sums of their own.

    Programs that live at a time share the bandwidth, and none takes a tile faster than its latency. The parts are written and
    read, and the sum has to wait for each.
    """
    bandwidth = BANDWIDTH.get(target.name, 1e6)
    at_a_time = target.units * max(1, min(16 // warps, SHARED.get(target.name, 99 << 10) // (STAGES * bm * bc * size)))
    stripes = triton.cdiv(columns, bc)
    programs, steps = segments * stripes * parts, triton.cdiv(triton.cdiv(m, segments * bm), parts)
    sharing = max(target.units, min(programs, at_a_time))  # one SM alone gets no more than its share
    tile_us = max(bm * bc * size * sharing / bandwidth, DROP_US if drop else STEP_US)
    added = {"g": (parts, segments * columns), "ds": (stripes if with_ds else 1, m)}.values()
    part_bytes = sum(8 * rank * length * count for count, length in added if count > 1)
    waits = max((count for count, _ in added if count > 1), default=0)
    return triton.cdiv(programs, at_a_time) * (START_US + steps * tile_us) + part_bytes / bandwidth + waits * SUM_US


def grads_grid(
    target: dispatch.Target, dtype: torch.dtype, m: int, columns: int, rank: int, with_ds: bool, drop: bool = False,
    segments: int = 0,
) -> tuple[int, int, int, int, int]:  # fmt: skip
    """(BM, BC, warps, row parts, column stripes) of lora_grads: by the model, the fastest of one, two and four waves; of
    segment_grads, with the parts of each segment, if there are `segments`.

    The tile is the fastest for TYPICAL tokens, whatever M is, so that one compiled kernel serves all.
    """

    def fastest(tokens: int, tiles: list[tuple[int, int, int]]) -> tuple[float, tuple[int, int, int, int, int]]:
        found = []
        for bm, bc, warps in tiles:
            stripes, blocks = triton.cdiv(columns, bc), triton.cdiv(tokens, segments * bm)
            for waves in (1, 2, 4):
                parts = min(max(1, waves * target.units // (segments * stripes)), blocks)
                parts = triton.cdiv(blocks, triton.cdiv(blocks, parts))  # no part is empty
                us = grads_us(
                    target, dtype.itemsize, tokens, columns, rank, with_ds, drop, bm, bc, warps, parts, segments
                )
                found.append((us, (bm, bc, warps, parts, stripes)))
        return min(found)

    tiles = grads_tiles(target, dtype, rank, with_ds)
    if segments and target.name.startswith("sm_10"):  # 512 columns beside the numbers of segments spill there
        tiles = [tile for tile in tiles if tile[1] <= 256]
    if segments and with_ds and dtype != torch.float32 and target.name.startswith("gfx1"):
        tiles = [(32, 64, 8)]  # as do 64 rows on RDNA where the rank fills no tile
    few = dtype != torch.float32 and not with_ds and padded_rank(rank) == 32
    if segments and few and target.name.startswith("sm_"):
        tiles = [(bm, bc, 8) for bm, bc, _ in tiles]  # four warps spill beside them
    segments = max(segments, 1)
    tile = fastest(TYPICAL, tiles)[1][:3]
    return fastest(m, [tile])[1]
