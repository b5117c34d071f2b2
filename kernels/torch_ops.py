"""The LoRA linear in plain torch, LoRA-first: the CPU's backend, and an exact strategy on any device.

The low-rank product is written first and the frozen product is accumulated onto it in place (beta = 1), which saves
one read and one write of Y against `linear` followed by an addition.

M tokens, K in, N out, R rank; s scaling. All tensors but the adapters share X's dtype; adapters may be wider.
"""

import torch

from . import philox


def shrink(x_MK: torch.Tensor, a_RK: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """S = drop(X) A^T"""
    s_MR = _drop(x_MK, p, seed) @ a_RK.to(x_MK.dtype).T
    return s_MR.mul_(philox.inverse_keep(p)) if p else s_MR


def forward(
    x_MK: torch.Tensor,
    s_MR: torch.Tensor,
    w_NK: torch.Tensor,
    b_NR: torch.Tensor,
    s: float,
    bias_N: torch.Tensor | None,
) -> torch.Tensor:
    """Y = (s S B^T + bias) + X W^T"""
    if bias_N is None:
        y_MN = x_MK.new_empty(x_MK.shape[0], w_NK.shape[0])
        y_MN.addmm_(s_MR, b_NR.to(x_MK.dtype).T, beta=0, alpha=s)
    else:
        y_MN = torch.addmm(bias_N, s_MR, b_NR.to(x_MK.dtype).T, alpha=s)
    return y_MN.addmm_(x_MK, w_NK.T)


def grad_s(dy_MN: torch.Tensor, b_NR: torch.Tensor, s: float) -> torch.Tensor:
    """dS = s dY B"""
    return (dy_MN @ b_NR.to(dy_MN.dtype)).mul_(s)


def grad_x(
    dy_MN: torch.Tensor, ds_MR: torch.Tensor, w_NK: torch.Tensor, a_RK: torch.Tensor, p: float, seed: int
) -> torch.Tensor:
    """dX = mask (dS A) / (1 - p) + dY W"""
    dx_MK = ds_MR @ a_RK.to(dy_MN.dtype)
    if p:
        dx_MK.mul_(philox.keep_mask(seed, dx_MK.shape[0], dx_MK.shape[1], p, dx_MK.device)).mul_(philox.inverse_keep(p))
    return dx_MK.addmm_(dy_MN, w_NK)


def grad_a(ds_MR: torch.Tensor, x_MK: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """dA = dS^T drop(X)"""
    da_RK = ds_MR.T @ _drop(x_MK, p, seed)
    return da_RK.mul_(philox.inverse_keep(p)) if p else da_RK


def grad_b(dy_MN: torch.Tensor, s_MR: torch.Tensor, s: float) -> torch.Tensor:
    """dB = s dY^T S"""
    return (dy_MN.T @ s_MR).mul_(s)


def _drop(x_MK: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """X with dropped elements zero, not rescaled: the factor 1 / (1 - p) goes onto the small product instead."""
    return x_MK * philox.keep_mask(seed, x_MK.shape[0], x_MK.shape[1], p, x_MK.device) if p else x_MK
