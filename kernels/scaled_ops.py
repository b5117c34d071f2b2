"""The launcher of the kernel that decodes int8 and float8 weights (scaled.py).

N out, K in.
"""

from collections.abc import Callable

import torch
import triton

from . import scaled
from .launch import Planned, plan

TILE = 32, 128  # rows and columns of W that a program decodes


def decode(q_NK: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], out: torch.Tensor) -> torch.Tensor:
    """w[n, k] = q[n, k] scale[n // block[0], k // block[1]] into `out` [N, K], float32, bfloat16 or float16.

    q is int8 or float8_e4m3fn, `scale` float32 of ceil(N / block[0]) x ceil(K / block[1]) elements. All are contiguous.
    """
    assert q_NK.is_contiguous() and scale.is_contiguous() and out.is_contiguous()
    run = plan(_decode, q_NK.device, q_NK.dtype, q_NK.shape, scale.dtype, scale.shape, block, out.dtype, out.shape)
    run(q_NK, scale, out)
    return out


def _decode(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, scale_dtype: torch.dtype, scales: torch.Size,
    block: tuple[int, int], out_dtype: torch.dtype, out_shape: torch.Size,
) -> Callable[..., None]:  # fmt: skip
    (n, k), (rows_of, columns_of) = shape, block
    assert dtype in (torch.int8, torch.float8_e4m3fn) and scale_dtype == torch.float32, (dtype, scale_dtype)
    assert out_dtype in (torch.float32, torch.bfloat16, torch.float16) and out_shape == shape, (out_dtype, out_shape)
    columns = triton.cdiv(k, columns_of)
    assert scales.numel() == triton.cdiv(n, rows_of) * columns, f"{scales} scales for {n} x {k} in blocks of {block}"
    if not n or not k:
        return lambda *_: None
    bn, bk = TILE
    grain = 16 if columns == 1 or columns_of % 16 == 0 else 1
    launch = Planned(
        scaled.decode_scaled, (triton.cdiv(n, bn) * triton.cdiv(k, bk),), (k,),
        {"E4M3": dtype != torch.int8, "GRAIN": grain, "BN": bn, "BK": bk}, device, num_warps=4,
    )  # fmt: skip
    free = n, columns, rows_of, columns_of
    return lambda q, scale, w: launch((q.view(torch.int8), scale, w), free)
