"""The functional core: checks arguments and ties the kernels to autograd.

    S = drop(X) A^T;  Y = X W^T + s S B^T + bias
    dS = s dY B;  dB = s dY^T S;  dA = dS^T drop(X);  dX = dY W + mask (dS A) / (1 - p)

M tokens, K in, N out, R rank; s scaling = alpha / rank (Hu et al., LoRA, arXiv 2106.09685, section 4.1).
"""

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .kernels import torch_ops


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """A frozen linear layer plus its low-rank update: x W^T + bias + scaling * (dropout(x) A^T) B^T.

    x [..., K], weight [N, K] (frozen; a transposed view is fine), lora_A [R, K], lora_B [N, R], bias [N] (frozen);
    returns [..., N] in x's dtype. x, weight and bias share one floating dtype; the adapters may have another, their
    gradients come in it. Under autocast everything is computed in the autocast dtype. Saved for the backward pass:
    x and S = drop(x) A^T alone. The dropout mask is a function of (seed, row, column) and is never stored.

    Raises ValueError for shapes, dtypes, devices, dropout rates or a missing seed that cannot work.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
    # torch 2.13's bfloat16 product on the CPU reads row-strided left operands wrongly (its own nn.Linear too)
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.autocast(x.device.type, enabled=False):
        y_MN = _LoRALinear.apply(x_MK, weight, bias, lora_A, lora_B, scaling, dropout_p, seed or 0)
    return y_MN.view(*x.shape[:-1], weight.shape[0])


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK, w_NK, bias_N, a_RK, b_NR, s, p, seed):
        s_MR = torch_ops.shrink(x_MK, a_RK, p, seed)
        ctx.save_for_backward(x_MK, s_MR, w_NK, a_RK, b_NR)
        ctx.s, ctx.p, ctx.seed = s, p, seed
        return torch_ops.forward(x_MK, s_MR, w_NK, b_NR, s, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MN):
        x_MK, s_MR, w_NK, a_RK, b_NR = ctx.saved_tensors
        need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]
        dy_MN = dy_MN.contiguous()  # the gradient of a sum comes with stride 0, and see lora_linear
        dx_MK = da_RK = db_NR = None
        if need_b:
            db_NR = torch_ops.grad_b(dy_MN, s_MR, ctx.s).to(b_NR.dtype)
        if need_a or need_x:
            ds_MR = torch_ops.grad_s(dy_MN, b_NR, ctx.s)
        if need_a:
            da_RK = torch_ops.grad_a(ds_MR, x_MK, ctx.p, ctx.seed).to(a_RK.dtype)
        if need_x:
            dx_MK = torch_ops.grad_x(dy_MN, ds_MR, w_NK, a_RK, ctx.p, ctx.seed)
        return dx_MK, None, None, da_RK, db_NR, None, None, None


def _check(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"lora_linear: expected x [..., K] and weight [N, K], got x {list(x.shape)} and weight "
            f"{list(weight.shape)}; a weight stored [in, out] (GPT-2's Conv1D) is passed as weight.T"
        )
    n_out, n_in = weight.shape
    rank = lora_A.shape[0]
    if rank < 1:
        raise ValueError(f"lora_A: expected rank >= 1, got shape {list(lora_A.shape)}")
    for name, tensor, want in (("lora_A", lora_A, ["rank", n_in]), ("lora_B", lora_B, [n_out, rank])):
        got = list(tensor.shape)
        if len(got) != 2 or any(isinstance(w, int) and w != g for w, g in zip(want, got, strict=True)):
            hint = ": transposed?" if got[::-1][-1:] == want[:1] or got[:1] == want[-1:] else ""
            raise ValueError(f"{name}: expected [{want[0]}, {want[1]}], got {got}{hint}")
        if tensor.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name}: expected float32 or x's dtype {x.dtype}, got {tensor.dtype}")
    if bias is not None and list(bias.shape) != [n_out]:
        raise ValueError(f"bias: expected [{n_out}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
        if name in ("weight", "bias"):
            if tensor.dtype != x.dtype:
                raise ValueError(f"{name} is {tensor.dtype}, x {x.dtype}: cast x, or use torch.autocast")
            if tensor.requires_grad:
                raise ValueError(f"{name} requires a gradient, but LoRA keeps it frozen: {name}.requires_grad_(False)")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling: expected a finite number, got {scaling}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if dropout_p and seed is None:
        raise ValueError("dropout_p > 0 needs a seed: the mask is a function of (seed, row, column)")
