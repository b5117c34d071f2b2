"""The LoRA linear in plain torch, LoRA-first: the CPU's backend, and an exact strategy on any device.

The low-rank product is written first, and the frozen product is added to it in place (beta = 1). That saves one read
and one write of Y, compared with `linear` and an addition. c = scaling / (1 - p) is folded into S and dS, as in
triton_ops.py.

M tokens, K in, N out, R rank. All tensors share X's dtype, except that adapters may be wider.
"""

import torch

from . import philox


def shrink(x_MK: torch.Tensor, a_RK: torch.Tensor, c: float, p: float, seed: philox.Seed) -> torch.Tensor:
    """S = c drop(X) A^T; `drop` zeroes elements and does not rescale"""
    s_MR = x_MK.new_empty(x_MK.shape[0], a_RK.shape[0])
    return s_MR.addmm_(_drop(x_MK, p, seed) if p else x_MK, a_RK.to(x_MK.dtype).T, beta=0, alpha=c)


def forward(
    x_MK: torch.Tensor, s_MR: torch.Tensor, w_NK: torch.Tensor, b_NR: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    """Y = (S B^T + bias) + X W^T"""
    y_MN = torch.nn.functional.linear(s_MR, b_NR.to(x_MK.dtype), bias_N)
    return y_MN.addmm_(x_MK, w_NK.T)


def grad_s(dy_MN: torch.Tensor, b_NR: torch.Tensor, c: float) -> torch.Tensor:
    """dS = c dY B"""
    return shrink(dy_MN, b_NR.T, c, 0.0, 0)


def grad_x(
    dy_MN: torch.Tensor, ds_MR: torch.Tensor, w_NK: torch.Tensor, a_RK: torch.Tensor, p: float, seed: philox.Seed
) -> torch.Tensor:
    """dX = mask (dS A) + dY W"""
    return low_rank(ds_MR, a_RK, seed, p).addmm_(dy_MN, w_NK)


def low_rank(ds_MR: torch.Tensor, a_RK: torch.Tensor, seed: philox.Seed, p: float) -> torch.Tensor:
    """mask (dS A)"""
    dx_MK = ds_MR @ a_RK.to(ds_MR.dtype)
    return dx_MK.mul_(philox.keep_mask(seed, dx_MK.shape[0], dx_MK.shape[1], p, dx_MK.device)) if p else dx_MK


def grad_a(ds_MR: torch.Tensor, x_MK: torch.Tensor, p: float, seed: philox.Seed) -> torch.Tensor:
    """dA = dS^T drop(X)"""
    return ds_MR.T @ _drop(x_MK, p, seed)


def grad_b(dy_MN: torch.Tensor, s_MR: torch.Tensor) -> torch.Tensor:
    """dB = dY^T S"""
    return dy_MN.T @ s_MR


def row_norms(y_MN: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """||y - bias|| [M], in float32 at least: a large bias would swallow W x in bfloat16"""
    wide = torch.promote_types(y_MN.dtype, torch.float32)
    y_MN = y_MN if bias_N is None else y_MN.to(wide) - bias_N.to(wide)
    return torch.linalg.vector_norm(y_MN, dim=-1, dtype=wide)


def frozen_norms(x_MK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
    """||x W^T|| [M], in float32 at least"""
    return row_norms(x_MK @ w_NK.T)


def _drop(x_MK: torch.Tensor, p: float, seed: philox.Seed) -> torch.Tensor:
    """X with dropped elements set to zero, not rescaled: the small product takes the factor 1 / (1 - p)."""
    return x_MK * philox.keep_mask(seed, x_MK.shape[0], x_MK.shape[1], p, x_MK.device) if p else x_MK
