"""What aot_jobs.py compiles of triton_rows.py: rotary embedding and cross-entropy, with shapes of real models."""

import torch

from plopfast.kernels import triton_rows


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rotary(target: str) -> None:
    """Llama-3-8B, the same interleaved, and partial (Phi-2) in new tensors and in place."""
    for backward in (False, True):
        _rotary(32, 8, 128, 128, backward=backward)
        _rotary(32, 8, 128, 128, interleaved=True, backward=backward)
    _rotary(32, 32, 80, 32)
    _rotary(9, 3, 64, 64, in_place=True)


def rotary_of_others(target: str) -> None:
    """Other dtypes, and StableLM, whose halves of 10 columns start nowhere near 16 bytes."""
    _rotary(32, 32, 80, 20)
    _rotary(32, 8, 128, 128, dtype=torch.float32)
    _rotary(32, 8, 128, 128, dtype=torch.float16, table=torch.float32, interleaved=True)
    _rotary(16, 16, 256, 64, table=torch.float32, backward=True)


def _rotary(
    hq: int, hk: int, d: int, width: int, dtype: torch.dtype = torch.bfloat16, table: torch.dtype | None = None,
    **options: bool,
) -> None:  # fmt: skip
    q, k = (_empty(4, 4096, h, d, dtype=dtype).transpose(1, 2) for h in (hq, hk))
    cos = _empty(1, 4096, width, dtype=table or dtype)
    triton_rows.rotary(q, k, cos, cos, **options)


def cross_entropy(target: str) -> None:
    """Llama-3's vocabulary, and Gemma-2's with its cap."""
    _cross_entropy(128256)
    _cross_entropy(256000, cap=30.0)


def losses(target: str) -> None:
    _cross_entropy(128256, gradient=False)


def cross_entropy_of_others(target: str) -> None:
    """GPT-2's odd vocabulary in padded rows; a bias; float32; a small vocabulary."""
    _cross_entropy(50257, padded=50304)
    _cross_entropy(51200, bias=True, multiplier=0.5)
    _cross_entropy(128256, dtype=torch.float32)
    _cross_entropy(300, dtype=torch.float32, cap=30.0, bias=True)


def _cross_entropy(
    v: int, padded: int = 0, dtype: torch.dtype = torch.bfloat16, bias: bool = False, multiplier: float = 1.0,
    cap: float | None = None, gradient: bool = True,
) -> None:  # fmt: skip
    z, targets = _empty(1024, padded or v, dtype=dtype)[:, :v], _empty(1024, dtype=torch.int64)
    options = {"multiplier": multiplier, "cap": cap, "gradient": gradient}
    triton_rows.cross_entropy(z, targets, _empty(v, dtype=dtype) if bias else None, **options)
