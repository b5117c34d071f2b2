"""The launchers to compile for every target, with shapes of an 8-billion model, and what their kernels must contain.

M tokens, K in, N out, R rank.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import aot_blocks
import aot_quantized
import aot_rows
import aot_segments
import torch
from aot import LIMITS, TENSOR_MEMORY, Launch, Resources, cache_root, compiling, resources

from plopfast.kernels import dispatch, triton_groups, triton_ops
from plopfast.kernels.launch import summing_both

SEED = 1 << 40  # seeds have 64 bits, which is another argument type than a small number's


@dataclass(frozen=True, kw_only=True)
class Expect:
    """What a kernel is meant to contain."""

    matrix: str = ""  # "any" matrix instruction, or the one of "large" tiles
    loads: bool = False  # most bytes are loaded 16 at a time, or by TMA
    stores: bool = False  # most bytes are stored as widely as the target's accumulators allow


@dataclass(frozen=True)
class Job:
    """`build(target)` calls launchers as shipped. `expect` is by the name of the kernel. A default run of the tests compiles for
    sm_90, but not what is `slow`: kernels like those of other jobs in another size or dtype."""

    build: Callable[[str], Any]
    expect: dict[str, Expect] = field(default_factory=dict)
    targets: tuple[str, ...] = tuple(LIMITS)
    slow: bool = False


@dataclass(frozen=True, kw_only=True)
class Built:
    """One kernel of a job, or the job's failure. `wrong` is empty if all is well."""

    job: str
    target: str
    launch: Launch | None = None
    resources: Resources | None = None
    wrong: list[str] = field(default_factory=list)


def operands(m: int = 8192, n: int = 4096, k: int = 4096, r: int = 16, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Tensors of one linear on meta, its adapters in float32 as they train."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return SimpleNamespace(
        x=empty(m, k), w=empty(n, k), s=empty(m, r), dy=empty(m, n), bias=empty(n),
        a=empty(r, k, dtype=torch.float32), b=empty(n, r, dtype=torch.float32),
    )  # fmt: skip


def _forward(target: str, tiles: dispatch.Tiles | None = None, norms: bool = True, **shape: Any) -> None:
    o = operands(**shape)
    triton_ops.gemm(o.x, o.w, o.s, o.b, o.bias, norms=norms, tiles=tiles)


def _grad_x(target: str, tiles: dispatch.Tiles | None = None, p: float = 0.0, **shape: Any) -> None:
    o = operands(**shape)
    triton_ops.gemm(o.dy, o.w.T, o.s, o.a.T, p=p, seed=SEED, tiles=tiles)


def _every_tile(target: str) -> None:
    for tiles in dispatch.GEMM_TILES[target]:
        _forward(target, tiles)
        _grad_x(target, tiles)
    _grad_x(target, p=0.1)


def _shrink(target: str, count: int = 1, p: float = 0.0, **shape: Any) -> None:
    o = operands(**shape)
    triton_ops.shrink_stacked(o.x, (o.a,) * count, 2.0, p, (SEED,) * 3)


def _low_rank(target: str, p: float = 0.0, **shape: Any) -> None:
    o = operands(**shape)
    triton_ops.low_rank(o.s, o.b, o.bias)
    triton_ops.low_rank(o.s, o.a.T, p=p, seed=SEED)


def _group(target: str, r: int) -> None:
    """Query, key and value of an 8-billion model: every L in one launch, and the sum of their terms of dX."""
    o = operands(r=3 * r)
    s, b = o.s.split(r, dim=1), [operands(n=n, r=r).b for n in (4096, 1024, 1024)]
    triton_groups.low_ranks(s, b, [None] * 3)
    for p in (0.0, 0.1):
        triton_groups.low_rank_sum([operands(r=r).s] * 3, [operands(r=r).a.T] * 3, p, (SEED,) * 3)


def _grads(target: str, p: float = 0.0, **shape: Any) -> None:
    o = operands(**shape)
    if o.s.shape[1] <= dispatch.MOST_DS_RANK:
        triton_ops.grad_s_and_b(o.dy, o.s, o.b, 2.0)
    triton_ops.grad_a(o.s, o.x, p, SEED, o.a.dtype)


def _seeds_in_memory(target: str) -> None:
    """What is masked, with seeds that a CUDA graph would draw."""
    o, seed = operands(), torch.empty((), dtype=torch.int64, device="meta")
    triton_ops.shrink_stacked(o.x, (o.a,) * 2, 2.0, 0.1, (seed,) * 2)
    triton_ops.low_rank(o.s, o.a.T, p=0.1, seed=seed)
    triton_groups.low_rank_sum([o.s] * 3, [o.a.T] * 3, 0.1, (seed,) * 3)
    triton_ops.grad_a(o.s, o.x, 0.1, seed, o.a.dtype)
    triton_ops.gemm(o.dy, o.w.T, o.s, o.a.T, p=0.1, seed=seed)


def _rank_256(target: str) -> None:
    _everything(target, r=256)


def _float32(target: str, **shape: Any) -> None:
    _everything(target, dtype=torch.float32, **shape)
    _low_rank(target, p=0.1, dtype=torch.float32, **shape)


def _tf32(function: Callable[..., None], **arguments: Any) -> Callable[[str], None]:
    """What runs where torch's own float32 products may take TF32."""

    def work(target: str) -> None:
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            function(target, **arguments)
        finally:
            matmul.fp32_precision = before

    return work


def _few_tokens(target: str) -> None:
    """dX with its mask, S from K in parts, dS by itself."""
    _grad_x(target, p=0.1, m=64)
    _shrink(target, m=64)
    triton_ops.shrink((o := operands()).dy, o.b.T, 2.0)


def _everything(target: str, **shape: Any) -> None:
    _forward(target, **shape)
    _grad_x(target, p=0.1, **shape)
    _shrink(target, p=0.1, **shape)
    _grads(target, p=0.1, **shape)


def launchers(m: int, p: float, seed: int, n: int = 512, k: int = 1024, r: int = 8) -> dict[str, Callable[[], Any]]:
    """What a step with `m` tokens may call, with pointers."""
    o, tiles = operands(m=m, n=n, k=k, r=r), dispatch.SAFE_TILES[0]
    return {
        "forward": lambda: triton_ops.gemm(o.x, o.w, o.s, o.b, o.bias, norms=True, tiles=tiles),
        "grad_x": lambda: triton_ops.gemm(o.dy, o.w.T, o.s, o.a.T, p=p, seed=seed, tiles=tiles),
        "shrink": lambda: triton_ops.shrink_stacked(o.x, (o.a,) * 3, 2.0, p, (seed,) * 3),
        "low_rank": lambda: triton_ops.low_rank(o.s, o.a.T, p=p, seed=seed),
        "grad_s_and_b": lambda: triton_ops.grad_s_and_b(o.dy, o.s, o.b, 2.0),
        "grad_a": lambda: triton_ops.grad_a(o.s, o.x, p, seed, o.a.dtype),
        "row_norms": lambda: triton_ops.row_norms(o.dy, o.bias),
        "two sums": lambda: _two_sums((m % 7 + 1, m, 3), (m % 5 + 1, m, 5)),
        **aot_blocks.launchers(m, p, seed, n, k, r),
        **aot_segments.launchers(m, n, k, r),
    }


def _two_sums(*shapes: tuple[int, ...]) -> None:
    one, other = (torch.empty(shape, dtype=torch.float32, device="meta") for shape in shapes)
    made = ((parts, tuple(shape), torch.bfloat16, 2.0) for parts, *shape in shapes)
    summing_both(one.device, *made)(one, other)


def _frozen_norms(target: str) -> None:
    triton_ops.frozen_norms((o := operands()).x, o.w)


def _scored(target: str) -> None:
    for m in (64, 8192):
        triton_ops.gemm((o := operands(m)).x, o.w, bias_N=o.bias, norms=True)


def _row_norms(target: str) -> None:
    triton_ops.row_norms((o := operands()).dy, o.bias)


def _of(function: Callable[..., None], **arguments: Any) -> Callable[[str], None]:
    return lambda target: function(target, **arguments)


_LARGE = {name: Expect(matrix="large", loads=True, stores=True) for name in ("lora_gemm", "lora_gemm_tma")}
_NORMS = {name: Expect(matrix="large", loads=True) for name in _LARGE}
_SMALL = {name: Expect(matrix="any") for name in ("lora_gemm", "lora_gemm_tma")}
_READ = {
    name: Expect(matrix="any", loads=True) for name in ("lora_shrink", "lora_grads", "segment_shrink", "segment_grads")
}
_SEGMENTS = {"segment_gemm": Expect(matrix="any", loads=True, stores=True)}
_MIXED = {"lora_shrink": Expect(matrix="any")}  # three A in float32 outweigh X's tile
_TF32 = {name: Expect(matrix="any") for name in ("lora_gemm", "lora_shrink", "lora_grads", "lora_expand")}
_NORM = {name: Expect(loads=True, stores=True) for name in ("rms_norm", "rms_norm_grad")}
_GATE = {name: Expect(loads=True, stores=True) for name in ("gate", "gate_grad")}
_NORM_SHRINK = {"rms_norm_shrink": Expect(matrix="any", loads=True, stores=True)}
_MIXED_NORM = {"rms_norm_shrink": Expect(matrix="any")}
_HAVE_TF32 = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
_ONE_OF_EACH = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950", "gfx1100")  # kind of matrix unit
_NOT_BY_DEFAULT = tuple(
    target for target in _ONE_OF_EACH if target != "sm_90"
)  # which every run of the tests compiles for
JOBS = {
    "gemm": Job(_every_tile, _LARGE),
    "gemm, rank 64": Job(_of(_forward, r=64), _LARGE, _ONE_OF_EACH, slow=True),
    "gemm, 64 tokens": Job(_of(_forward, m=64, norms=False), _SMALL),
    "64 tokens": Job(_few_tokens, _SMALL, _ONE_OF_EACH),
    "gemm, 1 token": Job(_of(_forward, m=1, norms=False), _SMALL),
    "gemm, odd": Job(_of(_forward, m=8191, n=4099, k=4099, r=5), _SMALL, _ONE_OF_EACH, slow=True),
    "float32": Job(_of(_everything, dtype=torch.float32), {}, (*_ONE_OF_EACH, "sm_86")),
    "tf32": Job(_tf32(_float32), _TF32, _HAVE_TF32),
    "tf32, rank 64": Job(_tf32(_float32, r=64), _TF32, _HAVE_TF32, slow=True),
    "tf32, odd": Job(_tf32(_float32, m=8191, n=4099, k=4099, r=5), _TF32, _HAVE_TF32, slow=True),
    "float16": Job(
        _of(_everything, dtype=torch.float16), _LARGE | _READ, ("sm_80", "sm_90", "gfx942", "gfx950"), slow=True
    ),
    "frozen norms": Job(_frozen_norms, _NORMS),
    "scored product": Job(_scored, _SMALL | {"lora_gemm_tma": _LARGE["lora_gemm_tma"]}, ("sm_80", "sm_100", "gfx942")),
    "shrink": Job(_shrink, _READ),
    "shrink, 3 with dropout": Job(_of(_shrink, count=3, p=0.1), _MIXED),
    "expand": Job(_of(_low_rank, p=0.1), {"lora_expand": Expect(matrix="any", stores=True)}),
    "group": Job(_of(_group, r=16), {"lora_expands": Expect(matrix="any", stores=True)}),
    "group, rank 64": Job(
        _of(_group, r=64), {"lora_expand_sum": Expect(matrix="any", stores=True)}, _ONE_OF_EACH, slow=True
    ),
    "grads": Job(_of(_grads, p=0.1), _READ),
    "grads, wide": Job(_of(_grads, m=16384, n=14336), _READ, ("sm_80", "sm_90", "sm_100", "sm_103", "gfx950")),
    "grads, rank 32": Job(_of(_grads, r=32, m=16384, n=14336), _READ, slow=True),
    "grads, rank 64": Job(_of(_grads, r=64, p=0.1), _READ, _ONE_OF_EACH, slow=True),
    "seeds in memory": Job(_seeds_in_memory, _LARGE, _ONE_OF_EACH, slow=True),
    "rank 256": Job(_rank_256, {}, ("sm_80", "sm_90", "gfx942", "gfx950"), slow=True),
    "segments": Job(aot_segments.experts, {"segment_gemm": _LARGE["lora_gemm"]} | _READ),
    "segments, few rows": Job(_of(aot_segments.experts, m=2048, r=8), _SEGMENTS, _ONE_OF_EACH),
    "segments, others": Job(aot_segments.others, {}, _NOT_BY_DEFAULT),
    "adapters": Job(aot_segments.many, _SEGMENTS | _READ),
    "adapters, few rows": Job(aot_segments.few_rows_of_many, {"segment_gemm": Expect(matrix="any")}, _ONE_OF_EACH),
    "adapters, others": Job(aot_segments.other_adapters, {}, _NOT_BY_DEFAULT),
    "tf32, segments": Job(
        _tf32(aot_segments.experts, dtype=torch.float32), {"segment_gemm": Expect(matrix="any")}, _HAVE_TF32, slow=True
    ),
    "row norms": Job(_row_norms, {"row_norms": Expect(loads=True)}),
    "norm": Job(aot_blocks.norm, _NORM),
    "norm, short and long": Job(aot_blocks.short_and_long_norms, _NORM, _NOT_BY_DEFAULT),
    "norm, float32": Job(_of(aot_blocks.norm, dtype=torch.float32, mode="wide"), _NORM, ("sm_80", "gfx942")),
    "norm, odd": Job(_of(aot_blocks.norm, m=8191, k=4099), {}, _NOT_BY_DEFAULT),
    "norm and shrink": Job(aot_blocks.norm_shrink, _NORM_SHRINK),
    "norm and shrink, 3 with dropout": Job(_of(aot_blocks.norm_shrink, count=3, p=0.1, mode="offset"), _MIXED_NORM),
    "norm and shrink, rank 64": Job(_of(aot_blocks.norm_shrink, r=64, count=2, p=0.1), _MIXED_NORM, _NOT_BY_DEFAULT),
    "norm and shrink, float32": Job(
        _of(aot_blocks.norm_shrink, r=64, p=0.1, dtype=torch.float32), {}, ("sm_80", "sm_100", "gfx942")
    ),
    "tf32, norm and shrink": Job(
        _tf32(aot_blocks.norm_shrink, count=2, p=0.1, dtype=torch.float32), _MIXED_NORM, _HAVE_TF32
    ),
    "gate": Job(_of(aot_blocks.gates, k=14336), _GATE),
    "gate, float16": Job(_of(aot_blocks.gates, k=14336, dtype=torch.float16), _GATE, ("sm_80", "gfx942")),
    "gate, float32": Job(_of(aot_blocks.gates, k=1536, dtype=torch.float32), _GATE, ("sm_80", "gfx942")),
    "gate, odd": Job(_of(aot_blocks.gates, m=8191, k=4099, acts=("silu",)), {}, _NOT_BY_DEFAULT),
    "rotary": Job(aot_rows.rotary, {"rotary": Expect(loads=True, stores=True)}),
    "rotary, others": Job(aot_rows.rotary_of_others, {}, _NOT_BY_DEFAULT),
    "cross-entropy": Job(aot_rows.cross_entropy, {"cross_entropy": Expect(loads=True, stores=True)}),
    "cross-entropy, others": Job(aot_rows.cross_entropy_of_others, {}, _NOT_BY_DEFAULT),
    "losses": Job(aot_rows.losses, {"cross_entropy": Expect(loads=True)}),
    "nf4": Job(aot_quantized.nf4_products, {"lora_gemm_nf4": Expect(matrix="any", stores=True)}),
    "nf4, others": Job(aot_quantized.nf4_products_of_others, {"lora_gemm_nf4": Expect(matrix="any")}, _NOT_BY_DEFAULT),
    "nf4, float32": Job(aot_quantized.nf4_products_in_float32, {"lora_gemm_nf4": Expect()}, _NOT_BY_DEFAULT),
    "nf4, decode": Job(aot_quantized.nf4_decodings, {"decode_nf4": Expect(stores=True)}),
    "scaled, decode": Job(aot_quantized.scaled_decodings, {"decode_scaled": Expect(stores=True)}),
    "odd decodings": Job(aot_quantized.odd_decodings, {}, _NOT_BY_DEFAULT),
}


def problems(found: Resources, target: str, expect: Expect) -> list[str]:
    """The reasons why a kernel cannot launch, or would not run as intended."""
    limits, count = LIMITS[target], found.instructions
    matrix = limits.matrix[:1] if expect.matrix == "large" else limits.matrix
    few_wide_loads = not count["tma load"] and _share(found.loads, 16) < 0.5
    few_wide_stores = not count["tma store"] and _share(found.stores, limits.wide_store) < 0.5
    checks = {
        f"shared memory: {found.shared} of {limits.shared_per_block} bytes": found.shared > limits.shared_per_block,
        f"tensor memory: {found.tensor_memory} of {TENSOR_MEMORY} columns": found.tensor_memory > TENSOR_MEMORY,
        f"no block fits one sm, for its {found.occupancy[1]}": not found.occupancy[0],
        f"spills: {found.spills} {'bytes' if limits.gpu.backend == 'cuda' else 'registers'}": found.spills,
        f"stack: {found.stack} bytes": found.stack,
        "nothing is stored: a stub": not (found.stores or count["tma store"] or count["atomic"]),
        "wgmma serialized": found.serialized,
        f"no {' or '.join(matrix)}": expect.matrix and not any(count[name] for name in matrix),
        f"narrow loads, {{bytes: count}} {found.loads}": expect.loads and few_wide_loads,
        f"narrow stores, {{bytes: count}} {found.stores}": expect.stores and few_wide_stores,
    }
    return [text for text, wrong in checks.items() if wrong]


def _share(counts: dict[int, int], width: int) -> float:
    """The share of the bytes that moves at least `width` at a time."""
    moved = {size: size * count for size, count in counts.items()}
    return sum(moved[size] for size in moved if size >= width) / max(sum(moved.values()), 1)


def build(job: str, target: str) -> list[Built]:
    """Every kernel that the job launches on the target."""
    failed = []
    with compiling(target) as launches:
        try:
            JOBS[job].build(target)
        except Exception as error:  # the compiler raises whatever it likes; the other jobs go on
            failed = [Built(job=job, target=target, wrong=[f"{type(error).__name__}: {error}"])]
    built = []
    for launch in launches:
        found = resources(launch)
        wrong = problems(found, target, JOBS[job].expect.get(launch.kernel, Expect()))
        # what Triton made stays in the process that made it; constants may hold its types
        carried = replace(launch, compiled=None, constants={name: str(v) for name, v in launch.constants.items()})
        built.append(Built(job=job, target=target, launch=carried, resources=found, wrong=wrong))
    return built + failed


def _use_cache(root: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = root


def build_all(pairs: Iterable[tuple[str, str]], processes: int = 2) -> list[Built]:
    """Builds (job, target) pairs in worker processes: Triton holds the interpreter lock while it compiles."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(processes, context, _use_cache, (cache_root(),)) as workers:
        pending = [(pair, workers.submit(build, *pair)) for pair in pairs]
        built = []
        for (job, target), future in pending:
            try:
                built += future.result()
            except BrokenExecutor:
                built.append(Built(job=job, target=target, wrong=["a compiler's process died, here or in another job"]))
        return built


def is_slow(job: str, target: str) -> bool:
    return target != "sm_90" or JOBS[job].slow


def every_pair() -> list[tuple[str, str]]:
    return [(name, target) for target in LIMITS for name, job in JOBS.items() if target in job.targets]
