"""What aot_jobs.py compiles of quantised weights, with shapes of an 8-billion model: decodings, and products of few tokens."""

import torch

from plopfast.kernels import nf4_ops, scaled_ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _nf4(n: int, k: int, double: bool) -> tuple[torch.Tensor, torch.Tensor, nf4_ops.Nested | None]:
    blocks = n * k // 64
    absmax = _empty(blocks, dtype=torch.uint8 if double else torch.float32)
    return (
        _empty(n * k // 2, 1, dtype=torch.uint8),
        absmax,
        (_empty(256), _empty(blocks // 256), 0.5) if double else None,
    )


def nf4_decodings(target: str) -> None:
    for double in (False, True):
        for dtype in DTYPES:
            nf4_ops.decode(*_nf4(14336, 4096, double), _empty(14336, 4096, dtype=dtype))


def nf4_products(target: str) -> None:
    """One token and 64, with adapters of rank 16."""
    _nf4_product(1, 16, True)
    _nf4_product(64, 16, True)
    _nf4_product(64, 16, False)


def nf4_products_of_others(target: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """No adapter, and one of rank 64."""
    for m in (1, 64):
        _nf4_product(m, 16, False, dtype)
        for r in (0, 64):
            _nf4_product(m, r, True, dtype)


def _nf4_product(m: int, r: int, double: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    n, k = 14336, 4096
    low = (_empty(m, r, dtype=dtype), _empty(n, r)) if r else (None, None)
    nf4_ops.gemm(_empty(m, k, dtype=dtype), *_nf4(n, k, double), n, *low, _empty(n, dtype=dtype) if r == 16 else None)


def nf4_products_in_float32(target: str) -> None:
    """Where torch's products may take TF32, and where they may not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for matmul.fp32_precision in ("ieee", "tf32"):
            nf4_products_of_others(target, torch.float32)
    finally:
        matmul.fp32_precision = before


def scaled_decodings(target: str) -> None:
    """int8 with a scale a row, float8 with one for 128 x 128."""
    n, k = 14336, 4096
    for dtype in DTYPES:
        w = _empty(n, k, dtype=dtype)
        scaled_ops.decode(_empty(n, k, dtype=torch.int8), _empty(n), (1, k), w)
        scaled_ops.decode(_empty(n, k, dtype=torch.float8_e4m3fn), _empty(n // 128, k // 128), (128, 128), w)


def odd_decodings(target: str) -> None:
    """Rows of no multiple of 16, blocks of columns that share no sixteen, and a short last block of NF4."""
    n, k = 4099, 4097
    for dtype in (torch.int8, torch.float8_e4m3fn):
        scaled_ops.decode(_empty(n, k, dtype=dtype), _empty(n), (1, k), _empty(n, k, dtype=torch.bfloat16))
        scales = _empty(-(-n // 8) * -(-k // 5))
        scaled_ops.decode(_empty(n, k, dtype=dtype), scales, (8, 5), _empty(n, k, dtype=torch.bfloat16))
    blocks = -(-(n + 1) * k // 64)
    nf4_ops.decode(_empty((n + 1) * k // 2, dtype=torch.uint8), _empty(blocks), None, _empty(n + 1, k))
