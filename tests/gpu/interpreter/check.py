"""Checks every access of a kernel: is it inside its argument's view, aligned, and ordered after what others did?"""

from collections import Counter

import numpy as np
import triton
import triton.language as tl
import triton.runtime.interpreter as stock

from .counting import LINE, SECTOR, Launch, Traffic, l2_replay
from .errors import MisalignedError, OutOfBoundsError, RaceError, UnwrittenReadError
from .memory import ALIGNMENT, ATOMIC, FIRST_READER, LANE, LAST_READER, MIDDLE, SPACE_BITS, WRITER, Memory, View

FIRST = {"load": FIRST_READER, "store": WRITER, "atomic": ATOMIC}
LAST = {"load": LAST_READER, "store": WRITER, "atomic": ATOMIC}
CLASHES = {"load": (WRITER, ATOMIC), "store": (WRITER, ATOMIC, FIRST_READER), "atomic": (WRITER, FIRST_READER)}
DEEDS = {WRITER: "stored", ATOMIC: "updated atomically", FIRST_READER: "loaded"}


class Check:
    """What all launches in one `checked` block did: the bounds they kept to, their races, the bytes they moved."""

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
        """The share of bytes that were written, for every argument in `out` that was given a tensor."""
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
        """Argument name -> Traffic, summed over launches. `launches[i].args` has it for one launch."""
        names = {name: None for launch in self.launches for name in launch.args}
        return {name: sum((la.args[name] for la in self.launches if name in la.args), Traffic()) for name in names}

    def atomics(self):
        """Argument name -> number of lanes in atomic operations, for arguments with any."""
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
        return l2_replay(self.launches, l2_bytes, concurrent)

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
        """Checks and counts the lanes of one load, store or atomic. Returns the pointers with real addresses."""
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
        """Compares an access with what other lanes and programs did, then counts it and stamps what it touched."""
        launch, memory, now = self.launch, view.memory, self.clock
        cells = memory.cells(offsets + view.in_storage, size)
        shadow, each = memory.shadow, len(cells) // len(offsets)
        lane = np.arange(len(cells), dtype=np.int32)
        shadow[LANE][cells] = lane
        last = shadow[LANE][cells]  # the last of the lanes that share an address
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
