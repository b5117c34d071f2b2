"""Launchers of the NF4 kernels (nf4.py): the decoding of a packed weight, and the product with one for few tokens.

`packed` holds N K / 2 bytes in any shape, `absmax` ceil(N K / 64) scales: float32 with `nested` None; or uint8, with
`nested` = (code [256], one scale for 256 blocks, offset), the first two in float32.

M tokens, K in, N out, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton

from . import nf4
from .launch import Planned, low_rank_facts, plan, precision, rank_chunk
from .torch_codes import BLOCK, LEVELS, NESTED

Nested = tuple[torch.Tensor, torch.Tensor, float]
BLOCKS = 64  # that a program of `decode_nf4` takes
# absmax of a double-quantised weight is bitsandbytes' to the bit only if a product is rounded before the offset is added
UNFUSED = {"enable_fp_fusion": False}

_LEVELS: dict[torch.device, torch.Tensor] = {}  # the table of 16 levels, on each device that asked for it


def decode(packed: torch.Tensor, absmax: torch.Tensor, nested: Nested | None, out: torch.Tensor) -> torch.Tensor:
    """W [N, K] decoded into `out` (contiguous, any K), a workspace that is used again for every layer."""
    code, scales, offset = nested or (absmax, absmax, 0.0)
    assert packed.is_contiguous() and absmax.is_contiguous() and scales.is_contiguous() and out.is_contiguous()
    run = plan(
        _decode, packed.device, packed.shape, absmax.shape, absmax.dtype, code.dtype, scales.dtype, scales.shape, offset, out.dtype,
        out.shape,
    )  # fmt: skip
    run(packed, absmax, code, scales, out)
    return out


def _decode(device: torch.device, packed: torch.Size, absmax: torch.Size, *facts: Any) -> Callable[..., None]:
    *scales, offset, dtype, shape = facts
    size, blocks, double = _checked(packed, absmax, *scales)
    assert shape.numel() == 2 * size and dtype in (torch.float32, torch.bfloat16, torch.float16), (shape, size, dtype)
    if not size:
        return lambda *_: None
    launch = Planned(
        nf4.decode_nf4, (triton.cdiv(blocks, BLOCKS),), (offset,), {"DOUBLE": double, "BLOCKS": BLOCKS}, device, num_warps=4,
        **UNFUSED,
    )  # fmt: skip
    levels = _levels(device)
    return lambda packed, absmax, code, scales, w: launch((packed, absmax, code, scales, levels, w), (size,))


def gemm(
    x_MK: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, nested: Nested | None, n: int,
    s_MR: torch.Tensor | None = None, b_NR: torch.Tensor | None = None, bias_N: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Y = X W^T + S B^T + bias, with W [n, K] decoded inside. K is a multiple of 64."""
    code, scales, offset = nested or (absmax, absmax, 0.0)
    assert packed.is_contiguous() and absmax.is_contiguous() and scales.is_contiguous()
    b_NR, lora = low_rank_facts(s_MR, b_NR)
    run = plan(
        _gemm, x_MK.device, packed.shape, absmax.shape, absmax.dtype, code.dtype, scales.dtype, scales.shape, offset, x_MK.dtype,
        x_MK.shape, n, lora, None if bias_N is None else bias_N.dtype, precision(x_MK),
    )  # fmt: skip
    return run(x_MK.contiguous(), packed, absmax, code, scales, s_MR, b_NR, bias_N)


def _gemm(device: torch.device, packed: torch.Size, absmax: torch.Size, *facts: Any) -> Callable[..., torch.Tensor]:
    *scales, offset, dtype, (m, k), n, (rank, s_strides, b_strides, _), bias, exact = facts
    size, _, double = _checked(packed, absmax, *scales)
    assert k % BLOCK == 0 and 2 * size == n * k, (n, k, size)
    if not m or not n:
        return lambda x, *_: x.new_empty(m, n)
    bm, bn, warps = _tile(m, dtype)
    launch = Planned(
        nf4.lora_gemm_nf4, (triton.cdiv(m, bm) * triton.cdiv(n, bn),),
        (offset, n, k, k, *(s_strides or (0,)), *(b_strides or (0, 0)), n),
        {"DOUBLE": double, "RANK": rank, "BR": rank_chunk(rank), "LORA": bool(s_strides), "BIAS": bias is not None,
         "PRECISION": exact, "BM": bm, "BN": bn, "GROUP": 8},
        device, num_warps=warps, num_stages=3, **UNFUSED,
    )  # fmt: skip
    levels = _levels(device)

    def run(
        x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, scales: torch.Tensor,
        s: torch.Tensor | None, b: torch.Tensor | None, bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        y = x.new_empty(m, n)
        others = x if s is None else s, x if b is None else b, x if bias is None else bias.contiguous()
        launch((x, packed, absmax, code, scales, levels, *others, y), (m,))
        return y

    return run


def _tile(m: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(BM, BN, warps). A thread holds 64 columns of float32 operands, so that larger tiles of them would spill."""
    if dtype == torch.float32:
        return (16, 32, 4) if m <= 16 else (32, 32, 8)
    return 16 if m <= 16 else 64, 64, 4


def _checked(
    packed: torch.Size, absmax: torch.Size, kind: torch.dtype, code: torch.dtype, scales: torch.dtype, nested: torch.Size
) -> tuple[int, int, bool]:  # fmt: skip
    """Bytes, blocks, and whether absmax is quantised too. Callers check what users may get wrong."""
    size, blocks, double = packed.numel(), absmax.numel(), kind == torch.uint8
    assert blocks == triton.cdiv(2 * size, BLOCK), f"{blocks} absmax for {size} bytes"
    assert nested.numel() == (triton.cdiv(blocks, NESTED) if double else blocks), f"{nested} scales for {blocks} absmax"
    assert code == scales == torch.float32, (code, scales)
    return size, blocks, double


def _levels(device: torch.device) -> torch.Tensor:
    if device not in _LEVELS:
        _LEVELS[device] = torch.tensor(LEVELS, dtype=torch.float32, device=device)
    return _LEVELS[device]
