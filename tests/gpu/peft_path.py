"""One LoRA linear as PEFT runs it, with a Triton launch for every kernel that torch launches on a GPU.

    result = base_layer(x);  result = result + lora_B(lora_A(dropout(x))) * scaling

and its backward pass as autograd runs it. The adapters have the base's dtype (autocast_adapter_dtype=False), which moves
the fewest bytes: with float32 adapters, all of X is converted first. Products are gemm.py's kernel without a low-rank
term; a library that splits the long sums of dA and dB moves more.

M tokens, K in, N out, R rank.
"""

import torch
import triton
import triton.language as tl

from plopfast.kernels import triton_ops

BLOCK = 4096


@triton.jit
def scale(x, y, factor, SIZE, BLOCK: tl.constexpr):
    """y = factor x"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    product = tl.load(x + at, mask=at < SIZE, other=0.0).to(tl.float32) * factor
    tl.store(y + at, product.to(y.dtype.element_ty), mask=at < SIZE)


@triton.jit
def add(x, y, z, SIZE, BLOCK: tl.constexpr):
    """z = x + y"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + at, mask=at < SIZE, other=0.0).to(tl.float32)
    total += tl.load(y + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(z + at, total.to(z.dtype.element_ty), mask=at < SIZE)


@triton.jit
def dropout(x, y, mask, p, factor, seed, SIZE, BLOCK: tl.constexpr):
    """y = mask x factor, and the mask, a byte for each element"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.rand(seed, at) >= p
    kept = tl.where(keep, tl.load(x + at, mask=at < SIZE, other=0.0).to(tl.float32) * factor, 0.0)
    tl.store(y + at, kept.to(y.dtype.element_ty), mask=at < SIZE)
    tl.store(mask + at, keep.to(tl.uint8), mask=at < SIZE)


@triton.jit
def dropout_backward(dy, mask, dx, factor, SIZE, BLOCK: tl.constexpr):
    """dx = mask dy factor"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(mask + at, mask=at < SIZE, other=0) != 0
    kept = tl.where(keep, tl.load(dy + at, mask=at < SIZE, other=0.0).to(tl.float32) * factor, 0.0)
    tl.store(dx + at, kept.to(dx.dtype.element_ty), mask=at < SIZE)


def forward(x_MK, w_NK, a_RK, b_NR, bias_N, scaling, p=0.0, seed=0):
    """Y, and what the backward pass needs: drop(X), S and the mask."""
    base_MN = _product(x_MK, w_NK, bias_N)  # base_layer(x): the frozen product
    dropped_MK, mask_MK = x_MK, None
    if p:
        dropped_MK, mask_MK = torch.empty_like(x_MK), torch.empty_like(x_MK, dtype=torch.uint8)
        _each(dropout, x_MK, dropped_MK, mask_MK, p, 1 / (1 - p), seed)  # dropout(x)
    s_MR = _product(dropped_MK, a_RK)  # lora_A(.)
    low_rank_MN = _product(s_MR, b_NR)  # lora_B(.)
    scaled_MN = torch.empty_like(low_rank_MN)
    _each(scale, low_rank_MN, scaled_MN, scaling)  # . * scaling
    y_MN = torch.empty_like(base_MN)
    _each(add, base_MN, scaled_MN, y_MN)  # result + .
    return y_MN, (dropped_MK, s_MR, mask_MK)


def backward(dy_MN, saved, w_NK, a_RK, b_NR, scaling, p=0.0):
    """dX, dA, dB in autograd's order, from the last operation of the forward pass on. An addition's gradient is dY."""
    dropped_MK, s_MR, mask_MK = saved
    dl_MN = torch.empty_like(dy_MN)
    _each(scale, dy_MN, dl_MN, scaling)  # of . * scaling
    ds_MR = _product(dl_MN, b_NR.T)  # of lora_B, its input
    db_NR = _product(dl_MN.T, s_MR.T)  # of lora_B, its weight
    low_rank_MK = _product(ds_MR, a_RK.T)  # of lora_A, its input
    da_RK = _product(ds_MR.T, dropped_MK.T)  # of lora_A, its weight
    if p:
        dropped_grad_MK, low_rank_MK = low_rank_MK, torch.empty_like(low_rank_MK)
        _each(dropout_backward, dropped_grad_MK, mask_MK, low_rank_MK, 1 / (1 - p))  # of dropout(x)
    base_MK = _product(dy_MN, w_NK.T)  # of base_layer(x): the frozen product
    dx_MK = torch.empty_like(base_MK)
    _each(add, low_rank_MK, base_MK, dx_MK)  # X has two uses, whose gradients autograd adds up
    return dx_MK, da_RK, db_NR


def _product(x_MK, w_NK, bias_N=None):
    return triton_ops.gemm(x_MK, w_NK, bias_N=bias_N)[0]


def _each(kernel, first, *arguments):
    kernel[(triton.cdiv(first.numel(), BLOCK),)](first, *arguments, first.numel(), BLOCK=BLOCK)
