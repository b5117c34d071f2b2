"""The dropout mask: a pure function of (seed, row, column), so it is never stored.

Philox-4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11: 7 rounds pass BigCrush).
One counter serves 8 neighbouring columns: its four 32-bit words are split into 16-bit lanes, and an element is kept if
its lane is not below round(p * 2^16). Because it depends on the position alone, the mask is the same for all tile sizes
and devices, under activation checkpointing and in a second backward pass.

mask.py holds the Triton version, which draws a tile of the mask in registers.
"""

import torch

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
LANES = 8
LEVELS = 1 << 16
Seed = int | torch.Tensor  # 64 bits: a number, or a 0-d int64 tensor on the device that computes, as in a CUDA graph


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[Seed, Seed], rounds: int = ROUNDS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox-4x32 of int64 tensors that hold 32-bit counters; returns four int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # the 64-bit products wrap in int64, which keeps their bits; the mask undoes the arithmetic shift
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """How many of the 2^16 lane values drop an element. The drop rate in force is threshold / 2^16."""
    return min(round(p * LEVELS), LEVELS - 1)


def inverse_keep(p: float) -> float:
    """1 / (1 - p) for the drop rate in force, which keeps the expectation exact."""
    return LEVELS / (LEVELS - threshold(p))


def keep_mask(seed: Seed, rows: int, columns: int, p: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """bool [rows, columns], True where an element is kept; `p` is the drop rate."""
    row = torch.arange(rows, device=device)[:, None]
    group = torch.arange(-(-columns // LANES), device=device)[None, :]
    row, group = torch.broadcast_tensors(row, group)
    zero = torch.zeros_like(row)
    words = philox4x32((group, row & _LOW, row >> 32, zero), (seed & _LOW, (seed >> 32) & _LOW))
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (lanes >= threshold(p)).reshape(rows, row.shape[1] * LANES)[:, :columns]
