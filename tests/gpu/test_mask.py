"""The mask that kernels draw in registers is philox.py's, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl
from cases import DEVICE

from plopfast.kernels import philox
from plopfast.kernels.mask import keep_tile


@triton.jit
def store_tile(out, seed, row0, column0, threshold, BM: tl.constexpr, BC: tl.constexpr):
    rows = tl.cast(row0, tl.int64) + tl.arange(0, BM)
    keep = keep_tile(seed, rows, column0, threshold, BM, BC)
    tl.store(out + tl.arange(0, BM)[:, None] * BC + tl.arange(0, BC)[None, :], keep.to(tl.int8))


def tile_of(seed, row0, column0, p, bm, bc, watched):
    out = torch.full((bm, bc), 7, dtype=torch.int8, device=DEVICE)
    with watched("out"):
        store_tile[1,](out, seed, row0, column0, philox.threshold(p), BM=bm, BC=bc)
    assert ((out == 0) | (out == 1)).all()
    return out.bool()


def mask_of(seed, row0, column0, p, bm, bc):
    """From the words themselves: philox.keep_mask begins at row 0 and takes a matrix of all rows."""
    row = torch.arange(row0, row0 + bm, device=DEVICE)[:, None].expand(bm, bc)
    column = torch.arange(column0, column0 + bc, device=DEVICE)[None, :].expand(bm, bc)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    counter = (column // 8, row & 0xFFFFFFFF, row >> 32, torch.zeros_like(row))
    words = torch.stack(philox.philox4x32(counter, key), dim=-1)
    lane = column % 8
    word = words.gather(-1, (lane // 2)[..., None])[..., 0]
    return ((word >> 16 * (lane % 2)) & 0xFFFF) >= philox.threshold(p)


SEEDS = [0, 5, (1 << 31) - 1, 1 << 31, (1 << 32) + 7, (1 << 63) - 1, -1, -(1 << 63)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_bit_of_the_seed_counts(seed, watched):
    got = tile_of(seed, 0, 0, 0.4, 32, 64, watched)
    assert torch.equal(got, philox.keep_mask(seed, 32, 64, 0.4, DEVICE))
    for bit in (0, 31, 32, 63):
        other = seed ^ (1 << bit)
        assert not torch.equal(got, philox.keep_mask(other, 32, 64, 0.4, DEVICE))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_in_memory_is_the_number_that_lies_there(seed, watched):
    there = torch.tensor(seed, device=DEVICE)
    assert torch.equal(tile_of(there, 8, 16, 0.4, 32, 64, watched), tile_of(seed, 8, 16, 0.4, 32, 64, watched))
    assert torch.equal(philox.keep_mask(there, 20, 40, 0.4, DEVICE), philox.keep_mask(seed, 20, 40, 0.4, DEVICE))


def test_a_seed_is_the_same_as_a_signed_or_unsigned_number():
    assert torch.equal(philox.keep_mask(-1, 4, 64, 0.5), philox.keep_mask((1 << 64) - 1, 4, 64, 0.5))


@pytest.mark.parametrize("bm, bc", [(16, 32), (64, 8), (32, 16), (16, 128)])
@pytest.mark.parametrize("row0, column0", [(0, 0), (16, 128), (48, 8), (3, 72)])
def test_tiles_are_cut_from_one_mask(row0, column0, bm, bc, watched):
    whole = philox.keep_mask(11, row0 + bm, column0 + bc, 0.3, DEVICE)
    assert torch.equal(tile_of(11, row0, column0, 0.3, bm, bc, watched), whole[row0:, column0:])


@pytest.mark.parametrize("row0", [(1 << 31) - 8, (1 << 32) - 8, (1 << 32) + 3, (1 << 33) + 16, (1 << 40) + 5])
def test_rows_beyond_32_bits(row0, watched):
    got = tile_of(11, row0, 64, 0.5, 16, 64, watched)
    assert torch.equal(got, mask_of(11, row0, 64, 0.5, 16, 64))
    for i in range(16):  # the high half of a row's number counts
        low = mask_of(11, (row0 + i) % (1 << 32), 64, 0.5, 1, 64)
        assert torch.equal(got[i : i + 1], low) == (row0 + i < 1 << 32)


def test_columns_up_to_32_bits(watched):
    column0 = (1 << 31) - 64
    assert torch.equal(tile_of(11, 0, column0, 0.5, 16, 32, watched), mask_of(11, 0, column0, 0.5, 16, 32))


@pytest.mark.parametrize("p", [1e-6, 1 / 65536, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_every_drop_rate(p, watched):
    got = tile_of(11, 0, 0, p, 64, 64, watched)
    assert torch.equal(got, philox.keep_mask(11, 64, 64, p, DEVICE))
    rate = philox.threshold(p) / 65536
    assert abs((~got).float().mean().item() - rate) <= 5 * (rate * (1 - rate) / 4096) ** 0.5 + 1e-9
