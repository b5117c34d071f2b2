"""Chooses the path of a LoRA linear: backend, strategy and tiles, and says why. Nothing is tuned while training.

Two exact strategies compete on a GPU. `fused` (lora_gemm) beats `lora-first` (lora_expand, then the vendor's GEMM) only
if Triton's GEMM reaches 0.94 to 0.98 of the vendor's speed; the limit depends on shape and card (bytes saved against
FLOPs). Plain torch has no launches but the vendor's. So the choice rests on a measurement on the user's own card: rows of
`TABLE`, made by `plopfast bench --tune`. Without a row the default is plain torch, which was the fastest of the three on an
H100 for all shapes tried (docs/gpu.md). With dropout it is lora-first, because plain torch would make the mask in memory.

M tokens, K in, N out, R rank.
"""

import functools
import importlib.util
import math
import os
from dataclasses import dataclass

import torch

VERSION = 1  # of kernels and tiles; rows measured under another version are ignored
BACKENDS = ("auto", "torch", "triton", "fused", "lora-first")
STRATEGIES = ("fused", "lora-first")  # of the Triton backend
CHOICES = (*STRATEGIES, "torch")  # of a measured row
NEAR = 2  # doublings of the number of tokens over which a measured row counts
MAX_RANK = 256
# of a product that gives norms too: on an H200 lora_gemm took 1.04 of the vendor's time at 7e10 and more, 2.6 to 3.3 at 1e10
EPILOGUE_FLOPS = 5e10
MOST_DS_RANK = 32  # of lora_grads; above it two products of the vendor's took 0.6 to 1.0 of its time on an H200
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class UnsupportedError(RuntimeError):
    """A backend cannot run here; the message says why."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of lora_gemm. `descriptor` means the TMA version."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    descriptor: bool = False
    group: int = 8

    def __str__(self) -> str:
        kind = "TMA" if self.descriptor else "pointer"
        return f"{kind} {self.bm}x{self.bn}x{self.bk}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for: "sm_90", "gfx942", ... or "interpreter"; `units`: SMs or compute units."""

    name: str
    units: int
    gpu: str = ""


@dataclass(frozen=True)
class Plan:
    """The path of one linear: backend torch or triton, strategy, the tiles of lora_gemm, and why."""

    backend: str
    strategy: str
    tiles: Tiles | None
    why: str
    expand: tuple[int, int] | None = None  # lora_expand's tile

    def __str__(self) -> str:
        tiles = ", expand {}x{} and the vendor's GEMM".format(*self.expand) if self.expand else ""
        if self.strategy == "fused":
            tiles = f", {self.tiles}"
        return f"{self.backend}, {self.strategy}{tiles} ({self.why})"


# by target, the tiles that `plopfast bench --tune` tries for many tokens, the default first; all compile without spills
_WIDE = (Tiles(128, 128, 32, 4, 4), Tiles(128, 128, 64, 8, 3))
_NARROW = (Tiles(128, 128, 32, 4, 3), Tiles(128, 128, 32, 8, 3))  # 99 KiB of shared memory
_AMD = (Tiles(128, 128, 32, 8, 2), Tiles(64, 128, 32, 4, 2))  # 64 KiB
_AMD_WIDE = (*_AMD, Tiles(128, 128, 64, 8, 3))  # 160 KiB
_HOPPER = (Tiles(128, 256, 64, 8, 4, descriptor=True),)  # pointers and 8 warps: ptxas may serialise wgmma
GEMM_TILES: dict[str, tuple[Tiles, ...]] = {
    "sm_80": _WIDE, "sm_86": _NARROW, "sm_89": _NARROW, "sm_90": _HOPPER, "sm_100": _HOPPER, "sm_103": _HOPPER,
    "sm_120": _NARROW[1:], "gfx90a": _AMD, "gfx942": _AMD, "gfx950": _AMD_WIDE, "gfx1100": _AMD,
    "interpreter": (Tiles(32, 32, 32, 4, 1), Tiles(32, 32, 32, 4, 1, descriptor=True)),
}  # fmt: skip
SAFE_TILES = (Tiles(64, 64, 32, 4, 2),)  # 16 KiB in 16-bit types: fits every GPU, known or not
MANY_ROWS = 128  # of a segment; fewer would leave half of a tile of 128 rows empty
FLOAT32_TILES = Tiles(64, 64, 16, 4, 2)  # no matrix instruction in full float32, so registers bound the tile

TABLE: dict[
    str, tuple[str, Tiles]
] = {}  # `key` -> the fastest of CHOICES on that card, and the best tiles of lora_gemm


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (TRITON_INTERPRET=1), as tests do."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve(device: torch.device, backend: str = "auto") -> str:
    """Turns "auto" into "torch" or "triton", and checks any other name. Raises UnsupportedError with the reason."""
    if backend == "torch":
        return backend
    reason = cannot_run(device)
    if backend == "auto":
        return "torch" if reason or interpreting() else "triton"
    if backend not in BACKENDS:
        raise UnsupportedError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if reason:
        raise UnsupportedError(f"backend {backend!r} cannot run on {device}: {reason}")
    return backend


@functools.lru_cache
def cannot_run(device: torch.device) -> str:
    """The reason why Triton kernels cannot run on this device, or the empty string."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it exists for Linux only)"
    if device.type == "meta" or (device.type == "cpu" and interpreting()):
        return ""
    if device.type != "cuda":
        return "Triton needs an NVIDIA GPU from compute capability 8.0 on, or an AMD GPU from gfx90a on"
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}; 8.0 is the lowest"
    if torch.version.hip is not None:
        name = str(torch.cuda.get_device_properties(device).gcnArchName)
        if not name.startswith(("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")):
            return f"{name} has no matrix instructions that Triton uses; gfx90a is the lowest"
    try:
        target_of(device)
    except Exception as error:  # each driver has its own way to say that it does not start
        return f"Triton's driver does not start: {type(error).__name__}: {error}"
    return ""


def target_of(device: torch.device) -> Target:
    """The target of kernels on `device`. The meta device stands for the GPU of Triton's active driver."""
    if device.type == "cpu":
        return Target("interpreter", 4)
    if device.type == "meta":
        return _driver_target()
    return _gpu_target(torch.cuda.current_device() if device.index is None else device.index)


def _driver_target(units: int = 132, gpu: str = "") -> Target:
    from triton.runtime import driver

    found = driver.active.get_current_target()
    return Target(f"sm_{found.arch}" if found.backend == "cuda" else str(found.arch).split(":")[0], units, gpu)


@functools.lru_cache
def _gpu_target(index: int) -> Target:
    with torch.cuda.device(index):
        return _driver_target(
            torch.cuda.get_device_properties(index).multi_processor_count, torch.cuda.get_device_name(index)
        )


def runs_kernels(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> bool:
    """Whether the kernels that have no rival (norms) take this. Raises UnsupportedError if `backend` cannot run."""
    if resolve(device, backend) == "torch":
        return False
    if dtype not in DTYPES and backend != "auto":
        raise UnsupportedError(f"backend {backend!r}: {dtype} has no Triton kernels; choose 'torch', or 'auto'")
    return dtype in DTYPES


def candidates(target: Target, dtype: torch.dtype, aligned: bool = True) -> tuple[Tiles, ...]:
    """The tiles of lora_gemm, the default first. `aligned`: TMA descriptors can hold the operands."""
    if dtype == torch.float32:
        return (FLOAT32_TILES,)
    every = GEMM_TILES.get(target.name, SAFE_TILES)
    return tuple(tiles for tiles in every if aligned or not tiles.descriptor) or SAFE_TILES


def unaligned(target: Target) -> Tiles:
    """Tiles for operands whose rows don't start at multiples of 16 elements, which no pipeline of copies takes."""
    return GEMM_TILES["interpreter"][0] if target.name == "interpreter" else SAFE_TILES[0]


def segment_tiles(target: Target, dtype: torch.dtype, rows: int) -> Tiles:
    """The tiles of segment_gemm for segments of `rows` rows on average; none is TMA's, whose descriptors know no segments."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    if rows < MANY_ROWS or target.name not in GEMM_TILES or target.name == "interpreter":
        return unaligned(target)
    return Tiles(128, 128, 64 if target.name.startswith("sm_") else 32, 8, 3)


def key(target: Target, dtype: torch.dtype, m: int, n: int, k: int, rank: int) -> str:
    """The key of a shape in TABLE. Tokens and rank count as the next power of two."""
    return f"{target.gpu or target.name} {str(dtype).removeprefix('torch.')} M{_up(m)} N{n} K{k} R{_up(rank)}"


def _up(value: int) -> int:
    return 1 << max(4, math.ceil(math.log2(max(value, 1))))


@functools.lru_cache(maxsize=4096)
def plan(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int, rank: int, backend: str = "auto",
         aligned: bool = True, drop: bool = False) -> Plan:  # fmt: skip
    """The path of a linear of this shape, with dropout if `drop`. Raises UnsupportedError if `backend` cannot run."""
    chosen = resolve(device, backend)
    if chosen == "torch":
        return Plan(
            "torch", "lora-first", None, "chosen" if backend == "torch" else cannot_run(device) or "interpreter"
        )
    beyond = f"rank {rank} is above {MAX_RANK}" if rank > MAX_RANK else f"{dtype} has no Triton kernels"
    if rank > MAX_RANK or dtype not in DTYPES:
        if backend == "auto":
            return Plan("torch", "lora-first", None, beyond)
        raise UnsupportedError(f"backend {backend!r}: {beyond}; choose 'torch', or 'auto'")
    target = target_of(device)
    tiles, expand = candidates(target, dtype, aligned)[0], expand_tiles(dtype)
    row = measured(target, dtype, m, n, k, rank)
    if row and (aligned or not row[1].descriptor):
        tiles = row[1]
    if chosen in STRATEGIES:
        return Plan("triton", chosen, tiles, "chosen", expand)
    if row and row[0] in STRATEGIES:
        return Plan("triton", row[0], tiles, "measured on this GPU", expand)
    if backend == "auto" and not drop:
        return Plan(
            "torch", "lora-first", None, "measured on this GPU" if row else "default: not measured for this shape"
        )
    known = "" if target.name in GEMM_TILES else f"; {target.name} is unknown: safe tiles"
    why = "dropout makes no mask" if drop and backend == "auto" else "default: not measured for this shape"
    return Plan("triton", "lora-first", tiles, f"{why}{known}", expand)


def measured(target: Target, dtype: torch.dtype, m: int, n: int, k: int, rank: int) -> tuple[str, Tiles] | None:
    """The measured row of this shape, or of the nearest number of tokens that was measured: four times more or fewer at most,
    because a row for 512 tokens says nothing about one."""
    at = _up(m)
    for step in range(NEAR + 1):
        for tokens in (at << step, at >> step):
            if row := TABLE.get(key(target, dtype, tokens, n, k, rank)):
                return row
    return None


def expand_tiles(dtype: torch.dtype) -> tuple[int, int]:
    return (32, 64) if dtype == torch.float32 else (64, 128)


def use_table(rows: dict[str, tuple[str, Tiles]]) -> None:
    """Replaces the measured rows in force; `plopfast bench --tune` makes them."""
    TABLE.clear()
    TABLE.update(rows)
    plan.cache_clear()
