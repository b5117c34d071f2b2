"""Bytes and FLOPs of every launch of a LoRA linear, by formula. test_traffic.py compares them with the interpreter's count.

    made = launches_of("fused", operands(16384, 14336, 4096, 16, device="meta"), target=dispatch.Target("sm_90", 132))
    [cost(launch).bytes for launch in made["forward"] + made["backward"]]

Bytes are the compulsory ones: the distinct bytes that a launch loads, plus those that it stores, as if every launch began
with an empty cache that is large enough. A formula takes grids and tiles from the launch itself. So on meta tensors it
gives the cost of what the launchers choose on a GPU that is not there. The GEMM of the LoRA-first path is the library's,
not a Triton kernel: its formula is written down, not counted.

M tokens, K in, N out, R rank.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft_path
import torch
from triton.runtime.interpreter import InterpretedFunction

from plopfast.kernels import dispatch, library, triton_ops

SCALING, SEED = 2.0, 0x1234_5678_9ABC
SMALL = dispatch.Target("interpreter", 4)  # a GPU of few small programs


@dataclass(frozen=True)
class Launch:
    """A kernel's grid and its arguments, which can be read as attributes."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    frozen: bool  # it holds the frozen product

    def __getattr__(self, name: str) -> Any:
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(name) from None

    def itemsize(self, name: str) -> int:
        """Bytes of an element of an argument."""
        return _tensor(self.arguments[name]).element_size()


@dataclass(frozen=True)
class Cost:
    """Bytes by argument, and FLOPs of dots: those of the formula, and those that tiles execute, beyond the edges too."""

    loads: dict[str, int]
    stores: dict[str, int]
    useful: int = 0
    executed: int = 0
    own: int = 0  # bytes of the frozen product's operands, which the bare GEMM moves too; with L for a library's GEMM

    @property
    def bytes(self) -> int:
        return sum(self.loads.values()) + sum(self.stores.values())

    @property
    def outside(self) -> int:
        return self.bytes - self.own


# ------------------------------------------------------------------------------------------------------------- formulas
def lora_shrink(at: Launch) -> Cost:
    """X and the adapters in; for each split of K a part of S and of ||x||^2 out."""
    parts, count = at.grid[1], at.ADAPTERS
    loads = {f"a{i}": at.RANK * at.K * at.itemsize("a0") for i in range(count)}
    stores = {"s": parts * count * at.M * at.RANK * at.itemsize("s")}
    if at.NORMS:
        stores["norms"] = parts * at.M * at.itemsize("norms")
    return Cost(
        {"x": at.M * at.K * at.itemsize("x"), **loads}, stores,
        useful=2 * at.M * at.K * at.RANK * count,
        executed=2 * _up(at.M, at.BM) * _up(at.K, at.BK) * at.RP * count,
    )  # fmt: skip


def lora_gemm(at: Launch) -> Cost:
    """X and W, S and B, a bias in; Y, and for each column of tiles a part of the norms out."""
    x, w = ("x", "w") if "x" in at.arguments else ("x_desc", "w_desc")
    rows, columns = _up(at.M, at.BM), _up(at.N, at.BN)
    loads = {x: at.M * at.K * at.itemsize(x), w: at.N * at.K * at.itemsize(w)}
    stores = {"y": at.M * at.N * at.itemsize("y")} if at.STORE else {}
    own = sum(loads.values()) + sum(stores.values()) if at.frozen else 0
    if at.LORA:
        loads |= {"s": at.M * at.RANK * at.itemsize("s"), "b": at.N * at.RANK * at.itemsize("b")}
    if at.BIAS:
        loads["bias"] = at.N * at.itemsize("bias")
    if at.NORMS:
        stores["norms"] = columns // at.BN * at.M * at.itemsize("norms")
    return Cost(
        loads, stores, own=own,
        useful=2 * at.M * at.N * (at.K + at.RANK * at.LORA),
        executed=2 * rows * columns * (_up(at.K, at.BK) + _up(at.RANK, at.BR) * at.LORA),
    )  # fmt: skip


def lora_expand(at: Launch) -> Cost:
    """S and B, a bias in; L out."""
    loads = {"s": at.M * at.RANK * at.itemsize("s"), "b": at.N * at.RANK * at.itemsize("b")}
    if at.BIAS:
        loads["bias"] = at.N * at.itemsize("bias")
    return Cost(
        loads, {"y": at.M * at.N * at.itemsize("y")},
        useful=2 * at.M * at.N * at.RANK,
        executed=2 * _up(at.M, at.BM) * _up(at.N, at.BN) * _up(at.RANK, at.BR),
    )  # fmt: skip


def lora_grads(at: Launch) -> Cost:
    """T and V, U in; for each block of rows a part of T^T V, for each stripe of columns a part of T U out."""
    stripes, parts = at.grid
    loads = {"t": at.M * at.C * at.itemsize("t"), "v": at.M * at.RANK * at.itemsize("v")}
    stores = {"g": parts * at.C * at.RANK * at.itemsize("g")}
    if at.WITH_DS:
        loads["u"] = at.C * at.RANK * at.itemsize("u")
        stores["ds"] = stripes * at.M * at.RANK * at.itemsize("ds")
    products = 1 + at.WITH_DS
    return Cost(
        loads, stores,
        useful=2 * at.M * at.C * at.RANK * products,
        executed=2 * _up(at.M, at.BM) * _up(at.C, at.BC * at.TILES) * at.RP * products,
    )  # fmt: skip


def sum_partials(at: Launch) -> Cost:
    """The parts in, their sum out."""
    return Cost({"partials": at.parts * at.itemsize("partials") * at.size}, {"out": at.out.nbytes})


def row_norms(at: Launch) -> Cost:
    """Y and a bias in, the norms out."""
    loads = {"y": at.M * at.N * at.itemsize("y")}
    if at.BIAS:
        loads["bias"] = at.N * at.itemsize("bias")
    return Cost(loads, {"norms": at.M * at.itemsize("norms")})


def addmm_(at: Launch) -> Cost:
    """The library's GEMM in place: X, W and L in, Y out where L was. It is not counted, as it is no Triton kernel."""
    loads = {name: tensor.nbytes for name, tensor in at.arguments.items()}
    (m, k), n = at.x.shape, at.w.shape[1]
    flops = 2 * m * n * k
    return Cost(loads, {"y": at.y.nbytes}, flops, flops, own=sum(loads.values()) + at.y.nbytes)


def elementwise(*loads: str, stores: tuple[str, ...]) -> Callable[[Launch], Cost]:
    """Of peft_path: the named arguments in and out."""
    return lambda at: Cost(
        {name: at.arguments[name].nbytes for name in loads}, {s: at.arguments[s].nbytes for s in stores}
    )


FORMULAS: dict[str, Callable[[Launch], Cost]] = {
    "lora_shrink": lora_shrink,
    "lora_gemm": lora_gemm,
    "lora_gemm_tma": lora_gemm,
    "lora_expand": lora_expand,
    "lora_grads": lora_grads,
    "sum_partials": sum_partials,
    "row_norms": row_norms,
    "addmm_": addmm_,
    "scale": elementwise("x", stores=("y",)),
    "add": elementwise("x", "y", stores=("z",)),
    "dropout": elementwise("x", stores=("y", "mask")),
    "dropout_backward": elementwise("dy", "mask", stores=("dx",)),
}


def cost(launch: Launch) -> Cost:
    return FORMULAS[launch.kernel](launch)


def _up(value: int, block: int) -> int:
    return -(-value // block) * block


# ------------------------------------------------------------------------------------------------------------ recording
@contextlib.contextmanager
def recorded(target: dispatch.Target = SMALL, frozen: torch.Tensor | None = None) -> Iterator[list[Launch]]:
    """Records all launches in the block, whose launchers are told that they run on `target`. On meta tensors nothing runs."""
    launches: list[Launch] = []
    run, product = InterpretedFunction.run, torch.Tensor.addmm_

    def is_frozen(matrix: Any) -> bool:
        tensor = _tensor(matrix)
        return tensor is not None and frozen is not None and (tensor is frozen or tensor._base is frozen)

    def record_kernel(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        signature = inspect.signature(kernel.fn)
        given = {name: value for name, value in options.items() if name in signature.parameters}
        bound = signature.bind(*args, **given).arguments
        holds = any(is_frozen(bound.get(name)) for name in ("w", "w_desc"))
        launches.append(Launch(kernel.fn.__name__, grid, bound, holds))
        if not any(isinstance(value, torch.Tensor) and value.is_meta for value in bound.values()):
            run(kernel, *args, grid=grid, warmup=warmup, **options)

    def record_product(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        launches.append(Launch("addmm_", (), {"y": y, "x": x, "w": w}, is_frozen(w)))
        return y if y.is_meta else product(y, x, w)

    dispatch.plan.cache_clear()  # it keeps plans by device, and here every target has the same device
    try:
        with (
            mock.patch.object(InterpretedFunction, "run", record_kernel),
            mock.patch.object(torch.Tensor, "addmm_", record_product),
            mock.patch.object(dispatch, "target_of", lambda device: target),
        ):
            yield launches
    finally:
        dispatch.plan.cache_clear()


def _tensor(value: Any) -> Any:
    """A tensor, or a descriptor's."""
    return value if isinstance(value, torch.Tensor) else getattr(value, "base", None)


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
        a=zeros(r, k, dtype=wide), b=zeros(n, r, dtype=wide),
    )  # fmt: skip


def _ours(o: SimpleNamespace, p: float, strategy: str) -> Iterator[None]:
    seed = torch.tensor(SEED) if p else None
    s_MR = library.lora_forward(o.x, o.w, o.a, o.b, o.bias, SCALING, p, seed, strategy)[1]
    yield
    library.lora_backward(o.dy, o.x, s_MR, o.w, o.a, o.b, SCALING, p, seed, strategy, True, True, True)
    yield


def _peft(o: SimpleNamespace, p: float, strategy: str) -> Iterator[None]:
    a_RK, b_NR = o.a.to(o.x.dtype), o.b.to(o.x.dtype)
    saved = peft_path.forward(o.x, o.w, a_RK, b_NR, o.bias, SCALING, p)[1]
    yield
    peft_path.backward(o.dy, saved, o.w, a_RK, b_NR, SCALING, p)
    yield


def _bare(o: SimpleNamespace, p: float, strategy: str) -> Iterator[None]:
    triton_ops.gemm(o.x, o.w, bias_N=o.bias)
    yield
    triton_ops.gemm(o.dy, o.w.T)
    yield


PATHS = {"fused": _ours, "lora-first": _ours, "peft": _peft, "bare": _bare}


@dataclass(frozen=True)
class Step:
    """What one linear launches in a step."""

    forward: list[Launch]
    backward: list[Launch]


def launches_of(path: str, o: SimpleNamespace, p: float = 0.0, target: dispatch.Target = SMALL) -> Step:
    """The launches of a linear by one of PATHS. PEFT's adapters have X's dtype, whatever `o` has."""
    with recorded(target, o.w) as launches:
        halves = PATHS[path](o, p, path)
        next(halves)
        count = len(launches)
        next(halves)
    return Step(launches[:count], launches[count:])


def table_bytes(path: str, o: SimpleNamespace, p: float = 0.0) -> tuple[float, float]:
    """Forward and backward bytes outside the frozen product's operands, if adapters and rank cost nothing.

    Those of LoRA-first leave out that the library's GEMM reads L: it is an operand of that product.
    """
    x, y = o.x.nbytes, o.dy.nbytes
    if path == "peft":
        return (3.5 * x + 6 * y, 4 * y + 7.5 * x) if p else (x + 6 * y, 4 * y + 5 * x)
    return {"fused": (x, y + x), "lora-first": (x + y, y + 2 * x), "bare": (0, 0)}[path]
