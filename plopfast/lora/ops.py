"""LoRA as functions: they check their arguments and tie the kernels to autograd.

    S = c drop(X) A^T;  Y = X W^T + S B^T + bias                         c = scaling / (1 - p)
    dS = c dY B;  dB = dY^T S;  dA = dS^T drop(X);  dX = dY W + mask (dS A)

M tokens, K in, N out, R rank; scaling = alpha / rank (Hu et al., LoRA, arXiv 2106.09685, section 4.1). `drop` only
zeroes elements. The factor 1 / (1 - p) is part of c, which is applied in float32 before S and dS are rounded.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import dispatch, library
from ..kernels.autograd import once
from ..kernels.codes import Codes, Weight, dense
from ..support.errors import BackendError


def lora_linear(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Applies a frozen linear layer and its low-rank update: x W^T + bias + scaling * (dropout(x) A^T) B^T.

    x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias [N]; returns [..., N] in x's dtype. `weight` and `bias`
    are frozen; `weight` may be a transposed view, or codes (kernels/codes.py). x, weight and bias have one floating dtype. The adapters, and so their
    gradients, may be float32 instead. Under autocast everything is computed in the autocast dtype.

    The backward pass keeps only x and S = drop(x) A^T. The dropout mask is a function of (seed, row, column) and is never
    stored. `seed` is a 64-bit integer, or a 0-d int64 tensor: on the CPU, which torch.compile can trace, or on x's GPU, where
    it isn't waited for, so that a CUDA graph may draw it anew at each replay.

    `backend`: "auto" (what the tuning table says; where it says nothing torch, and with dropout Triton if it runs), "torch",
    "triton" (strategy from the tuning table), or "fused" or "lora-first" for one strategy.

    In eager mode, a caller can pass `low`, copies of lora_A and lora_B in x's dtype, which saves a cast in each call.

    Raises ValueError for shapes, dtypes, devices and dropout rates that cannot work and for a missing seed, and
    BackendError where `backend` cannot run.

        y = pf.lora_linear(x, linear.weight, lora_A, lora_B, scaling=2.0, bias=linear.bias)

    >>> y = pf.lora_linear(x, weight, lora_A, lora_B, scaling=2.0)  # x [6, 32], weight [48, 32], ranks of 4
    >>> torch.allclose(y, x @ weight.T + 2.0 * (x @ lora_A.T) @ lora_B.T, atol=1e-5)
    True
    """
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # which raises for meta, where tools trace
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif isinstance(weight, Codes):
        weight = weight.to(x.dtype)
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
    if isinstance(seed, int):
        seed = torch.tensor(seed - (1 << 64) if seed >= 1 << 63 else seed, device="cpu")
    # torch 2.13's bfloat16 product on the CPU reads row-strided left operands wrongly (its own nn.Linear too)
    x_MK = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()
    how = float(scaling), dropout_p, backend, low
    try:
        if autocast:
            with torch.autocast(kind, enabled=False):
                y_MN = _LoRALinear.apply(x_MK, weight, lora_A, lora_B, bias, seed if dropout_p else None, how)
        else:
            y_MN = _LoRALinear.apply(x_MK, weight, lora_A, lora_B, bias, seed if dropout_p else None, how)
    except dispatch.UnsupportedError as error:
        raise BackendError(str(error)) from None
    return y_MN if x.dim() == 2 else y_MN.view(*x.shape[:-1], weight.shape[0])


def linear_norms(x: torch.Tensor, weight: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Computes ||W x|| of every token: x [..., K], weight [N, K] -> [...] in float32 (float64 for float64).

    Use it to score weights that are not on the forward path. Where Triton runs, W x is never written. It has no gradient.
    Raises ValueError for shapes and dtypes that do not match, and BackendError where `backend` cannot run.

    >>> pf.linear_norms(torch.eye(3), torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    tensor([1., 2., 3.])
    """
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"linear_norms: expected x [..., K] and weight [N, K] of one dtype, got x {list(x.shape)} {x.dtype} and "
            f"weight {list(weight.shape)} {weight.dtype}"
        )
    if x.device != weight.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}: move them to one device")
    if not x.is_meta:
        or_backend_error(dispatch.plan, x.device, x.dtype, 1, *weight.shape, 1, backend)
    with torch.no_grad():
        x_MK = x.reshape(-1, x.shape[-1]).contiguous()
        return torch.ops.plopfast.frozen_norms(x_MK, weight, backend).view(x.shape[:-1])


def row_norms(y: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str = "auto") -> torch.Tensor:
    """Computes ||y - bias|| over the last dimension: y [..., N], bias [N] -> [...] in float32 (float64 for float64).

    Where Triton runs, it reads y once and makes no float32 copy of it. It has no gradient. Raises BackendError where
    `backend` cannot run.
    """
    if not y.is_meta:
        or_backend_error(dispatch.plan, y.device, y.dtype, 1, 1, 1, 1, backend)
    with torch.no_grad():
        return torch.ops.plopfast.row_norms(y.reshape(-1, y.shape[-1]), bias, backend).view(y.shape[:-1])


def new_seed(device: torch.device) -> torch.Tensor:
    """Draws the seed of one call's dropout on `device`, a 0-d int64 tensor, from torch's generator.

    It lies on the CPU, but in a CUDA graph on the GPU, whose generator draws anew at each replay. A draw, not a counter of
    our own: activation checkpointing restores the generator before it recomputes.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.randint(1 << 62, (), device=device)
    return torch.randint(1 << 62, (), device="cpu")


def linear_and_norms(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, store: bool = True, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes W x + bias and ||W x||: x [..., K], weight [N, K], bias [N] -> [..., N] and [...] in float32.

    Where Triton runs and it moves fewer bytes, the norms come from the product itself, and its result is not read again.
    Without `store` the first value is empty. It has no gradient. Raises BackendError where `backend` cannot run.
    """
    if not x.is_meta:
        or_backend_error(dispatch.runs_kernels, x.device, x.dtype, backend)
    with torch.no_grad():
        x_MK = x.reshape(-1, x.shape[-1]).contiguous()
        y, norms = torch.ops.plopfast.linear_and_norms(x_MK, weight, bias, store, backend)
        return y.view(*x.shape[:-1], -1) if store else y, norms.view(x.shape[:-1])


def path(device: torch.device, backend: str) -> str:
    """Returns what "auto" or another backend stands for on `device`. Raises BackendError with the reason if it can't run."""
    return or_backend_error(dispatch.resolve, device, backend)


def or_backend_error(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `function(*arguments)`. The kernels' UnsupportedError becomes a BackendError, which users know."""
    try:
        return function(*arguments)
    except dispatch.UnsupportedError as error:
        raise BackendError(str(error)) from None


class _LoRALinear(torch.autograd.Function):
    # an autograd function around the op, not torch.library.register_autograd: half the overhead in eager mode
    @staticmethod
    def forward(ctx: Any, x_MK, w_NK, a_RK, b_NR, bias_N, seed, how):
        scaling, p, backend, low = how
        ctx.codes = w_NK if isinstance(w_NK, Codes) else None
        dtypes, ctx.settings = (a_RK.dtype, b_NR.dtype), (scaling, p, backend)
        if not is_direct(x_MK):
            op = torch.ops.plopfast.lora_forward.default
            y_MN, s_MR = op(x_MK, dense(w_NK), a_RK, b_NR, bias_N, scaling, p, seed, backend)
            ctx.direct = None
        else:
            plan, (c, number) = (
                library.plan_of(x_MK, w_NK, a_RK.shape[0], backend, p > 0),
                library.factors(scaling, p, seed),
            )
            if low is not None and low[0].dtype == x_MK.dtype:
                a_RK, b_NR = low
            s_MR = library.shrink(x_MK, a_RK, c, p, number, plan)
            y_MN = library.forward(x_MK, s_MR, w_NK, b_NR, bias_N, plan)
            seed, ctx.direct = None, (c, p, number, plan, dtypes)
        ctx.save_for_backward(x_MK, s_MR, w_NK if ctx.codes is None else None, a_RK, b_NR, seed)
        return y_MN

    @staticmethod
    @once
    def backward(ctx: Any, dy_MN: torch.Tensor) -> tuple[Any, ...]:
        x_MK, s_MR, w_NK, a_RK, b_NR, seed = ctx.saved_tensors
        if ctx.codes is not None:
            w_NK = ctx.codes
        need_x, _, need_a, need_b = ctx.needs_input_grad[:4]
        dy_MN = dy_MN.contiguous()  # the gradient of a sum comes with stride 0, and see lora_linear
        if ctx.direct:
            c, p, number, plan, dtypes = ctx.direct
            needed = need_x, need_a, need_b
            found = library.backward(dy_MN, x_MK, s_MR, w_NK, a_RK, b_NR, c, p, number, plan, needed, dtypes)
        else:
            scaling, p, backend = ctx.settings
            op = torch.ops.plopfast.lora_backward.default
            found = op(dy_MN, x_MK, s_MR, dense(w_NK), a_RK, b_NR, scaling, p, seed, backend, need_x, need_a, need_b)
        dx_MK, da_RK, db_NR = found
        return dx_MK if need_x else None, None, da_RK if need_a else None, db_NR if need_b else None, None, None, None


def is_direct(x: torch.Tensor) -> bool:
    """Whether to call an op's implementation directly: torch's dispatcher takes a tenth of a small eager call."""
    return type(x) is torch.Tensor and x.device.type != "meta" and not torch.compiler.is_compiling()


def check(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed) -> None:
    """One fast check, because small models feel each call; `_explain` builds the error."""
    dtype, device, n_in = x.dtype, x.device, x.shape[-1] if x.dim() else -1
    a_shape, b_shape, w_shape = lora_A.shape, lora_B.shape, weight.shape
    if not (
        len(w_shape) == len(a_shape) == len(b_shape) == 2
        and w_shape[1] == a_shape[1] == n_in
        and w_shape[0] == b_shape[0]
        and a_shape[0] == b_shape[1] >= 1
        and weight.dtype == dtype
        and dtype.is_floating_point
        and (lora_A.dtype == dtype or lora_A.dtype == torch.float32)
        and (lora_B.dtype == dtype or lora_B.dtype == torch.float32)
        and weight.device == lora_A.device == lora_B.device == device
        and not weight.requires_grad
        and (
            bias is None
            or (bias.shape == w_shape[:1] and bias.dtype == dtype and bias.device == device and not bias.requires_grad)
        )
        and math.isfinite(scaling)
        and 0.0 <= dropout_p < 1.0
        and (not dropout_p or _is_seed(seed))
    ):
        _explain(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)


def _is_seed(seed) -> bool:
    if isinstance(seed, torch.Tensor):
        return seed.numel() == 1 and not seed.dtype.is_floating_point
    return isinstance(seed, int) and -(1 << 63) <= seed < 1 << 64


def check_frozen(x, weight, bias) -> None:
    """Raises the ValueError that says what is wrong with x, weight or bias, if anything is."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"lora_linear: expected x [..., K] and weight [N, K], got x {list(x.shape)} and weight "
            f"{list(weight.shape)}; a weight stored [in, out] (GPT-2's Conv1D) is passed as weight.T"
        )
    n_out = weight.shape[0]
    if bias is not None and list(bias.shape) != [n_out]:
        raise ValueError(f"bias: expected [{n_out}], got {list(bias.shape)}")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, x {x.dtype}: cast x, or use torch.autocast")
        if tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, but LoRA keeps it frozen: {name}.requires_grad_(False)")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")


def _explain(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed) -> None:
    """Raises the ValueError that says which of `check`'s conditions failed."""
    check_frozen(x, weight, bias)
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
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling: expected a finite number, got {scaling}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if seed is None:
        raise ValueError("dropout_p > 0 needs a seed: the mask is a function of (seed, row, column)")
    raise ValueError(f"seed: expected a 64-bit integer or a tensor of one, got {seed}")
