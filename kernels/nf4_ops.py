"""Launchers of the NF4 kernels (nf4.py): the product with a packed weight, and its decoding.

M tokens, K in, N out, R rank.
"""

import torch
import triton

from . import nf4
from .launch import on_device, precision, rank_chunk

_LEVELS: dict[torch.device, torch.Tensor] = {}  # the table of 16 levels, on each device that asked for it


def gemm_nf4(
    x_MK: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, s_MR: torch.Tensor | None = None,
    b_NR: torch.Tensor | None = None, bias_N: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Y = X W^T + S B^T + bias, W [N, K] decoded inside: packed [N, K / 2] by `nf4.repack`, absmax [N, K / 64] float32."""
    (m, k), n = x_MK.shape, packed.shape[0]
    y_MN = x_MK.new_empty(m, n)
    if not m or not n:
        return y_MN
    x_MK = x_MK.contiguous()
    bm = 16 if m <= 16 else 64
    bn = 64 if m <= 16 or x_MK.dtype == torch.float32 else 128
    rank = 1 if s_MR is None else s_MR.shape[1]
    s, b = (s_MR, b_NR) if s_MR is not None and b_NR is not None else (x_MK, x_MK)
    with on_device(x_MK):
        nf4.lora_gemm_nf4[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
            x_MK, packed, absmax, _levels(x_MK.device), s, b, x_MK if bias_N is None else bias_N.contiguous(), y_MN, m, n, k,
            k, s.stride(0), *b.stride(), n,
            RANK=rank, BR=rank_chunk(rank), LORA=s_MR is not None, BIAS=bias_N is not None,
            PRECISION=precision(x_MK), BM=bm, BN=bn, GROUP=8, num_warps=4 if bm == 16 else 8, num_stages=3,
        )  # fmt: skip
    return y_MN


def decode_nf4(packed: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """W [N, K] decoded into `out` (contiguous), a workspace that is used again for every layer."""
    blocks = absmax.numel()
    if blocks:
        with on_device(packed):
            nf4.decode_nf4[(triton.cdiv(blocks, 64),)](
                packed, absmax, _levels(packed.device), out, blocks, BLOCKS=64, num_warps=4
            )
    return out


def _levels(device: torch.device) -> torch.Tensor:
    if device not in _LEVELS:
        _LEVELS[device] = torch.tensor(nf4.LEVELS, dtype=torch.float32, device=device)
    return _LEVELS[device]
