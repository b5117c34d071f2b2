"""Registers the ops that autograd, torch.compile and torch's dispatcher see.

Each op has one implementation for every device, which takes the path that dispatch.py gives for its tensors (plain
torch or the Triton kernels), and a fake one that knows only shapes. Ops neither alias nor change their inputs. Autograd
is added by plopfast/lora/ops.py.

M tokens, K in, N out, R rank.
"""

import torch

from . import dispatch, philox, torch_ops

LIBRARY = torch.library.Library("plopfast", "DEF")
DEVICES = ("CPU", "CUDA", "MPS", "XPU")  # "CUDA" is HIP too

LIBRARY.define(
    "lora_forward(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, float scaling, float p, Tensor? seed, "
    "str backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "lora_backward(Tensor dy, Tensor x, Tensor s, Tensor w, Tensor a, Tensor b, float scaling, float p, Tensor? seed, "
    "str backend, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("frozen_norms(Tensor x, Tensor w, str backend) -> Tensor")
LIBRARY.define("row_norms(Tensor y, Tensor? bias, str backend) -> Tensor")


def plan_of(x: torch.Tensor, w: torch.Tensor, rank: int, backend: str) -> dispatch.Plan:
    """The path of x [M, K] through w [N, K]."""
    aligned = w.stride(0) * w.element_size() % 16 == 0 or w.stride(1) * w.element_size() % 16 == 0
    return dispatch.plan(x.device, x.dtype, x.shape[0], w.shape[0], w.shape[1], rank, backend, aligned)


def lora_forward(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    p: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y = X W^T + S B^T + bias [M, N] and S [M, R]; `seed` a 0-d int64 CPU tensor."""
    s = shrink(x, w, a, scaling, p, seed, backend)
    return forward(x, s, w, b, bias, backend), s


def shrink(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    scaling: float,
    p: float,
    seed: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """S = scaling / (1 - p) drop(X) A^T [M, R]; `a` may be a stack of the adapters of several modules that share X."""
    c, number = scaling * philox.inverse_keep(p), int(seed) if seed is not None else 0
    if plan_of(x, w, a.shape[0], backend).backend == "torch":
        return torch_ops.shrink(x, a, c, p, number)
    from . import triton_ops  # only where it can run

    if p and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "LoRA dropout in a CUDA graph would repeat one mask: set dropout to 0, or keep this layer out of the graph"
        )
    return triton_ops.shrink(x, a, c, p, number)


def forward(
    x: torch.Tensor, s: torch.Tensor, w: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, backend: str
) -> torch.Tensor:
    """Y = X W^T + S B^T + bias [M, N]"""
    plan = plan_of(x, w, s.shape[1], backend)
    if plan.backend == "torch":
        return torch_ops.forward(x, s, w, b, bias)
    from . import triton_ops

    return triton_ops.forward(x, s, w, b, bias, plan)


def lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    s: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    p: float,
    seed: torch.Tensor | None,
    backend: str,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    a_dtype: torch.dtype | None = None,
    b_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dX [M, K], dA [R, K], dB [N, R]. One that is not needed is empty and costs nothing.

    `a_dtype` and `b_dtype` are the dtypes of dA and dB if `a` and `b` are narrower copies of the parameters.
    """
    plan = plan_of(x, w, a.shape[0], backend)
    c, number = scaling * philox.inverse_keep(p), int(seed) if seed is not None else 0
    a_dtype, b_dtype = a_dtype or a.dtype, b_dtype or b.dtype
    dx, da, db = (dy.new_empty(0) for _ in range(3))
    if plan.backend == "torch":
        if need_b:
            db = torch_ops.grad_b(dy, s).to(b_dtype)
        if need_a or need_x:
            ds = torch_ops.grad_s(dy, b, c)
        if need_a:
            da = torch_ops.grad_a(ds, x, p, number).to(a_dtype)
        if need_x:
            dx = torch_ops.grad_x(dy, ds, w, a, p, number)
        return dx, da, db
    from . import triton_ops

    if need_b and (need_a or need_x):
        ds, db = triton_ops.grad_s_and_b(dy, s, b, c, b_dtype)
    elif need_b:
        db = triton_ops.grad_b(dy, s, b_dtype)
    elif need_a or need_x:
        ds = triton_ops.grad_s(dy, b, c)
    if need_a:
        da = triton_ops.grad_a(ds, x, p, number, a_dtype)
    if need_x:
        dx = triton_ops.grad_x(dy, ds, w, a, p, number, plan)
    return dx, da, db


def frozen_norms(x: torch.Tensor, w: torch.Tensor, backend: str) -> torch.Tensor:
    """||x W^T|| [M] in float32. Where Triton runs, Y is never written."""
    if plan_of(x, w, 1, backend).backend == "torch":
        return torch_ops.frozen_norms(x, w)
    from . import triton_ops

    return triton_ops.frozen_norms(x, w)


def row_norms(y: torch.Tensor, bias: torch.Tensor | None, backend: str) -> torch.Tensor:
    """||y - bias|| [M] in float32, from one read of Y where Triton runs."""
    if dispatch.plan(y.device, y.dtype, y.shape[0], y.shape[1], 1, 1, backend).backend == "torch":
        return torch_ops.row_norms(y, bias)
    from . import triton_ops

    return triton_ops.row_norms(y, bias)


for _op in (lora_forward, lora_backward, frozen_norms, row_norms):
    for _device in DEVICES:
        LIBRARY.impl(_op.__name__, _op, _device)


@torch.library.register_fake("plopfast::lora_forward", lib=LIBRARY)
def _(x, w, a, b, bias, scaling, p, seed, backend):
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.register_fake("plopfast::lora_backward", lib=LIBRARY)
def _(dy, x, s, w, a, b, scaling, p, seed, backend, need_x, need_a, need_b):
    empty = lambda: dy.new_empty(0)  # noqa: E731
    return (
        x.new_empty(x.shape) if need_x else empty(),
        a.new_empty(a.shape) if need_a else empty(),
        b.new_empty(b.shape) if need_b else empty(),
    )


@torch.library.register_fake("plopfast::frozen_norms", lib=LIBRARY)
def _(x, w, backend):
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("plopfast::row_norms", lib=LIBRARY)
def _(y, bias, backend):
    return y.new_empty(y.shape[0], dtype=torch.promote_types(y.dtype, torch.float32))
