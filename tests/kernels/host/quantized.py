"""Launches of the kernels of quantised weights, for launches.py."""

import torch

from plopfast.kernels import nf4_ops, scaled_ops


def nf4_weight(n, k, double, device):
    blocks = -(-n * k // 64)
    made = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    nested = (made(256), made(-(-blocks // 256)), 0.25) if double else None
    return made(n * k // 2, 1, dtype=torch.uint8), made(blocks, dtype=torch.uint8 if double else torch.float32), nested


def decodings(n, k, dtypes, device):
    """Every kind of quantised weight [n, k], into each dtype."""
    for dtype in dtypes:
        w = torch.empty(n, k, dtype=dtype, device=device)
        for double in (False, True):
            nf4_ops.decode(*nf4_weight(n, k, double, device), w)
        for kind, block in ((torch.int8, (1, k)), (torch.float8_e4m3fn, (128, 128))):
            scale = torch.empty(-(-n // block[0]), -(-k // block[1]), device=device)
            scaled_ops.decode(torch.empty(n, k, dtype=kind, device=device), scale, block, w)


def products(x, n, s, b, plain=True):
    """x [M, K] by packed weights [n, K], with an adapter; and, where `plain`, with plain scales or a bias."""
    nf4_ops.gemm(x, *nf4_weight(n, x.shape[1], True, x.device), n, s, b)
    if plain:
        nf4_ops.gemm(x, *nf4_weight(n, x.shape[1], False, x.device), n, s, b)
        nf4_ops.gemm(x, *nf4_weight(n, x.shape[1], True, x.device), n, bias_N=x.new_empty(n))


def each(w):
    """Launcher -> a call of it, which decodes into `w`."""
    n, k = w.shape
    packed, q, scale = nf4_weight(n, k, True, w.device), torch.empty(n, k, dtype=torch.int8), torch.empty(n)
    return {
        "nf4 decode": lambda: nf4_ops.decode(*packed, w),
        "int8 decode": lambda: scaled_ops.decode(q, scale, (1, k), w),
    }
