"""What the card's scripts share: the clock of a GPU that may be the CPU of a dry run, its kernels, and what is missing."""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any]) -> float:
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def wall_us(call: Callable[[], Any], calls: int) -> float:
    """Microseconds of a call among many that are enqueued one after the other; median of five rounds."""
    rounds = [seconds_of(lambda: [call() for _ in range(calls)]) / calls * 1e6 for _ in range(6)]
    return round(statistics.median(rounds[1:]), 1)


def gpu_time(call: Callable[[], Any]) -> tuple[float, int]:
    """(milliseconds of all kernels and copies, their number); zeros without a GPU."""
    if not torch.cuda.is_available():
        return 0.0, 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        wait()
    rows = [event for event in profile.key_averages() if event.self_device_time_total]
    return sum(event.self_device_time_total for event in rows) / 1e3, sum(event.count for event in rows)


def operators(call: Callable[[], Any]) -> int:
    """How many operators of torch's and of plopfast's a call runs, those inside others too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key.startswith(("aten::", "plopfast::")))


def missing(*packages: str) -> list[str]:
    """The packages that are not installed; says what is left out without them."""
    gone = [package for package in packages if not importlib.util.find_spec(package)]
    for package in gone:
        print(f"left out: what needs {package}, which is not installed", flush=True)
    return gone


if __name__ == "__main__":  # python bench/card_gpu.py PACKAGE ...: exit code 1 if one is missing
    sys.exit(bool(missing(*sys.argv[1:])))
