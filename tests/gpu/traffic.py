"""Every launch of a LoRA linear, recorded for formulas.py. test_traffic.py compares its bytes with the interpreter's count.

    made = launches_of("fused", operands(16384, 14336, 4096, 16, device="meta"), target=dispatch.Target("sm_90", 132))
    [cost(launch).bytes for launch in made.forward + made.backward]

Bytes are the compulsory ones: the distinct bytes that a launch loads, plus those that it stores, as if every launch began
with an empty cache that is large enough. A formula takes grids and tiles from the launch itself. So on meta tensors it
gives the cost of what the launchers choose on a GPU that is not there. What torch itself computes (the vendor's products,
casts of the adapters) is recorded too. Its formulas are written down, not counted: no kernel of ours is behind them.

M tokens, K in, N out, R rank.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft_path
import torch
from costs import Launch, tensor_of
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from plopfast.kernels import dispatch, library, library_many, triton_many, triton_ops, triton_segments
from plopfast.kernels.launch import forget_plans

SCALING, SEED = 2.0, 0x1234_5678_9ABC
SMALL = dispatch.Target("interpreter", 4)  # a GPU of few small programs


# ------------------------------------------------------------------------------------------------------------ recording
@contextlib.contextmanager
def recorded(target: dispatch.Target = SMALL, *frozen: torch.Tensor) -> Iterator[list[Launch]]:
    """Records all launches in the block, whose launchers are told that they run on `target`. On meta tensors nothing runs."""
    launches: list[Launch] = []
    run = InterpretedFunction.run

    def is_frozen(matrix: Any) -> bool:
        tensor = tensor_of(matrix)
        return tensor is not None and _storage(tensor) in [_storage(weight) for weight in frozen]

    def record_kernel(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        signature = inspect.signature(kernel.fn)
        given = {name: value for name, value in options.items() if name in signature.parameters}
        bound = signature.bind(*args, **given).arguments
        holds = any(is_frozen(bound.get(name)) for name in ("w", "w_desc"))
        others = {name: value for name, value in options.items() if name not in given}
        launches.append(Launch(kernel.fn.__name__, grid, bound, holds, others))
        if not any(isinstance(value, torch.Tensor) and value.is_meta for value in bound.values()):
            with _disable_current_modes():  # what the interpreter does with torch is not the linear's
                run(kernel, *args, grid=grid, warmup=warmup, **options)

    forget = lambda: (dispatch.plan.cache_clear(), forget_plans())  # noqa: E731
    forget()  # plans are kept by device, and here every target has the same device
    try:
        with (
            mock.patch.object(InterpretedFunction, "run", record_kernel),
            mock.patch.object(dispatch, "target_of", lambda device: target),
            _Torch(launches, is_frozen),
        ):
            yield launches
    finally:
        forget()


class _Torch(TorchDispatchMode):
    """Records what torch itself computes. What has no formula is recorded as "torch.NAME", which `cost` does not take."""

    def __init__(self, launches: list[Launch], is_frozen: Callable[[Any], bool]) -> None:
        super().__init__()
        self.launches, self.is_frozen = launches, is_frozen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, options = function(*args, **(kwargs or {})), kwargs or {}
        name = function.overloadpacket.__name__
        if name == "addmm_":
            y, x, w = args
            factors = {"beta": options.get("beta", 1), "alpha": options.get("alpha", 1)}
            self.launches.append(Launch("addmm_", (), {"y": y, "x": x, "w": w, **factors}, self.is_frozen(w)))
        elif name == "mm":
            x, w = args
            self.launches.append(Launch("mm", (), {"y": found, "x": x, "w": w}, self.is_frozen(w)))
        elif name == "addmm":
            bias, x, w = args
            self.launches.append(Launch("addmm", (), {"y": found, "x": x, "w": w, "bias": bias}, self.is_frozen(w)))
        elif name in ("_to_copy", "copy_"):
            self.launches.append(Launch("cast", (), {"x": args[name == "copy_"], "y": found}, False))
        elif name in ("stack", "cat"):
            self.launches.append(Launch("stacked", (), {"parts": args[0], "y": found}, False))
        elif name == "mul" and "out" in options:
            self.launches.append(Launch("scaled stack", (), {"x": args[0], "c": args[1], "y": found}, False))
        elif name == "new_zeros" and found.dim():
            self.launches.append(Launch("padding", (), {"y": found}, False))
        elif not (function.is_view or name in FREE):
            self.launches.append(Launch(f"torch.{name}", (), {}, False))
        return found


# they make buffers; fill_ is the poison of the tests' buffers, and _local_scalar_dense reads a seed that lies on the CPU
FREE = ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "fill_", "_local_scalar_dense")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ---------------------------------------------------------------------------------------------------------------- paths
def operands(
    m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.bfloat16, wide: torch.dtype = torch.float32,
    bias: bool = False, device: str = "cpu",
) -> SimpleNamespace:  # fmt: skip
    """One linear's tensors, all zeros: traffic does not depend on numbers. `wide` is the dtype of the adapters A and B."""

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return SimpleNamespace(
        m=m, n=n, k=k, x=zeros(m, k), w=zeros(n, k), dy=zeros(m, n), bias=zeros(n) if bias else None,
        a=zeros(r, k, dtype=wide), b=zeros(n, r, dtype=wide), padded=zeros(n + r, k + r),
    )  # fmt: skip


def _ours(o: SimpleNamespace, p: float, strategy: str) -> Iterator[None]:
    seed = torch.tensor(SEED) if p else None
    s_MR = library.lora_forward(o.x, o.w, o.a, o.b, o.bias, SCALING, p, seed, strategy)[1]
    yield
    library.lora_backward(o.dy, o.x, s_MR, o.w, o.a, o.b, SCALING, p, seed, strategy, True, True, True)
    yield


def _peft(o: SimpleNamespace, p: float, strategy: str) -> Iterator[None]:
    a_RK, b_NR = o.x.new_empty(o.a.shape), o.x.new_empty(o.b.shape)
    saved = peft_path.forward(o.x, o.w, a_RK, b_NR, o.bias, SCALING, p)[1]
    yield
    peft_path.backward(o.dy, saved, o.w, a_RK, b_NR, SCALING, p)
    yield


def _bare(o: SimpleNamespace, p: float, strategy: str) -> Iterator[None]:
    triton_ops.gemm(o.x, o.w, bias_N=o.bias)
    yield
    triton_ops.gemm(o.dy, o.w.T)
    yield


def _augmented(o: SimpleNamespace, p: float, strategy: str) -> Iterator[None]:
    """Y = [X|S] [W|B]^T and dX = [dY|dS] [W;A], by the vendor. No producer writes X and dY beside S and dS: they are copied.

    W lies in `padded` [N + R, K + R], with B to the right of it and A below. No strategy of ours: docs/kernels.md says why.
    """
    assert not p
    padded, (m, n, k) = o.padded, (o.m, o.n, o.k)
    a_RK = o.a.to(o.x.dtype)
    padded[:n, k:].copy_(o.b)
    padded[n:, :k].copy_(a_RK)
    xs = o.x.new_empty(m, padded.shape[1])
    xs[:, :k].copy_(o.x)
    s_MR = xs[:, k:].addmm_(xs[:, :k], a_RK.T, beta=0, alpha=SCALING)
    y_MN = torch.mm(xs, padded[:n].T)
    yield
    dys = o.dy.new_empty(m, padded.shape[0])
    dys[:, :n].copy_(o.dy)
    ds_MR, db_NR = triton_ops.grad_s_and_b(dys[:, :n], s_MR, o.b, SCALING)
    dys[:, n:].copy_(ds_MR)
    da_RK = torch.mm(ds_MR.T, xs[:, :k])
    dx_MK = torch.mm(dys, padded[:, :k])
    o.results = y_MN, dx_MK, da_RK, db_NR
    yield


PATHS = {"fused": _ours, "lora-first": _ours, "peft": _peft, "bare": _bare, "augmented": _augmented}


@dataclass(frozen=True)
class Step:
    """What one linear launches in a step."""

    forward: list[Launch]
    backward: list[Launch]


def launches_of(path: str, o: SimpleNamespace, p: float = 0.0, target: dispatch.Target = SMALL) -> Step:
    """The launches of a linear by one of PATHS. PEFT's adapters have X's dtype, whatever `o` has."""
    with recorded(target, o.w, o.padded) as launches:
        halves = PATHS[path](o, p, path)
        next(halves)
        count = len(launches)
        next(halves)
    return Step(launches[:count], launches[count:])


def launches_of_experts(
    rows: list[int], n: int, k: int, r: int, dtype: torch.dtype, wide: torch.dtype, target: dispatch.Target,
    device: str = "cpu",
) -> list[Launch]:  # fmt: skip
    """The launches of one weight of a layer's experts with so many rows each, forward and backward."""

    def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    e, m = len(rows), sum(rows)
    x, dy, w, a, b = made(m, k), made(m, n), made(e, n, k), made(e, r, k, dtype=wide), made(e, n, r, dtype=wide)
    ends = torch.tensor(rows).cumsum(0).int().to(device)
    with recorded(target, w) as launches:
        s = triton_segments.forward(x, w, a, b, ends, SCALING)[1]
        triton_segments.backward(dy, x, s, w, a, b, ends, SCALING, (True, True, True))
    return launches


def launches_of_many(
    segments: list[tuple[int, int]], n: int, k: int, strategy: str, dtype: torch.dtype, wide: torch.dtype,
    target: dispatch.Target, bias: bool = False, device: str = "cpu",
) -> Step:  # fmt: skip
    """The launches of one linear with an adapter for each segment, of so many rows and such a rank (0: none)."""
    o = operands(sum(rows for rows, _ in segments), n, k, 1, dtype, wide, bias, device)
    a = [torch.zeros(r, k, dtype=wide, device=device) if r else None for _, r in segments]
    b = [torch.zeros(n, r, dtype=wide, device=device) if r else None for _, r in segments]
    cuts, each = [0, *itertools.accumulate(rows for rows, _ in segments)], len(segments)

    with recorded(target, o.w) as launches:
        way = library_many.way_of(o.x, o.w, a, cuts, [SCALING] * each, (), (), strategy)
        triton_many._ends(o.x, way), triton_many._factors(o.x, way)
        launches.clear()  # cuts and factors lie on the device: every layer has the same
        _, s = library_many.forward(o.x, o.w, a, b, o.bias, way)
        count = len(launches)
        dtypes = library_many.dtypes_of(a, b)
        library_many.backward(o.dy, o.x, s, o.w, a, b, way, True, [True] * each, [True] * each, dtypes)
    return Step(launches[:count], launches[count:])


def table_bytes(path: str, o: SimpleNamespace, p: float = 0.0) -> tuple[float, float]:
    """Forward and backward bytes outside the frozen product's operands, if adapters and rank cost nothing.

    Those of LoRA-first leave out that the library's GEMM reads L: it is an operand of that product.
    """
    x, y = o.x.nbytes, o.dy.nbytes
    if path == "peft":
        return (3.5 * x + 6 * y, 4 * y + 7.5 * x) if p else (x + 6 * y, 4 * y + 5 * x)
    return {
        "fused": (x, y + x), "lora-first": (x + y, y + 2 * x), "augmented": (3 * x, 3 * y + x), "bare": (0, 0),
    }[path]  # fmt: skip
