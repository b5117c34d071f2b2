"""Registers the ops that autograd, torch.compile and torch's dispatcher see.

Each op has one implementation for every device, which takes the path that dispatch.py gives for its tensors (plain
torch or the Triton kernels), and a fake one that knows only shapes. Ops neither alias nor change their inputs. Autograd
is added by plopfast/lora/ops.py.

M tokens, K in, N out, R rank.
"""

from collections.abc import Sequence

import torch

from . import dispatch, philox, torch_ops
from .codes import Weight, dense, few, linear_of_few

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
LIBRARY.define("linear_and_norms(Tensor x, Tensor w, Tensor? bias, bool store, str backend) -> (Tensor, Tensor)")


def plan_of(x: torch.Tensor, w: Weight, rank: int, backend: str, drop: bool = False) -> dispatch.Plan:
    """The path of x [M, K] through w [N, K], with dropout if `drop`."""
    size, m, (one, other) = x.dtype.itemsize, x.shape[0], w.stride()
    tokens = 1 << (m - 1).bit_length() if m > 16 else 16  # the choice is one for a power of two, and so is its cache
    aligned = one * size % 16 == 0 or other * size % 16 == 0
    return dispatch.plan(x.device, x.dtype, tokens, w.shape[0], w.shape[1], rank, backend, aligned, drop)


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
    plan, (c, number) = plan_of(x, w, a.shape[0], backend, p > 0), factors(scaling, p, seed)
    s = shrink(x, a, c, p, number, plan)
    return forward(x, s, w, b, bias, plan), s


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dX [M, K], dA [R, K], dB [N, R]. One that is not needed is empty and costs nothing."""
    plan, (c, number) = plan_of(x, w, a.shape[0], backend, p > 0), factors(scaling, p, seed)
    found = backward(dy, x, s, w, a, b, c, p, number, plan, (need_x, need_a, need_b), (a.dtype, b.dtype))
    dx, da, db = (dy.new_empty(0) if gradient is None else gradient for gradient in found)
    return dx, da, db


def factors(scaling: float, p: float, seed: torch.Tensor | None) -> tuple[float, philox.Seed]:
    """c = scaling / (1 - p), and the seed: as a number, or as it is where a GPU holds it, which is not waited for."""
    if not p or seed is None:
        return scaling, 0
    return scaling * philox.inverse_keep(p), int(seed) if seed.is_cpu else seed


def shrink(
    x: torch.Tensor, a: torch.Tensor, c: float, p: float, seed: philox.Seed, plan: dispatch.Plan
) -> torch.Tensor:
    """S = c drop(X) A^T [M, R]; `a` may be a stack of the adapters of several modules that share X.

    Without dropout it is the vendor's product, which takes 0.4 to 0.8 of the kernel's time on an H200 and is one launch.
    With dropout it is the kernel, which needs no mask in memory.
    """
    return shrink_each(x, (a,), c, p, (seed,), plan)[0]


def shrink_each(
    x: torch.Tensor,
    adapters: Sequence[torch.Tensor],
    c: float,
    p: float,
    seeds: Sequence[philox.Seed],
    plan: dispatch.Plan,
) -> list[torch.Tensor]:
    """S = c drop(X) A^T [M, R] of each adapter, which has a dropout seed of its own."""
    if not p or plan.backend == "torch":
        return [torch_ops.shrink(x, a, c, p, seed) for a, seed in zip(adapters, seeds, strict=True)]
    from . import triton_ops  # only where it can run

    if x.is_cuda and torch.cuda.is_current_stream_capturing() and any(isinstance(seed, int) for seed in seeds):
        raise RuntimeError(
            "LoRA dropout in a CUDA graph would repeat one mask: give a seed that the graph draws on the GPU, or set the "
            "dropout to 0"
        )
    first = adapters[0]
    if all(a.shape == first.shape and a.stride() == first.stride() for a in adapters[1:]):
        return list(triton_ops.shrink_stacked(x, adapters, c, p, seeds))
    return [triton_ops.shrink(x, a, c, p, seed) for a, seed in zip(adapters, seeds, strict=True)]


def forward(
    x: torch.Tensor, s: torch.Tensor, w: Weight, b: torch.Tensor, bias: torch.Tensor | None, plan: dispatch.Plan
) -> torch.Tensor:
    """Y = X W^T + S B^T + bias [M, N]"""
    if not isinstance(w, torch.Tensor):
        w = w.held()
        if not isinstance(w, torch.Tensor) and few(x, w):
            return linear_of_few(x, w, bias, s, b)
    if plan.backend == "torch":
        return torch_ops.forward(x, s, dense(w), b, bias)
    from . import triton_ops

    return triton_ops.forward(x, s, dense(w), b, bias, plan)


def backward(
    dy: torch.Tensor, x: torch.Tensor, s: torch.Tensor, w: Weight, a: torch.Tensor, b: torch.Tensor, c: float, p: float,
    seed: philox.Seed, plan: dispatch.Plan, needed: tuple[bool, bool, bool], dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """dX [M, K], dA [R, K], dB [N, R], None where it is not `needed`. `dtypes` are those of dA and dB."""
    need_x, need_a, need_b = needed
    ds, db = grad_s_and_b(dy, s, b, c, plan, need_a or need_x, need_b, dtypes[1])
    da = grad_a(ds, x, p, seed, plan, dtypes[0]) if need_a and ds is not None else None
    if not need_x or ds is None:
        return None, da, db
    if plan.backend == "torch":
        return torch_ops.grad_x(dy, ds, dense(w), a, p, seed), da, db
    from . import triton_ops

    return triton_ops.grad_x(dy, ds, dense(w), a, p, seed, plan), da, db


def grad_s_and_b(
    dy: torch.Tensor, s: torch.Tensor, b: torch.Tensor, c: float, plan: dispatch.Plan, need_s: bool, need_b: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """dS = c dY B [M, R] in dY's dtype and dB = dY^T S [N, R] in `dtype`, None where it is not needed."""
    if plan.backend == "triton" and need_s and need_b and b.shape[1] <= dispatch.MOST_DS_RANK:
        from . import triton_ops

        return triton_ops.grad_s_and_b(dy, s, b, c, dtype)
    db = torch_ops.grad_b(dy, s).to(dtype) if need_b else None
    return torch_ops.grad_s(dy, b, c) if need_s else None, db


def grad_a(
    ds: torch.Tensor, x: torch.Tensor, p: float, seed: philox.Seed, plan: dispatch.Plan, dtype: torch.dtype
) -> torch.Tensor:
    """dA = dS^T drop(X) [R, K] in `dtype`.

    Without dropout it is the vendor's product, which takes 0.5 to 0.9 of the kernel's time on an H200 and is one launch.
    """
    if not p or plan.backend == "torch":
        return torch_ops.grad_a(ds, x, p, seed).to(dtype)
    from . import triton_ops

    return triton_ops.grad_a(ds, x, p, seed, dtype)


def frozen_norms(x: torch.Tensor, w: torch.Tensor, backend: str) -> torch.Tensor:
    """||x W^T|| [M] in float32. Where Triton runs, Y is never written."""
    if not dispatch.runs_kernels(x.device, x.dtype, backend):
        return torch_ops.frozen_norms(x, w)
    from . import triton_ops

    return triton_ops.frozen_norms(x, w)


def row_norms(y: torch.Tensor, bias: torch.Tensor | None, backend: str) -> torch.Tensor:
    """||y - bias|| [M] in float32, from one read of Y where Triton runs."""
    if not dispatch.runs_kernels(y.device, y.dtype, backend):
        return torch_ops.row_norms(y, bias)
    from . import triton_ops

    return triton_ops.row_norms(y, bias)


def linear_and_norms(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, store: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y = X W^T + bias [M, N] and ||x W^T|| [M] in float32. Y is empty unless `store`.

    The norms come from the epilogue of the product, and Y is not read again, where that moves fewer bytes. Elsewhere Y is
    the vendor's, and row_norms reads it.
    """
    if not norms_in_epilogue(x, w, backend):
        y = torch.nn.functional.linear(x, w, bias)
        norms = row_norms(y, bias, backend)
        return (y if store else y.new_empty(0, 1)), norms
    from . import triton_ops

    y, found = triton_ops.gemm(x, w, bias_N=bias if store else None, norms=True, store=store)
    assert found is not None
    return y, found


def norms_in_epilogue(x: torch.Tensor, w: torch.Tensor, backend: str) -> bool:
    """Whether lora_gemm's epilogue gives ||x W^T|| for fewer bytes than another read of Y.

    For each column of tiles it writes a float32 part a row, which is read again to be added up; Y has 2 N bytes a row. These
    are bytes, not times: the vendor's product may be faster than ours. So only 16-bit operands whose tiles come in wide
    copies count, and products of EPILOGUE_FLOPS.
    """
    if not dispatch.runs_kernels(x.device, x.dtype, backend) or x.dtype.itemsize != 2 or not (x.numel() and w.numel()):
        return False
    from . import triton_ops

    if 2 * x.numel() * w.shape[0] < dispatch.EPILOGUE_FLOPS:
        return False
    tiles = dispatch.candidates(dispatch.target_of(x.device), x.dtype)[0]
    wide = triton_ops.describable(x, w) if tiles.descriptor else triton_ops.copyable(x, w)
    parts = -(-w.shape[0] // tiles.bn)
    return wide and 2 * 4 * parts < x.dtype.itemsize * w.shape[0]


for _op in (lora_forward, lora_backward, frozen_norms, row_norms, linear_and_norms):
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


@torch.library.register_fake("plopfast::linear_and_norms", lib=LIBRARY)
def _(x, w, bias, store, backend):
    y = x.new_empty((x.shape[0], w.shape[0]) if store else (0, 1))
    return y, x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
