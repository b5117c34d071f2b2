"""Triton's interpreter with a GPU's arithmetic, and with none of its own forgiveness.

    with checked(out=("y",), seed=0) as check:
        kernel[grid](...)                          # any number of launches, also deep inside library functions
    assert check.coverage() == {"y": 1.0} and not check.atomics()
    check.counts()["x"].load.launch_bytes          # what the argument x must move, in bytes
    check.launches[0].kernel, check.launches[0].compulsory("x"), check.flops["bf16"]

The stock interpreter runs kernels on CPU tensors, but computes on the bit patterns of bf16, truncates casts, gives 0 for
masked loads without `other`, reads whatever address it is told to and runs the programs one after another. Here

- bf16, fp16, fp8 and tf32 round as on a GPU (tf32 to nearest; hardware may truncate, for twice the error);
- a pointer argument has an address space of its own, and touching anything but the elements of its view, such as the
  gap between two rows, raises OutOfBoundsError with the argument's name;
- masked loads without `other` give NaN, or random integers;
- programs run in random order, and two programs that need an order raise RaceError;
- loading what no kernel has stored of an argument named in `out`, as "y" or "kernel.y", raises UnwrittenReadError (an
  argument that starts from what the host put there is no `out`);
- int32 overflow, misaligned accesses, tensor descriptors and dots that hardware can't do raise.

What was touched is kept by memory, not by argument: a tensor may go by another name in the next launch. The end of a
launch orders everything. `race=False` drops the race checks, `compute=False` the arithmetic of dots, `trace=True` keeps
what l2_replay needs. Not modelled: rounding at every step of an fp16 reduction, contraction of `a * b + c` to an FMA,
and threads of one program that are out of step.
"""

import contextlib
import copy
import inspect
import math
import mmap
import warnings
from collections import Counter, OrderedDict, deque
from dataclasses import astuple, dataclass, field, replace
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.language.semantic import TritonSemantic
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

if not isinstance(tl.zeros_like, stock.InterpretedFunction):
    raise RuntimeError("TRITON_INTERPRET=1 has to be in the environment before triton is first imported, and was not")

SPACE_BITS = 46  # of addresses that belong to one argument; no offset that a kernel computes leads into another's
MIDDLE = 1 << (SPACE_BITS - 1)  # where the argument's first element is in it, give or take the alignment
ALIGNMENT = 256  # bytes, of what a GPU allocates; virtual addresses keep the real ones' remainder
SECTOR, LINE = 32, 128  # bytes: what a GPU's memory moves at a time, and what its L2 keeps
PAGE = 4096  # bytes of memory that get their shadow together
WRITER, ATOMIC, FIRST_READER, LAST_READER, LANE = range(5)  # rows of a shadow
FIRST = {"load": FIRST_READER, "store": WRITER, "atomic": ATOMIC}
LAST = {"load": LAST_READER, "store": WRITER, "atomic": ATOMIC}
CLASHES = {"load": (WRITER, ATOMIC), "store": (WRITER, ATOMIC, FIRST_READER), "atomic": (WRITER, FIRST_READER)}
DEEDS = {WRITER: "stored", ATOMIC: "updated atomically", FIRST_READER: "loaded"}
NARROW = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}  # numpy has none of them
BITS = {1: torch.uint8, 2: torch.uint16}  # by bytes: what the interpreter keeps them in


class CheckError(Exception):
    """A kernel did what hardware can't do, or what it does without a word and to no good end."""


class OutOfBoundsError(CheckError): ...


class MisalignedError(CheckError): ...


class RaceError(CheckError): ...


class UnwrittenReadError(CheckError): ...


class IntegerOverflowError(CheckError): ...


class NoSuchInstructionError(CheckError): ...


# ---------------------------------------------------------------------------------------------------------- arithmetic
def is_narrow(*types):
    return any(ty.scalar.name in NARROW for ty in types)


def widen(handle):
    """A handle's numbers, in a type that numpy computes with."""
    dtype = NARROW.get(handle.dtype.scalar.name)
    return handle.data if dtype is None else torch.from_numpy(np.array(handle.data)).view(dtype).float().numpy()


def narrow(numbers, ty):
    """A handle of Triton type `ty`, rounded to nearest even; fp8 saturates, as casts do in hardware."""
    dtype = NARROW.get(ty.scalar.name)
    if dtype is None:
        assert "fp8" not in ty.scalar.name, ty  # an exotic one, which would need its own arithmetic
        return stock.TensorHandle(numbers.astype(stock._get_np_dtype(ty)), ty.scalar)
    wide = torch.from_numpy(np.array(numbers, dtype=np.float32))
    if dtype.itemsize == 1:
        wide = wide.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return stock.TensorHandle(wide.to(dtype).view(BITS[dtype.itemsize]).numpy(), ty.scalar)


def round_to_tf32(numbers):
    bits = numbers.view(np.uint32)
    bits = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(numbers), bits.view(np.float32), numbers)


# -------------------------------------------------------------------------------------------------------------- memory
def far_apart(shape, stride, dtype):
    """Zeros of any stride: the range of addresses is reserved, and only pages that are touched take memory."""
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, a name that Python has since 3.13
    return torch.frombuffer(mmap.mmap(-1, extent * dtype.itemsize, flags=flags), dtype=dtype).as_strided(shape, stride)


class Memory:
    """When the bytes of a storage were touched: by `unit` bytes, on the check's clock, 0 for never.

    Pages that were never touched have no shadow, so that a view with enormous strides costs no more than its rows do.
    """

    def __init__(self, storage):
        self.storage = storage  # kept alive: its address must not come to mean another tensor
        self.unit = 8
        self.page_place = np.zeros(storage.nbytes() // PAGE + 1, np.int64)  # in the shadow, from 1; 0: it has none
        self.pages = 0
        self.shadow = np.zeros((5, 0), np.int32)

    def cells(self, offsets, size):
        """The shadow's columns for elements of `size` bytes, size // unit columns for each."""
        if size < self.unit:
            self.shadow = np.repeat(self.shadow, self.unit // size, axis=1)
            self.unit = size
        page = offsets // PAGE
        if not self.page_place[page].all():
            new = np.unique(page[self.page_place[page] == 0])
            self.page_place[new] = np.arange(self.pages, self.pages + len(new)) + 1
            self.pages += len(new)
            missing = self.pages * PAGE // self.unit - self.shadow.shape[1]
            if missing > 0:  # at least doubled, or many small steps would copy it as often
                more = np.zeros((5, max(missing, self.shadow.shape[1])), np.int32)
                self.shadow = np.concatenate([self.shadow, more], axis=1)
        first = ((self.page_place[page] - 1) * PAGE + offsets % PAGE) // self.unit
        each = size // self.unit
        return first if each == 1 else (first[:, None] + np.arange(each)).ravel()


class View:
    """A pointer argument of one launch. Offsets are relative to its first element."""

    def __init__(self, name, tensor, memory):
        self.name, self.memory = name, memory
        self.shape, self.stride, self.itemsize = tuple(tensor.shape), tensor.stride(), tensor.element_size()
        self.start = tensor.data_ptr()
        self.in_storage = self.start - memory.storage.data_ptr()  # bytes
        self.dims = []  # outermost first, merged where no gap is between the rows
        steps = [(n, s) for n, s in zip(self.shape, self.stride, strict=True) if n > 1 and s > 0]
        for n, s in sorted(steps, key=lambda dim: -dim[1]):
            if self.dims and self.dims[-1][1] == n * s:
                n *= self.dims.pop()[0]
            self.dims.append((n, s))
        reach = [1 + sum((n - 1) * s for n, s in self.dims[i:]) for i in range(len(self.dims) + 1)]
        self.extent = 0 if 0 in self.shape else reach[0]
        self.overlaps = any(s < inner for (_, s), inner in zip(self.dims, reach[1:], strict=True))

    def elements(self):
        offsets = np.zeros(1 if self.extent else 0, np.int64)
        for n, s in self.dims:
            offsets = (offsets[:, None] + np.arange(n) * s).ravel()
        return offsets

    def contains(self, offsets):
        inside = (offsets >= 0) & (offsets < self.extent)
        if self.overlaps:  # such as a sliding window: an offset does not tell its indices
            return inside & np.isin(offsets, self.elements())
        if self.dims and self.dims[0][1] > 1:
            for n, s in self.dims:
                index = offsets // s
                inside &= index < n
                offsets = offsets - index * s
            inside &= offsets == 0
        return inside


# ------------------------------------------------------------------------------------------------------------ the check
@dataclass
class Moved:
    lanes: int = 0
    bytes: int = 0  # that all lanes ask for
    program_bytes: int = 0  # distinct ones, summed over programs
    launch_bytes: int = 0  # distinct ones in the whole launch: compulsory traffic
    sectors: int = 0  # of 32 bytes, distinct ones in each access

    def __add__(self, other):
        return Moved(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Traffic:
    """What kernels did to one argument."""

    load: Moved = field(default_factory=Moved)
    store: Moved = field(default_factory=Moved)
    atomic: Moved = field(default_factory=Moved)

    def __add__(self, other):
        return Traffic(self.load + other.load, self.store + other.store, self.atomic + other.atomic)

    @property
    def compulsory(self):
        return self.load.launch_bytes + self.store.launch_bytes + self.atomic.launch_bytes


@dataclass
class Launch:
    kernel: str
    parameters: tuple[str, ...]
    begun: int  # when its first program runs; what happened earlier is ordered by the boundary between kernels
    grid: tuple[int, ...] = ()
    order: np.ndarray | None = None  # numbers of its programs as they run; x varies fastest in a number
    args: dict[str, Traffic] = field(default_factory=dict)
    flops: Counter = field(default_factory=Counter)  # of dots, by the operands' type
    trace: dict[int, list] = field(default_factory=dict)  # a program's number -> its accesses

    def compulsory(self, *names):
        return sum(traffic.compulsory for name, traffic in self.args.items() if name in (names or self.args))

    def program(self, clock):
        z, y, x = np.unravel_index(self.order[clock - self.begun], self.grid[::-1])
        return int(x), int(y), int(z)


class Check:
    def __init__(self, out, seed, race, tf32, compute, trace):
        self.out = {out} if isinstance(out, str) else set(out)
        self.seed, self.race, self.tf32, self.compute, self.trace = seed, race, tf32, compute, trace
        self.random = np.random.default_rng(seed or 0)
        self.clock = 0  # programs run so far
        self.launches = []
        self.memories = {}  # a storage's address -> Memory
        self.views = []  # of this launch, by address space
        self.outputs = {}  # (name in out, address, shape, stride) -> View, of all launches

    # what it reports
    def coverage(self):
        """Share of the bytes that were written, for every argument in `out` that was given a tensor."""
        unknown = self.out - {known for la in self.launches for p in la.parameters for known in (p, f"{la.kernel}.{p}")}
        if unknown:
            raise ValueError(f"out: no kernel that was launched has a parameter named {', '.join(sorted(unknown))}")
        written, total = Counter(), Counter()
        for (name, *_), view in self.outputs.items():
            cells = view.memory.cells(view.elements() * view.itemsize + view.in_storage, view.itemsize)
            shadow = view.memory.shadow
            written[name] += int(np.count_nonzero(shadow[WRITER][cells] | shadow[ATOMIC][cells]))
            total[name] += len(cells)
        return {name: written[name] / total[name] if total[name] else 1.0 for name in total}

    def counts(self):
        """Argument name -> Traffic, summed over launches; `launches[i].args` has the same for one."""
        names = {name: None for launch in self.launches for name in launch.args}
        return {name: sum((la.args[name] for la in self.launches if name in la.args), Traffic()) for name in names}

    def atomics(self):
        """Argument name -> number of lanes in atomic operations, for arguments that have any."""
        return {name: traffic.atomic.lanes for name, traffic in self.counts().items() if traffic.atomic.lanes}

    def compulsory(self, *names):
        """Bytes that cross DRAM if every launch starts with an empty cache and none is too small."""
        return sum(launch.compulsory(*names) for launch in self.launches)

    @property
    def flops(self):
        return sum((launch.flops for launch in self.launches), Counter())

    def l2_replay(self, l2_bytes, concurrent):
        """Bytes that cross DRAM behind an LRU cache when `concurrent` programs take turns, one access each."""
        if not self.trace:
            raise ValueError("l2_replay needs checked(trace=True)")
        dirty, moved = OrderedDict(), Counter(dram_read=0, dram_write=0, hits=0)  # a cached line -> was it written
        for launch in self.launches:
            waiting, running = deque(sorted(launch.trace)), deque()
            while waiting or running:
                while waiting and len(running) < concurrent:
                    running.append(deque(launch.trace[waiting.popleft()]))
                accesses = running.popleft()
                action, memory, lines = accesses.popleft()
                for line in ((memory, number) for number in lines.tolist()):
                    if line in dirty:
                        moved["hits"] += LINE
                    elif action != "store":
                        moved["dram_read"] += LINE
                    dirty[line] = dirty.pop(line, False) or action != "load"
                    if len(dirty) > l2_bytes // LINE:
                        moved["dram_write"] += LINE * dirty.popitem(last=False)[1]
                if accesses:
                    running.append(accesses)
        moved["dram_write"] += LINE * sum(dirty.values())
        return dict(moved)

    # what it is told
    def begin(self, kernel, parameters):
        self.views, self.patched = [], set()
        self.launch = Launch(kernel, tuple(parameters), self.clock + 1)
        self.launches.append(self.launch)

    def bind(self, name, tensor):
        """A Triton pointer to the tensor's first element, in an address space of its own."""
        ty = tl.str_to_ty(triton.runtime.jit.mangle_type(tensor), None)
        tensor = stock._unwrap_tensor(tensor)
        if tensor.device.type != "cpu":
            raise TypeError(f"{name}: expected a CPU tensor for the interpreter, got one on {tensor.device}")
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.memories:
            self.memories[storage.data_ptr()] = Memory(storage)
        view = View(name, tensor, self.memories[storage.data_ptr()])
        self.views.append(view)
        self.launch.args[name] = Traffic()
        for known in self.out & {name, f"{self.launch.kernel}.{name}"}:
            self.outputs[known, view.start, view.shape, view.stride] = view
        address = (len(self.views) << SPACE_BITS) + MIDDLE + view.start % ALIGNMENT
        return tl.tensor(stock.TensorHandle(np.array([address], np.uint64), ty), ty)

    def view_at(self, space):
        if not 0 < space <= len(self.views):
            raise OutOfBoundsError(f"a pointer that none of the arguments leads to, {self.where()}")
        return self.views[space - 1]

    def where(self):
        return f"in {self.launch.kernel}, program {self.launch.program(self.clock)}"

    def check_descriptor(self, base, strides, block_shape):
        view = self.view_at(base.item() >> SPACE_BITS)
        steps, inner = [stride * view.itemsize for stride in strides[:-1]], block_shape[-1] * view.itemsize
        if view.start % 16 or any(step % 16 for step in steps) or inner < 16:
            raise MisalignedError(
                f"a tensor descriptor of {view.name!r}: expected a base and strides that are multiples of 16 bytes and "
                f"blocks at least 16 bytes wide, got a base at {view.start % 16} modulo 16, strides of {steps} bytes "
                f"and blocks {inner} bytes wide, in {self.launch.kernel}"
            )

    def access(self, action, pointers, mask, values=None):
        """Check and count the lanes of one load, store or atomic; the same pointers with real addresses."""
        size = stock._get_np_dtype(pointers.get_element_ty()).itemsize
        mask = np.broadcast_to(mask, pointers.data.shape).astype(bool)
        addresses = pointers.data[mask].astype(np.int64)
        values = None if values is None else np.broadcast_to(values, mask.shape)[mask]
        real, spaces = np.zeros(mask.shape, np.uint64), addresses >> SPACE_BITS
        for space in spaces[:1] if (spaces == spaces[:1]).all() else np.unique(spaces):
            view, mine = self.view_at(int(space)), spaces == space
            offsets = addresses[mine] - ((space << SPACE_BITS) + MIDDLE + view.start % ALIGNMENT)
            self.check_bounds(action, view, offsets, size)
            self.record(action, view, offsets, size, None if values is None else values[mine])
            addresses[mine] = offsets + view.start
        real[mask] = addresses
        return stock.TensorHandle(real, pointers.dtype)

    def check_bounds(self, action, view, offsets, size):
        inside = view.contains(offsets // view.itemsize)
        for more in range(view.itemsize, size, view.itemsize):  # the pointer was cast to a wider type
            inside &= view.contains((offsets + more) // view.itemsize)
        if not inside.all():
            raise OutOfBoundsError(
                f"{action} of {view.name!r} at element {offsets[~inside][0] // view.itemsize} and {(~inside).sum() - 1} "
                f"more lanes are outside its view of shape {view.shape} and stride {view.stride}, {self.where()}"
            )
        if ((offsets + view.start) % size).any():
            raise MisalignedError(f"{action} of {size} bytes of {view.name!r} not aligned to {size}, {self.where()}")

    def record(self, action, view, offsets, size, values):
        """Hold an access against what other lanes and programs did, then count it and stamp what it touched."""
        launch, memory, now = self.launch, view.memory, self.clock
        cells = memory.cells(offsets + view.in_storage, size)
        shadow, each = memory.shadow, len(cells) // len(offsets)
        lane = np.arange(len(cells), dtype=np.int32)
        shadow[LANE][cells] = lane
        last = shadow[LANE][cells]  # of the lanes that share an address
        distinct = last == lane

        def element(lanes):
            return f"{view.name!r} at element {offsets[np.flatnonzero(lanes)[0] // each] // view.itemsize}"

        for row in CLASHES[action] if self.race else ():
            stamps = shadow[row][cells]
            clash = (stamps >= launch.begun) & (stamps < now)
            if clash.any():
                rival = launch.program(stamps[clash][0])
                raise RaceError(f"{action} of {element(clash)}, which program {rival} {DEEDS[row]}, {self.where()}")
        if action == "store" and self.race and not distinct.all():
            bits = values.view(f"u{size}").repeat(each)
            differ = bits != bits[last]
            if differ.any():
                raise RaceError(f"one store of different values to {element(differ)}, {self.where()}")
        for output in self.outputs.values() if action == "load" else ():
            if output.memory is memory:
                unwritten = (shadow[WRITER][cells] | shadow[ATOMIC][cells]) == 0
                at = offsets.repeat(each) + view.start - output.start
                unwritten &= output.contains(at // output.itemsize)
                if unwritten.any():
                    raise UnwrittenReadError(f"load of {element(unwritten)}, which nothing wrote, {self.where()}")

        new = shadow[FIRST[action]][cells] < launch.begun
        moved = getattr(launch.args[view.name], action)
        moved.lanes += len(offsets)
        moved.bytes += len(offsets) * size
        moved.program_bytes += memory.unit * int(np.count_nonzero(distinct & (shadow[LAST[action]][cells] != now)))
        moved.launch_bytes += memory.unit * int(np.count_nonzero(distinct & new))
        moved.sectors += len(np.unique((offsets + view.in_storage) // SECTOR))
        shadow[FIRST[action]][cells[new]] = now
        shadow[LAST[action]][cells] = now
        if self.trace:
            lines = np.unique((offsets + view.in_storage) // LINE)
            launch.trace.setdefault(int(launch.order[now - launch.begun]), []).append((action, id(memory), lines))


# ------------------------------------------------------------------------------------------------------ the interpreter
class CheckedBuilder(stock.InterpreterBuilder):
    check: Check

    def set_grid_dim(self, nx, ny, nz):
        super().set_grid_dim(nx, ny, nz)
        launch, programs = self.check.launch, math.prod((nx, ny, nz))
        launch.grid = (nx, ny, nz)
        launch.order = np.arange(programs) if self.check.seed is None else self.check.random.permutation(programs)

    def set_grid_idx(self, x, y, z):
        self.check.clock += 1
        super().set_grid_idx(*self.check.launch.program(self.check.clock))

    # memory: the hints after mask and value differ between versions of Triton
    def create_masked_load(self, ptrs, mask, other, *hints, **named_hints):
        real = self.check.access("load", ptrs, mask.data)
        other = self.poison(ptrs.get_element_ty(), ptrs.data.shape) if other is None else other
        return super().create_masked_load(real, mask, other, *hints, **named_hints)

    def create_masked_store(self, ptrs, value, mask, *hints, **named_hints):
        real = self.check.access("store", ptrs, mask.data, value.data)
        return super().create_masked_store(real, value, mask, *hints, **named_hints)

    def create_atomic_rmw(self, operation, ptr, val, mask, sem, scope):
        return super().create_atomic_rmw(operation, self.check.access("atomic", ptr, mask.data), val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        return super().create_atomic_cas(self.check.access("atomic", ptr, True), cmp, val, sem, scope)

    def create_make_tensor_descriptor(self, base, shape, strides, block_shape, *rest, **named_rest):
        self.check.check_descriptor(base.data, [stride.data.item() for stride in strides], block_shape)
        return super().create_make_tensor_descriptor(base, shape, strides, block_shape, *rest, **named_rest)

    def poison(self, ty, shape):
        """What lanes without memory may find in their registers."""
        if ty.is_floating():
            return narrow(np.full(shape, np.nan), ty)
        dtype = stock._get_np_dtype(ty)
        noise = np.frombuffer(self.check.random.bytes(math.prod(shape) * dtype.itemsize), f"u{dtype.itemsize}")
        noise = noise % 2 == 1 if dtype.kind == "b" else noise.view(dtype)
        return stock.TensorHandle(noise.reshape(shape), ty)

    # arithmetic
    def cast_impl(self, src, dst_type):
        return narrow(widen(src), dst_type) if is_narrow(src.dtype, dst_type) else super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode in (None, stock._ir.ROUNDING_MODE.RTNE) and is_narrow(src.dtype, dst_type):
            return narrow(widen(src), dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def unary_op(self, arg, op):
        return narrow(op(widen(arg)), arg.dtype) if is_narrow(arg.dtype) else super().unary_op(arg, op)

    def binary_op(self, lhs, rhs, op):
        if not is_narrow(lhs.dtype):
            return super().binary_op(lhs, rhs, op)
        numbers = op(widen(lhs), widen(rhs))
        return stock.TensorHandle(numbers, tl.int1) if numbers.dtype.kind == "b" else narrow(numbers, lhs.dtype)

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not is_narrow(other.dtype):  # a selection of bit patterns is one of numbers
            return super().ternary_op(lhs, rhs, other, op)
        return narrow(op(widen(lhs), widen(rhs), widen(other)), other.dtype)

    def create_fma(self, x, y, z):
        # products are exact in float64; its own rounding of the sum shows in one result of 2^29
        return narrow(widen(x).astype(np.float64) * widen(y) + widen(z), z.dtype)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        self.check.launch.flops[a.dtype.scalar.name] += 2 * d.data.size * a.data.shape[-1]
        if not self.check.compute:
            return stock.TensorHandle(d.data, d.dtype.scalar)
        kind = np.float32 if a.dtype.is_floating() and a.data.itemsize < 8 else d.data.dtype
        x, y = widen(a).astype(kind), widen(b).astype(kind)
        if a.dtype.scalar == tl.float32 and self.check.tf32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            x, y = round_to_tf32(x), round_to_tf32(y)
        return narrow(np.matmul(x, y) + widen(d), d.dtype)


class CheckedExecutor(stock.GridExecutor):
    def _init_args_hst(self, args_dev, kwargs):
        """All arguments by name, and pointers in place of tensors: the stock conversion does not know the names."""
        self.check = stock.interpreter_builder.check
        bound = inspect.signature(self.fn).bind(*args_dev, **kwargs)
        bound.apply_defaults()
        self.check.begin(self.fn.__name__, bound.arguments)
        values = bound.arguments.items()
        return [], {name: v if name in self.constexprs else self.convert(name, v) for name, v in values}

    def convert(self, name, value):
        if isinstance(value, tuple):
            members = [self.convert(f"{name}[{i}]", member) for i, member in enumerate(value)]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if isinstance(value, TensorDescriptor):
            value = copy.copy(value)  # the constructor wants a tensor
            value.base = self.check.bind(name, value.base)
            self.check.check_descriptor(value.base.handle.data, value.strides, value.block_shape)
        elif hasattr(value, "data_ptr"):
            return self.check.bind(name, value)
        elif isinstance(value, (bool, float)):  # a Python float would take on the type of what it meets
            ty = tl.int1 if isinstance(value, bool) else tl.float32
            return tl.tensor(stock.TensorHandle(np.array([value], stock._get_np_dtype(ty)), ty), ty)
        return value

    def _restore_args_dev(self, *args):
        """Kernels worked on the tensors themselves."""

    def __call__(self, *args, **kwargs):
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Triton 3.6 makes integers of arrays
                super().__call__(*args, **kwargs)
        except InterpreterError as error:
            cause = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause if isinstance(cause, CheckError) else error from None


stock_apply, stock_patch_lang = stock.ReduceScanOpInterface.apply, stock._patch_lang


def reduce_or_scan(self, inputs):
    for block in inputs if isinstance(inputs, tuple) else (inputs,):
        if is_narrow(block.dtype):
            raise NoSuchInstructionError(
                f"reduction or scan of {block.dtype}, rounded at each step: cast to fp32 first"
            )
    return stock_apply(self, inputs)


def check_overflow(semantic, lhs, rhs, operation):
    """In place of Triton's own check, which takes six interpreted operations for each of the kernel's."""
    x, y, name = lhs.handle.data, rhs.handle.data, operation.__name__
    if x.dtype.kind in "iu" and x.dtype.itemsize < 8:
        exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name](x, y, dtype=np.int64)
        if exact.size and not np.iinfo(x.dtype).min <= exact.min() <= exact.max() <= np.iinfo(x.dtype).max:
            raise IntegerOverflowError(f"{lhs.dtype} overflow in {name}, {semantic.builder.check.where()}")


def patch_lang_once(fn):
    """Patching takes a millisecond, and every call of a device function such as tl.cdiv asks for it again."""
    check, modules = stock.interpreter_builder.check, {id(tl), id(tl.core)} & set(map(id, fn.__globals__.values()))
    if not modules <= check.patched:
        check.patched |= modules
        return stock_patch_lang(fn)


def min_dot_size(lhs, rhs):
    least, k = 32 if lhs.scalar.primitive_bitwidth == 8 else 16, int(lhs.shape[-1])  # Triton 3.9 lets fp32 have K = 8
    if k < least:
        raise NoSuchInstructionError(f"a dot of {lhs} and {rhs}: expected K >= {least}, got {k}")
    return 1, 1, least


@contextlib.contextmanager
def checked(*, out=(), seed=0, race=True, tf32=True, compute=True, trace=False):
    """Check all kernels that are launched in the block. `seed=None`: programs run in launch order."""
    builder = stock.interpreter_builder
    if isinstance(builder, CheckedBuilder):
        raise RuntimeError("checked() within checked(): the outer one sees all launches")
    builder.__class__ = CheckedBuilder  # in place: functions that Triton 3.6 has patched hold on to this object
    builder.check = Check(out, seed, race, tf32, compute, trace)
    try:
        with (
            mock.patch.object(stock, "GridExecutor", CheckedExecutor),
            mock.patch.object(stock, "_patch_lang", patch_lang_once),
            mock.patch.object(stock.ReduceScanOpInterface, "apply", reduce_or_scan),
            mock.patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", check_overflow),
            mock.patch.object(builder, "options", replace(builder.options, debug=True)),  # kernels' own assertions
            mock.patch.dict(builder.codegen_fns, min_dot_size=min_dot_size),
        ):
            yield builder.check
    finally:
        del builder.check
        builder.__class__ = stock.InterpreterBuilder
