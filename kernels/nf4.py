"""NF4 frozen weights (Dettmers et al., QLoRA, arXiv 2305.14314, appendix E): 4-bit codes, one absmax for 64 elements.

On disk as bitsandbytes writes it: byte j of a row-major stream holds elements 2j (high half) and 2j + 1 (low half). In
memory it is repacked: byte j of a block of 64 holds elements j (low half) and j + 32 (high half). Both halves of a tile
are then used as they come, without a shuffle: 4.8 instructions beside each matrix instruction, against 20 to 25 in
bitsandbytes' order. For few tokens `lora_gemm_nf4` decodes inside the product; for many, `decode_nf4` writes W once
into a workspace, and the ordinary product follows.

M tokens, K in (a multiple of 64), N out, R rank.
"""

import torch
import triton
import triton.language as tl

from .gemm import finish, tile_of

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def codes_of(packed: torch.Tensor, n_out: int, n_in: int) -> torch.Tensor:
    """Unpacks bitsandbytes' bytes (any shape, N K / 2 of them) into codes 0..15, uint8 [N, K]."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=-1).reshape(n_out, n_in)


def repack(packed: torch.Tensor, n_out: int, n_in: int) -> torch.Tensor:
    """Reorders bitsandbytes' bytes into this package's, uint8 [N, K / 2]. Raises ValueError if K % 64 != 0."""
    if n_in % BLOCK or packed.numel() * 2 != n_out * n_in:
        raise ValueError(
            f"NF4 weight: expected {n_out} x {n_in} / 2 bytes with in_features a multiple of {BLOCK}, "
            f"got {packed.numel()} bytes"
        )
    codes = codes_of(packed, n_out, n_in).view(n_out, n_in // BLOCK, 2, BLOCK // 2)
    return (codes[:, :, 1] << 4 | codes[:, :, 0]).reshape(n_out, n_in // 2)


@triton.jit
def _levels(code, table):
    """Levels of a 2-D block of codes, from a table kept in registers."""
    flat = tl.reshape(code.to(tl.int32), (code.shape[0] * code.shape[1],))
    return tl.reshape(tl.gather(table, flat, 0), (code.shape[0], code.shape[1]))


@triton.jit(do_not_specialize=["M"])
def lora_gemm_nf4(
    x, packed, absmax, levels, s, b, bias, y, M, N, K, sxm, ssm, sbn, sbr, sym,
    RANK: tl.constexpr, BR: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + S B^T + bias with W [N, K] decoded in registers: packed [N, K / 2], absmax [N, K / 64]."""
    dtype: tl.constexpr = x.dtype.element_ty
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    rm = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    row_M = tl.where(rm < M, rm, 0)
    rn = tile_n * BN + tl.arange(0, BN)
    col_N = tl.where(rn < N, rn, 0).to(tl.int64)  # columns beyond the edge decode column 0 and are not stored
    half = tl.arange(0, 32)
    table = tl.load(levels + tl.arange(0, 16))
    bytes_NK = packed + col_N[:, None] * (K // 2) + half[None, :]
    scale_N = absmax + col_N * (K // 64)
    x_MK = x + row_M[:, None] * sxm + half[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K // 64):
        code, scale = tl.load(bytes_NK), tl.load(scale_N)[:, None]
        low = (_levels(code & 15, table) * scale).to(dtype)
        high = (_levels(code >> 4, table) * scale).to(dtype)
        acc = tl.dot(tl.load(x_MK), low.T, acc, input_precision=PRECISION)
        acc = tl.dot(tl.load(x_MK + 32), high.T, acc, input_precision=PRECISION)
        bytes_NK += 32
        scale_N += 1
        x_MK += 64
    finish(
        acc, s, b, bias, y, y, tile_n, rm, row_M, rn, M, N, ssm, sbn, sbr, sym, dtype,
        RANK, BR, LORA, BIAS, False, True, PRECISION,
    )  # fmt: skip


@triton.jit
def decode_nf4(packed, absmax, levels, w, blocks, BLOCKS: tl.constexpr):
    """w [blocks, 64] in w's dtype out of packed [blocks, 32] and absmax [blocks]."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    half = tl.arange(0, 32)
    mask = (block < blocks)[:, None] & (half >= 0)[None, :]
    table = tl.load(levels + tl.arange(0, 16))
    code = tl.load(packed + block[:, None] * 32 + half[None, :], mask=mask, other=0)
    scale = tl.load(absmax + block, mask=block < blocks, other=0.0)[:, None]
    at = w + block[:, None] * 64 + half[None, :]
    tl.store(at, (_levels(code & 15, table) * scale).to(w.dtype.element_ty), mask=mask)
    tl.store(at + 32, (_levels(code >> 4, table) * scale).to(w.dtype.element_ty), mask=mask)
