"""Ahead-of-time compilation: launchers compile their kernels for a GPU that is not here, and the result is read back.

    with compiling("sm_90") as launches:
        triton_ops.shrink(torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"), ...)
    resources(launches[0]).registers

Every `kernel[grid](...)` compiles instead of running. Its arguments are specialised as in a real launch (divisibility by
16, the value 1, descriptors), so what is checked is what is shipped. Tensors may be on `meta`, where their address, 0,
counts as aligned, or on the CPU, where a view can be misaligned on purpose.
"""

import contextlib
import functools
import io
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from plopfast.kernels.launch import forget_plans


@dataclass(frozen=True)
class Limits:
    """What a GPU offers. "sm" is a streaming multiprocessor, a compute unit (CDNA) or a work-group processor (RDNA)."""

    gpu: GPUTarget
    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int
    matrix: tuple[str, ...]  # what a 16-bit `tl.dot` becomes, in large tiles first
    wide_store: int  # bytes one thread can store at once from the layout of an accumulator


LIMITS = {
    "sm_80": Limits(GPUTarget("cuda", 80, 32), 166912, 167936, 64, 32, ("mma.sync",), 16),
    "sm_86": Limits(GPUTarget("cuda", 86, 32), 101376, 102400, 48, 16, ("mma.sync",), 16),
    "sm_89": Limits(GPUTarget("cuda", 89, 32), 101376, 102400, 48, 24, ("mma.sync",), 16),
    "sm_90": Limits(GPUTarget("cuda", 90, 32), 232448, 233472, 64, 32, ("wgmma", "mma.sync"), 16),
    "sm_100": Limits(GPUTarget("cuda", 100, 32), 232448, 233472, 64, 32, ("tcgen05.mma", "mma.sync"), 16),
    "sm_103": Limits(GPUTarget("cuda", 103, 32), 232448, 233472, 64, 32, ("tcgen05.mma", "mma.sync"), 16),
    "sm_120": Limits(GPUTarget("cuda", 120, 32), 101376, 102400, 48, 24, ("mma.sync",), 16),
    "gfx90a": Limits(GPUTarget("hip", "gfx90a", 64), 65536, 65536, 32, 16, ("mfma",), 8),
    "gfx942": Limits(GPUTarget("hip", "gfx942", 64), 65536, 65536, 32, 16, ("mfma",), 8),
    "gfx950": Limits(GPUTarget("hip", "gfx950", 64), 163840, 163840, 32, 16, ("mfma",), 8),
    "gfx1100": Limits(GPUTarget("hip", "gfx1100", 32), 65536, 131072, 64, 32, ("wmma",), 2),
}
TENSOR_MEMORY = 512  # columns; above it Triton emits a stub that traps

INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "mma.sync": r"\bmma\.sync",
    "mfma": r"\bv_mfma_",
    "wmma": r"\bv_wmma_",
    "cp.async": r"\bcp\.async\.c[ag]",
    "tma load": r"\bcp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global",
    "tma store": r"\bcp\.(?:reduce\.)?async\.bulk\.tensor\.\dd\.global",
    "fma": r"\bfma\.|\bv_(?:pk_|dual_)?fma(?:c|ak|mk)?_f32",  # not a product that is rounded to 16 bits at once
    "atomic": r"\b(?:red|atom)\.|\b(?:global|buffer|flat)_atomic_",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch that became a compilation."""

    target: str
    kernel: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    stream_reads: int
    compile_s: float
    compiled: Any  # triton's CompiledKernel
    ptxas: str  # what `ptxas -v` said


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Static figures of one kernel."""

    registers: int  # accumulation registers included
    accumulation: int
    spills: int  # bytes on NVIDIA, registers on AMD
    stack: int
    shared: int  # static and given at launch
    tensor_memory: int
    occupancy: tuple[int, str]  # blocks resident on one sm, and what ends their number
    instructions: dict[str, int]
    loads: dict[int, int]  # bytes at once: how often; into registers and by asynchronous copy, TMA apart
    copies: dict[int, int]  # the asynchronous ones among them
    stores: dict[int, int]
    serialized: bool  # ptxas gave up on overlapping wgmma


_temporary = functools.cache(tempfile.TemporaryDirectory)


def cache_root() -> str:
    """No result comes from an earlier run, unless TRITON_CACHE_DIR asks for it."""
    return os.environ.get("TRITON_CACHE_DIR") or _temporary(prefix="aot-").name


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Launch]]:
    """Kernel launches become compilations for `target`, recorded in the list this gives."""
    assert not knobs.runtime.interpret and isinstance(tl.cdiv, JITFunction), (
        "TRITON_INTERPRET is set, or was when triton was imported: compile in a process without it"
    )
    launches: list[Launch] = []
    stream_reads: list[Any] = []
    run, real = JITFunction.run, driver._active
    absent = SimpleNamespace(  # as much of a driver as a launch touches before it runs
        get_current_device=lambda: target,  # the key of Triton's caches in memory: no GPU gets another's kernel
        get_current_stream=stream_reads.append,
        get_current_target=lambda: LIMITS[target].gpu,
    )

    def compile_instead(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        bound = kernel.signature.bind(*args, **{name: kwargs[name] for name in kwargs if name in kernel.arg_names})
        bound.apply_defaults()
        grid = tuple(grid(bound.arguments) if callable(grid) else grid)
        assert max(grid[1:], default=1) <= 65535, f"{kernel.fn.__name__}: y and z of a grid end at 65535, got {grid}"
        stream_reads.clear()
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        launches.append(
            Launch(
                target=target,
                kernel=kernel.fn.__name__,
                constants={p.name: bound.arguments[p.name] for p in kernel.params if p.is_constexpr},
                num_warps=compiled.metadata.num_warps,
                num_stages=compiled.metadata.num_stages,
                grid=grid,
                stream_reads=len(stream_reads),
                compile_s=time.perf_counter() - began,
                compiled=compiled,
                ptxas=_kept(compiled, said.getvalue()) if "cubin" in compiled.asm else "",
            )
        )
        return compiled

    with knobs.cache.scope(), knobs.nvidia.scope(), knobs.language.scope():
        # a folder of our own, where every binary has ptxas's words beside it
        knobs.cache.dir = str(Path(cache_root()) / f"aot-{triton.__version__}")
        knobs.nvidia.dump_ptxas_log = True  # Triton runs `ptxas -v` itself; asking again would double its time
        knobs.language.default_fp_fusion = True  # Triton 3.10 changes the default
        driver.set_active(absent)
        JITFunction.run = compile_instead
        forget_plans()  # they hold what is made for another target
        try:
            with mock.patch.dict(os.environ, {"PLOPFAST_LAUNCH": "plain"}):
                yield launches
        finally:
            forget_plans()
            JITFunction.run = run
            driver._active = real  # reset_active() would look for a GPU


def _kept(compiled: Any, said: str) -> str:
    """ptxas's words, kept beside the binary because a kernel from the cache comes without them."""
    path = next(Path(p) for name, p in compiled.metadata_group.items() if name.endswith(".cubin")).with_suffix(".ptxas")
    if "ptxas" in said:
        path.write_text(said)
    return path.read_text()


def resources(launch: Launch) -> Resources:
    """Registers, memory, occupancy and instructions of a compiled launch."""
    asm, metadata, limits = launch.compiled.asm, launch.compiled.metadata, LIMITS[launch.target]
    text, said = asm.get("ptx") or asm["amdgcn"], launch.ptxas

    def total(*patterns: str) -> int:
        return sum(int(number) for pattern in patterns for number in re.findall(pattern, said or text))

    def widths(pattern: str) -> Counter[int]:
        return Counter(map(_width, re.findall(pattern, text)))

    copies = Counter(int(n, 0) for n in re.findall(r"\bcp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (\w+)", text))
    registers = total(r"Used (\d+) registers", r"\.vgpr_count: +(\d+)")
    shared = metadata.shared + total(r"(\d+) bytes smem", r"\.group_segment_fixed_size: +(\d+)")
    tensor_memory = getattr(metadata, "tmem_size", 0) or 0
    return Resources(
        registers=registers,
        accumulation=total(r"\.agpr_count: +(\d+)"),
        spills=total(r"(\d+) bytes spill", r"\.vgpr_spill_count: +(\d+)"),
        stack=total(r"(\d+) bytes stack", r"\.private_segment_fixed_size: +(\d+)"),
        shared=shared,
        tensor_memory=tensor_memory,
        occupancy=_occupancy(limits, launch.num_warps, registers, shared, tensor_memory),
        instructions={name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()},
        loads=dict(widths(r"\bld\.[\w.:]*global[\w.:]*|\b(?:global|buffer|flat)_load_\w+") + copies),
        copies=dict(copies),
        stores=dict(widths(r"\bst\.[\w.:]*global[\w.:]*|\b(?:global|buffer|flat)_store_\w+")),
        serialized="wgmma.mma_async instructions are serialized" in said,
    )


def _width(name: str) -> int:
    """Bytes of ld.global.v4.b32, buffer_load_dwordx4, buffer_store_b128, buffer_load_ushort, ..."""
    if found := re.search(r"(?:\.v(\d))?[._di]*[bfisu](\d+)$", name):
        return int(found[1] or 1) * int(found[2]) // 8
    if found := re.search(r"dword(?:x(\d))?$", name):
        return int(found[1] or 1) * 4
    return 2 if "short" in name else 1


def _occupancy(limits: Limits, warps: int, registers: int, shared: int, tensor_memory: int) -> tuple[int, str]:
    by = {"warps": limits.warps_per_sm // warps, "blocks": limits.blocks_per_sm}
    if limits.gpu.backend == "cuda":
        granted = -(-max(registers, 1) * 32 // 256) * 256  # a warp; it lives in one of 4 partitions of 16384
        by["registers"] = 16384 // granted * 4 // warps
        by["shared memory"] = limits.shared_per_sm // (-(-(shared + 1024) // 128) * 128)
        by["tensor memory"] = TENSOR_MEMORY // max(tensor_memory, 1)
    else:
        lane, granule, most = (512, 8, 8) if limits.gpu.warp_size == 64 else (1536, 24, 16)  # in each of 4 SIMDs
        by["registers"] = min(lane // (-(-max(registers, 1) // granule) * granule), most) * 4 // warps
        by["shared memory"] = limits.shared_per_sm // max(shared, 1)
    limiter = min(by, key=by.__getitem__)
    return by[limiter], limiter
