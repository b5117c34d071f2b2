"""How `plopfast bench` takes time and memory: variants in turn, caches flushed, the GPU's own events."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLUSH_MIB = 512  # more than any L2 holds, and than MI300's 256 MiB Infinity Cache
WARM, LEAST = 2, 3  # unmeasured rounds; repeats that even a spent budget gets
Calls = Mapping[str, Callable[[], Any]]  # by variant
NONE: Calls = {}


def interleaved(
    calls: Calls, repeats: int, budget_s: float, flush: torch.Tensor | None, prepare: Calls = NONE
) -> dict[str, list[float]]:
    """Milliseconds of each call, one variant after the other in every repeat, in a rotating order.

    `prepare` holds what a variant needs beforehand; it is not timed. Repeats end when `budget_s` seconds are over.
    """
    names, until = list(calls), time.perf_counter() + budget_s
    ms: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-WARM, repeats):
        if repeat >= LEAST and time.perf_counter() > until:
            break
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            prepare.get(name, bool)()
            took = time_ms(calls[name], flush)
            ms[name] += [took] if repeat >= 0 else []
    return ms


def time_ms(call: Callable[[], Any], flush: torch.Tensor | None) -> float:
    """Milliseconds of one call, after `flush` was overwritten: by the GPU's events or by the host's clock, whichever says more.

    While the GPU overwrites `flush`, the host is ahead, so the events alone would hide what launching costs. Without
    `flush` (the CPU of a dry run) the clock alone is asked.
    """
    if flush is None:
        return _host_ms(call)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    host_ms = _host_ms(call)
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end), host_ms)


def _host_ms(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def peak_mib(call: Callable[[], Any]) -> float:
    """GPU memory that a call needs above what is allocated before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
