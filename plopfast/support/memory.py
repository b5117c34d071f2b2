"""Memory: this process's peak, and what is free."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

M_MMAP_THRESHOLD = -3  # mallopt's number of it


def reset_peak(device: torch.device | None = None) -> None:
    """Starts a new measurement of a GPU's peak memory, or of the peak resident memory where the system can (Linux)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    trim()  # what is kept would hide what follows
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def trim() -> None:
    """Gives freed memory back to the system; glibc keeps that of tensors below 32 MiB."""
    _glibc("malloc_trim", 0)


def pinned(make: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """The tensor that `make(pin_memory=True)` makes, and True; where the system gives no pinned memory, or there is no GPU,
    that of `make()`, and False."""
    try:
        return make(pin_memory=True), True
    except RuntimeError:
        return make(), False


def free_large_at_once() -> None:
    """From now on, glibc gives tensors of a MiB and more back to the system when they are freed, unless the user has set
    MALLOC_MMAP_THRESHOLD_. In its heap small objects come to lie between them, so that thousands of short-lived ones add up:
    a model of 135M that was streamed on the CPU took 678 MiB in place of 364 (bench/estimate.py --ways, nf4)."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _glibc("mallopt", M_MMAP_THRESHOLD, 1 << 20)


def _glibc(function: str, *arguments: int) -> None:
    """Calls a function of glibc; on other systems nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def peak_mib(device: torch.device | None = None) -> float:
    """Returns the peak memory since `reset_peak`, in MiB: of torch's tensors on a GPU, else this process's resident memory
    (since its start where a reset does not work)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):  # the kernel's own peak, which psutil does not read and getrusage does not reset
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def free_mib(device: torch.device) -> float:
    """Returns the memory that new tensors on `device` could take, in MiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    return psutil.virtual_memory().available / 2**20


def mapped_files() -> list[range]:
    """Returns the addresses at which safetensors files are mapped into this process's memory, where the system says so (Linux)."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if ".safetensors" in line:
                begin, end = line.split(maxsplit=1)[0].split("-")
                found.append(range(int(begin, 16), int(end, 16)))
    return found
