"""How kernels are launched. This file alone touches Triton's inside.

`kernel[grid](...)` takes 13 to 20 us of the host on an H100's machine, of which the driver needs 2: it binds arguments,
specialises them and looks up the compiled kernel each time. A `Planned` launch does that once. Afterwards it calls the
compiled kernel with the same numbers and constants, and other pointers and free numbers (5 to 6 us).

Two mistakes would be silent, so they are guarded. A number that was specialised (1, or a multiple of 16) is folded into the
kernel, so all of these are fixed by the plan's key. And a free number beyond 32 bits would be cut off by a kernel that was
compiled for 32, so its kind is compared.
"""

import contextlib
import os
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton

from . import dispatch
from .reduce import sum_both, sum_partials

REDUCE_BLOCK = 1024
MOST_PLANS = 4096  # kept; then all are made anew
I32 = 1 << 31
# what CompiledKernel.run takes is the same in these; on HIP a buffer above 2 GB is another variant, which no key tells
KNOWN = torch.version.hip is None and (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)

_plans: dict[Hashable, Any] = {}
_runtime = triton.knobs.runtime
# torch.cuda.current_stream makes an object, which takes 4 us; this takes 0.1
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Planned:
    """A kernel, its grid, its specialised numbers and its constants: pointers and free numbers change from call to call.

    The kernel's parameters are the pointers, the free numbers (which it must not specialise), `numbers` and `constants`, in
    this order. Outputs are filled and nothing is returned. Where the direct way may not be taken, Triton's own is: at the
    first call, in the interpreter, on AMD, under another version, for misaligned pointers, for hooks and debugging, for a
    free number of another size, on a device that is not the current one, and where PLOPFAST_LAUNCH is "plain".
    """

    __slots__ = (
        "constants",
        "device",
        "function",
        "grid",
        "kept",
        "kernel",
        "numbers",
        "options",
        "packed",
        "run",
        "small",
        "tail",
    )

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[float, ...],
        constants: dict[str, Any],
        device: torch.device,
        **options: int,
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, (*grid, 1, 1)[:3], numbers, constants
        self.device, self.options = device.index or 0, options
        self.run: Any = None  # that of the compiled kernel, which it keeps alive
        self.function: Any = None
        self.packed: Any = None
        self.small: tuple[bool, ...] = ()
        self.tail: tuple[Any, ...] = ()

    def __call__(self, pointers: tuple[torch.Tensor, ...], free: tuple[int | torch.Tensor, ...]) -> None:
        watched = _runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls or _runtime.debug
        if self.run is None or watched or current_device() != self.device:
            return self._plainly(pointers, free)
        addresses = 0
        for tensor in pointers:
            addresses |= tensor.data_ptr()
        for number, small in zip(free, self.small):  # noqa: B905  # of one length
            if type(number) is not int or (-I32 <= number < I32) is not small:
                addresses = 1
        if addresses & 15:
            return self._plainly(pointers, free)
        self.run(
            *self.grid, current_stream(self.device), self.function, self.packed, None, None, None,
            *pointers, *free, *self.tail,
        )  # fmt: skip

    def _plainly(self, pointers: tuple[torch.Tensor, ...], free: tuple[int | torch.Tensor, ...]) -> None:
        """Launches as Triton does, and keeps the compiled kernel if later launches may use it."""
        with on_device(pointers[0]):
            found = self.kernel[self.grid](*pointers, *free, *self.numbers, **self.constants, **self.options)
        aligned = not any(tensor.data_ptr() & 15 for tensor in pointers)
        numbers = all(type(number) is int for number in free)  # a seed may be a tensor, which is another variant
        if self.run is None and aligned and numbers and _direct(self.kernel, found):
            names = self.kernel.arg_names
            assert names[-len(self.constants) :] == [*self.constants], f"order of constants: {names}"
            assert len(names) == len(pointers) + len(free) + len(self.numbers) + len(self.constants)
            self.small = tuple(-I32 <= int(number) < I32 for number in free)
            self.tail = (*self.numbers, *self.constants.values())
            self.run, self.function, self.packed = found.run, found.function, found.packed_metadata
            self.kept = found


def plan(make: Callable[..., Any], *facts: Hashable) -> Any:
    """Returns `make(*facts)`, from the last time if it was made before."""
    key = (make, facts)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        found = _plans[key] = make(*facts)
    return found


def forget_plans() -> None:
    """Makes all plans anew: after a change of tiles or of the target."""
    _plans.clear()


def summing(
    device: torch.device, parts: int, shape: tuple[int, ...], dtype: torch.dtype, scale: float, root: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function of partial sums, float32 [parts, *shape]: scale * their sum in a fixed order, its root if `root`."""
    size = torch.Size(shape).numel()
    launch = Planned(
        sum_partials, (triton.cdiv(size, REDUCE_BLOCK),), (scale,), {"ROOT": root, "BLOCK": REDUCE_BLOCK}, device,
        num_warps=4,
    )  # fmt: skip

    def run(partials: torch.Tensor) -> torch.Tensor:
        out = partials.new_empty(shape, dtype=dtype)
        if size:
            launch((partials, out), (parts, size))
        return out

    return run


def summing_both(
    device: torch.device,
    one: tuple[int, tuple[int, ...], torch.dtype, float],
    other: tuple[int, tuple[int, ...], torch.dtype, float],
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """`summing` of two partial sums in one launch; each is (parts, shape, dtype, scale)."""
    (parts, shape, dtype, scale), (other_parts, other_shape, other_dtype, other_scale) = one, other
    size, other_size = torch.Size(shape).numel(), torch.Size(other_shape).numel()
    launch = Planned(
        sum_both, (triton.cdiv(size, REDUCE_BLOCK) + triton.cdiv(other_size, REDUCE_BLOCK),), (scale, other_scale),
        {"BLOCK": REDUCE_BLOCK}, device, num_warps=4,
    )  # fmt: skip

    def run(partials: torch.Tensor, other_partials: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, other_out = partials.new_empty(shape, dtype=dtype), partials.new_empty(other_shape, dtype=other_dtype)
        launch((partials, other_partials, out, other_out), (parts, size, other_parts, other_size))
        return out, other_out

    return run


def gradients(
    launch: Planned, device: torch.device, parts: int, shape: tuple[int, ...], dtype: torch.dtype, stripes: int,
    rows: tuple[int, int], v_dtype: torch.dtype, c: float, with_ds: bool, before: tuple[int, ...] = (),
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:  # fmt: skip
    """Returns a function of T, V, U or None, further pointers and seeds, which launches lora_grads or segment_grads: the gradient in
    `dtype`, and dS [`rows`] in `v_dtype` if `with_ds`. Where a sum is in one part, it is written as it is. `before` are the
    launch's first free numbers."""
    part = rows[0] * rows[1]
    g_dtype, ds_dtype = dtype if parts == 1 else torch.float32, v_dtype if stripes == 1 else torch.float32
    ds_shape = (stripes, *rows) if with_ds else (0,)
    gather, gather_ds = summing(device, parts, shape, dtype, 1.0), summing(device, stripes, rows, v_dtype, c)
    both = summing_both(device, (parts, shape, dtype, 1.0), (stripes, rows, v_dtype, c))

    def run(
        t: torch.Tensor, v: torch.Tensor, u: torch.Tensor | None, pointers: tuple[torch.Tensor, ...],
        seeds: tuple[int | torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        g, ds = v.new_empty(parts, *shape, dtype=g_dtype), v.new_empty(ds_shape, dtype=ds_dtype)
        launch((t, v, t if u is None else u, *pointers, g, ds), (*before, *seeds, part))
        if u is not None and parts > 1 and stripes > 1:
            return both(g, ds)
        g = g[0] if parts == 1 else gather(g)
        if u is None:
            return g, None
        return g, ds[0] if stripes == 1 else gather_ds(ds)

    return run


def _direct(kernel: Any, found: Any) -> bool:
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    plain = os.environ.get("PLOPFAST_LAUNCH") == "plain"
    return KNOWN and not plain and isinstance(kernel, JITFunction) and isinstance(found, CompiledKernel)


def padded_rank(rank: int) -> int:
    """The rank in a tile: a power of two, and at least 16, because matrix instructions reduce no fewer."""
    return max(16, triton.next_power_of_2(rank))


def rank_chunk(rank: int) -> int:
    """Ranks that an epilogue adds at once. 64 would spill beside a 128 x 128 accumulator."""
    return min(32, padded_rank(rank))


def precision(x: torch.Tensor) -> str:
    """The precision that torch's own float32 products take, or "ieee", which every target has."""
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    name = dispatch.target_of(x.device).name
    return "tf32" if name.startswith("sm_") or name in ("gfx942", "interpreter") else "ieee"


def is_near(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether an epilogue can read B, which it does by 32-bit offsets to save registers; else B has to be copied."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) < 2**31


def low_rank_facts(s_MR: torch.Tensor | None, b_NR: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[Any, ...]]:
    """(B, what a plan has to know of S and B: rank, S's row stride, B's strides and dtype). B is dense where its strides leave
    32 bits. B may be a stack of such matrices."""
    if s_MR is None or b_NR is None:
        return b_NR, (1, (), (), None)
    if not is_near(b_NR.shape[-2:], b_NR.stride()[-2:]):
        b_NR = b_NR.contiguous()
    return b_NR, (s_MR.shape[1], s_MR.stride()[:1], b_NR.stride(), b_NR.dtype)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one, on which Triton launches."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
