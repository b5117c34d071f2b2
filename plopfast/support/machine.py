"""What a figure was measured on: versions, processor, threads, peak memory."""

import contextlib
import ctypes
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

PACKAGES = ("plopfast", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "peft")


class Launch(NamedTuple):
    rank: int
    local_rank: int
    size: int


def launch() -> Launch:
    """This process's rank, its rank on this machine and the number of processes, as torchrun sets them."""
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:  # schedulers set some of them for other ends
        return Launch(0, 0, 1)
    return Launch(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """The checkout's commit, or None where plopfast is installed without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def describe() -> str:
    """Processor, cores, threads and the OpenMP wait policy in force, on one line."""
    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    cores = usable_cores()
    policy = os.environ.get("OMP_WAIT_POLICY", "default")
    return f"{name}, {cores} cores, {torch.get_num_threads()} threads (OMP_WAIT_POLICY {policy}), {platform.system()}"


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy: its affinity, and the whole cores of its cgroup's CPU quota (v1 or v2)."""
    cores = len(_affinity())
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
                mount = root / "sys/fs/cgroup" / controllers
                group = mount / path.lstrip("/")
                for folder in (group, *group.parents):  # each level's quota binds those below it
                    if folder.is_relative_to(mount) and (quota := _quota(folder)):
                        cores = min(cores, max(1, int(quota)))
    return cores


def _quota(cgroup: Path) -> float:
    """Cores that a cgroup's CPU quota is worth, 0 for no quota."""
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no number
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
        return quota / period
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((cgroup / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return max(0, quota) / period  # -1 is no quota
    return 0.0


def busy_cores(root: Path = Path("/"), seconds: float = 0.2) -> float:
    """Of the cores in this process's affinity, how many other processes keep busy, seen over `seconds`; 0.0 where the
    system does not tell (not Linux)."""

    def sample() -> list[tuple[int, int]]:
        """(busy, all) ticks of each core; idle and waiting for a disk are not busy."""
        lines = (line.split() for line in (root / "proc/stat").read_text().splitlines())
        mine = {f"cpu{number}" for number in _affinity()}
        ticks = [[int(field) for field in line[1:9]] for line in lines if line and line[0] in mine]
        return [(sum(t) - t[3] - t[4], sum(t)) for t in ticks]

    try:
        before, own, began = sample(), time.process_time(), time.perf_counter()
        time.sleep(seconds)
        after, own, passed = sample(), time.process_time() - own, time.perf_counter() - began
    except OSError:
        return 0.0
    busy = sum((b1 - b0) / (a1 - a0) for (b0, a0), (b1, a1) in zip(before, after, strict=True) if a1 > a0)
    return max(0.0, busy - own / passed)


def thread_advice(threads: int | None = None, root: Path = Path("/")) -> list[str]:
    """What to change where `threads` (None: torch's) do not fit the cores that are free; empty when all is well.

    Samples the machine for 0.2 s. Under half a core of others' work is let pass: /proc/stat counts in ticks of 10 ms.
    """
    import torch

    threads = threads or torch.get_num_threads()
    every, cores, others = len(_affinity()), usable_cores(root), busy_cores(root)
    advice = []
    if threads > cores:
        advice.append(f"{threads} CPU threads, but this process may use {cores} cores: pass --threads {cores}")
    shared = others >= 0.5 and min(threads, cores) > round(every - others)
    if shared:
        advice.append(f"other processes keep {others:.1f} of {every} cores busy: times are longer until they are done")
    passive = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    if threads > 1 and (shared or threads > cores) and not passive:
        advice.append(
            "waiting CPU threads spin on cores that others need: set OMP_WAIT_POLICY=PASSIVE before Python starts, or "
            f"pass --threads {max(1, min(cores, int(every - others)))}"
        )
    return advice


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX-512 BF16 or AMX)."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text().split()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def reset_peak(device: "torch.device | None" = None) -> None:
    """Starts a new measurement of a GPU's peak memory, or of peak resident memory where the system can (Linux)."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(
        OSError, AttributeError, TypeError
    ):  # glibc keeps freed memory, which would hide what comes
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: "torch.device | None" = None) -> float:
    """Peak memory of torch's tensors on a GPU since `reset_peak`, else this process's resident memory (since its start
    where that does not work)."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    if sys.platform == "win32":
        return float("nan")
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def free_mib(device: "torch.device", root: Path = Path("/")) -> float:
    """Memory that new tensors on `device` could take, infinite where the system does not tell (a CPU outside Linux)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] / 2**20
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) / 1024
    return math.inf


def set_waiting_policy() -> None:
    """OpenMP's threads wait passively after a short spin, unless the user chose otherwise; works only before torch is
    imported.

    On shared cores a thread that spins on keeps its partner from running; on idle ones no spinning at all costs a wake-up
    at each of a step's 5,000 operations (bench/waiting.py measures both).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
