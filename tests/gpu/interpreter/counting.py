"""Bytes and FLOPs of launches, by argument, and what would reach DRAM behind a cache."""

from collections import Counter, OrderedDict, deque
from dataclasses import astuple, dataclass, field

import numpy as np

SECTOR, LINE = 32, 128  # bytes: what a GPU's memory moves at a time, and what its L2 keeps


@dataclass
class Moved:
    lanes: int = 0
    bytes: int = 0  # that all lanes ask for
    program_bytes: int = 0  # distinct in a program, summed over programs
    launch_bytes: int = 0  # distinct in the whole launch: compulsory traffic
    sectors: int = 0  # of 32 bytes, distinct in each access

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
    begun: int  # when its first program runs; everything earlier comes before it
    grid: tuple[int, ...] = ()
    order: np.ndarray | None = None  # the numbers of its programs as they run; x varies fastest
    args: dict[str, Traffic] = field(default_factory=dict)
    flops: Counter = field(default_factory=Counter)  # of dots, by the operands' type
    trace: dict[int, list] = field(default_factory=dict)  # a program's number -> its accesses

    def compulsory(self, *names):
        return sum(traffic.compulsory for name, traffic in self.args.items() if name in (names or self.args))

    def program(self, clock):
        z, y, x = np.unravel_index(self.order[clock - self.begun], self.grid[::-1])
        return int(x), int(y), int(z)


def l2_replay(launches, l2_bytes, concurrent):
    """Bytes that cross DRAM behind an LRU cache when `concurrent` programs take turns, one access each."""
    dirty, moved = OrderedDict(), Counter(dram_read=0, dram_write=0, hits=0)  # a cached line -> was it written
    for launch in launches:
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
