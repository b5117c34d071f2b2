"""CPU threads: how many cores this process may use, how busy they are, and how waiting threads behave."""

import contextlib
import os
import time
from pathlib import Path

import psutil

BUSY = 0.5  # of a core that others keep busy; the kernel counts in ticks of 10 ms, so less may be nothing
SPINS_ALONE, SPINS_BESIDE_OTHERS = 20_000, 1000


def affinity() -> set[int]:
    """Returns the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)  # needs no /proc, unlike psutil's
    return set(range(psutil.cpu_count() or 1))


def usable_cores(root: Path = Path("/")) -> int:
    """Returns how many cores this process may keep busy: those of its affinity, limited by its cgroup's CPU quota (v1 or
    v2; whole cores). psutil knows the affinity, but not the quota."""
    cores = len(affinity())
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
                mount = root / "sys/fs/cgroup" / controllers
                group = mount / path.lstrip("/")
                for folder in (group, *group.parents):  # the quota of each level binds those below it
                    if folder.is_relative_to(mount) and (quota := _quota(folder)):
                        cores = min(cores, max(1, int(quota)))
    return cores


def _quota(cgroup: Path) -> float:
    """Returns how many cores a cgroup's CPU quota is worth, 0 for no quota."""
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no number
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
        return quota / period
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((cgroup / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return max(0, quota) / period  # -1 is no quota
    return 0.0


def busy_cores(seconds: float = 0.2) -> float:
    """Returns how many of the cores in this process's affinity other processes keep busy, seen over `seconds`; 0.0 where
    the system does not tell."""
    own, began = time.process_time(), time.perf_counter()
    try:
        shares = psutil.cpu_percent(seconds, percpu=True)
    except OSError:
        return 0.0
    own, passed = time.process_time() - own, time.perf_counter() - began
    mine = affinity()
    return max(0.0, sum(share for core, share in enumerate(shares) if core in mine) / 100 - own / passed)


def thread_advice(threads: int | None = None, root: Path = Path("/")) -> list[str]:
    """Returns what to change where `threads` (None: torch's) do not fit the cores that are free; empty when all is well.

    Samples the machine for 0.2 s. Less than half a core of others' work is ignored.
    """
    import torch

    threads = threads or torch.get_num_threads()
    every, cores, others = len(affinity()), usable_cores(root), busy_cores()
    advice = []
    if threads > cores:
        advice.append(f"{threads} CPU threads, but this process may use {cores} cores: pass --threads {cores}")
    shared = others >= BUSY and min(threads, cores) > round(every - others)
    if shared:
        advice.append(f"other processes keep {others:.1f} of {every} cores busy: times are longer until they are done")
    passive = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    if threads > 1 and (shared or threads > cores) and not passive:
        advice.append(
            "waiting CPU threads spin on cores that others need: set OMP_WAIT_POLICY=PASSIVE before Python starts, or "
            f"pass --threads {max(1, min(cores, int(every - others)))}"
        )
    return advice


def set_waiting_policy() -> None:
    """Lets OpenMP's threads wait passively after a spin, unless the user chose otherwise. Call it before torch is imported;
    later it has no effect.

    On shared cores, a thread that spins on keeps its partner from running. On idle cores, each of a step's 5,000 operations
    costs a wake-up where threads do not spin through the gaps between them. So the spin is long where the cores are idle now, as
    a look of 0.1 s finds, and no quota is shared, though not as long as OpenMP's own: other work can begin later
    (bench/waiting.py measures both).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "GOMP_SPINCOUNT" not in os.environ:  # the look takes time
        alone = usable_cores() == len(affinity()) and busy_cores(0.1) < BUSY
        os.environ["GOMP_SPINCOUNT"] = str(SPINS_ALONE if alone else SPINS_BESIDE_OTHERS)
