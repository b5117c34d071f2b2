"""What a figure was measured on: versions, commit, processor, threads; and how torchrun started this process."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .secrets import masked
from .threads import usable_cores

# of oneDNN's levels
WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
PACKAGES = ("plopfast", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "peft")


class Launch(NamedTuple):
    """This process's rank, its rank on this machine, and the number of processes."""

    rank: int
    local_rank: int
    size: int


def launch() -> Launch:
    """Returns what torchrun set; without torchrun, one process of rank 0."""
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:  # schedulers set some of them for their own use
        return Launch(0, 0, 1)
    return Launch(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))


def command() -> str:
    """Returns the command line of this process, with secrets masked."""
    return masked(["plopfast", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """Returns the checkout's commit, or None where plopfast runs from an installation."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def describe() -> str:
    """Describes processor, cores, threads and the OpenMP wait policy in force, on one line."""
    import torch

    models = (line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name"))
    name = next(models, platform.processor() or platform.machine())
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    policy = os.environ.get("OMP_WAIT_POLICY", "default")
    return f"{name}, {usable_cores()} cores, {torch.get_num_threads()} threads (OMP_WAIT_POLICY {policy}), {platform.system()}"


def has_bfloat16() -> bool:
    """Returns whether oneDNN, by which torch multiplies, has instructions of this CPU for bfloat16 (AVX-512 BF16 or AMX) and may
    use them (its variable ONEDNN_MAX_CPU_ISA)."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BFLOAT16:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpuinfo().split())


def _cpuinfo() -> str:
    """Returns what Linux says about the processor, "" elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""
