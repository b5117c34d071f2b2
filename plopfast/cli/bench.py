"""`plopfast bench`: times the kernels, a LoRA linear and a whole layer on this GPU. `--tune`: picks strategy and tiles.

Before a case is timed, every variant's outputs and gradients are compared with float64: one that errs more than twice
as far as plain torch ends the run without a result. Variants are interleaved in a rotating order, the caches flushed
before each call. Times are the GPU's own events; the host enqueues while the flush runs, so that launching counts only
as far as it takes longer. A dry run goes the same way on the CPU in seconds; its rows say so, and mean nothing.

M tokens, K in, N out, R rank. Variants: fused and lora-first (kernels/dispatch.py), torch (lora-first in plain torch),
peft (its own layer with the same adapters in the base's dtype, its fastest way), frozen (the GEMM or layer alone).
"""

import copy
import datetime
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels import dispatch, reference
from ..lora import tuning
from ..lora.layer import LoRALinear, replace_module
from ..models.frozen import frozen_of
from ..support import files, machine
from ..support.errors import BackendError, ConfigError
from ..support.progress import bar

MODELS = {"llama-8b": (4096, 14336, 32, 8), "smollm2": (576, 1536, 9, 3)}  # hidden, MLP, heads, key-value heads
TINY = {"tiny": (64, 96, 4, 2)}  # of a dry run
TUNE_TOKENS, TUNE_RANKS = (512, 1024, 2048, 4096, 8192), (16, 32, 64)
C = 2.0  # alpha / rank
FLUSH_MIB = 512  # more than any L2 holds, and than MI300's 256 MiB Infinity Cache
WARM, LEAST = 2, 3  # unmeasured rounds; repeats that even a spent budget gets
SEQUENCE, CHECKED = 2048, 256  # tokens of a layer's sequences, and those of the first one that are checked
UNITS = {"tflops": "TFLOP/s", "gbytes_per_s": "GB/s", "peak_mib": "MiB at its peak"}
Shapes = str | Sequence[tuple[int, int]]
Calls = Mapping[str, Callable[[], Any]]  # by variant
NONE: Calls = {}


class Case(NamedTuple):
    kind: str  # "linear", "layer" or "ops"
    label: str
    m: int
    n: int
    k: int
    rank: int

    def __str__(self) -> str:
        return f"{self.label} {self.m}x{self.k}->{self.n} R{self.rank}"


def run(
    out: Path, *, shapes: Shapes = "all", dtype: str = "bfloat16", repeats: int = 30, budget_s: float = 540.0,
    dry: bool = False, overwrite: bool = False, progress: bool = False,
) -> tuple[list[dict[str, Any]], str]:  # fmt: skip
    """Times every case; writes out/bench.jsonl (a row for each op and variant) and out/bench.png; returns rows, text.

    `shapes`: "llama-8b", "smollm2", "all" or pairs (in, out); a dry run has its own tiny ones. Once `budget_s` seconds
    are spent, repeats and then cases are left out, and the text says which. Raises BackendError where there is no GPU
    (unless `dry`) or a variant is wrong, before anything is written; ConfigError and FileError for impossible settings.
    """
    files.refuse_existing(out / "bench.jsonl", overwrite)
    bench = _Bench(dtype, repeats, dry)
    bench.note("" if dry else tuning.load())
    bench.each(bench.measure, _cases(shapes, dry), budget_s, progress)
    few = sum(row["repeats"] < bench.repeats for row in bench.rows)
    bench.note(f"{few} rows have fewer than {bench.repeats} repeats, for want of time" if few else "")
    files.write_text(out / "bench.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in bench.rows))
    bench.note(f"written: {out / 'bench.jsonl'}")
    if not importlib.util.find_spec("matplotlib"):
        bench.note("no plot: matplotlib is not installed (pip install 'plopfast[report]')")
    elif steps := [row for row in bench.rows if row["op"].endswith("step")]:
        with files.replacing(out / "bench.png") as scratch:
            _plot(steps, bench.lines[0]).savefig(scratch, dpi=120)
        bench.note(f"written: {out / 'bench.png'}")
    return bench.rows, "\n".join(bench.lines)


def tune(
    *, shapes: Shapes = "all", tokens: Sequence[int] = TUNE_TOKENS, ranks: Sequence[int] = TUNE_RANKS,
    dtype: str = "bfloat16", repeats: int = 20, budget_s: float = 540.0, dry: bool = False, path: Path | None = None,
    progress: bool = False,
) -> tuple[dict[str, dict[str, Any]], str]:  # fmt: skip
    """Times a training step of each linear, lora-first and fused with every candidate tiling, and stores the faster.

    `shapes` as in `run`: pairs are (in, out), such as a model's linears have. `tokens` and `ranks` stand for their
    buckets (dispatch.key). Rows go to tuning.save(path) and are put in force; a dry run writes only where `path` is
    given. Returns rows and text. Raises as `run` does.
    """
    bench = _Bench(dtype, repeats, dry)
    if not dry and not bench.kernels:
        raise BackendError(f"nothing to tune: {dispatch.cannot_run(bench.device)}")
    sides = dict.fromkeys((case.n, case.k) for case in _cases(shapes, dry))
    points = product(sides, [32] if dry else tokens, [4] if dry else ranks)
    cases = [Case("linear", "tune", m, n, k, rank) for (n, k), m, rank in points]
    before, rows = dict(dispatch.TABLE), {}
    try:
        bench.each(lambda case, left_s: rows.update(bench.tune(case, left_s)), cases, budget_s, progress)
    finally:
        dispatch.use_table(before)
    bench.note(f"written: {tuning.save(rows, path)}" if path or not dry else "")
    bench.note("" if dry else tuning.load(path))
    return rows, "\n".join(bench.lines)


def _cases(shapes: Shapes, dry: bool) -> list[Case]:
    many, few, rank = (48, 32, 4) if dry else (8192, 512, 16)
    if not dry and not isinstance(shapes, str):
        return [Case(kind, "pair", many, n, k, rank) for kind in ("linear", "ops") for k, n in shapes]
    if not dry and shapes not in ("all", *MODELS):
        raise ConfigError(f"shapes: expected {', '.join(MODELS)}, all or pairs (in, out), got {shapes!r}")
    cases = []
    for model, (h, mlp, heads, kv) in (TINY if dry else MODELS).items():
        if dry or shapes in (model, "all"):
            sides = {"q/o": (h, h), "k/v": (h // heads * kv, h), "gate/up": (mlp, h), "down": (h, mlp)}
            linears = [Case("linear", f"{model} {name}", many, n, k, rank) for name, (n, k) in sides.items()]
            cases += [*linears, linears[0]._replace(m=few), linears[0]._replace(rank=4 * rank)]
            if importlib.util.find_spec("transformers"):
                cases.append(Case("layer", f"{model} layer", many, h, h, rank))
            cases += [case._replace(kind="ops") for case in linears]
    return cases


def _ops(x, dy, w, a, b, s, ds, kernels: Any = None) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Plain torch and Triton for each op; plain in float64 is the specification, in the usual dtype the yardstick."""
    return {
        "shrink": (lambda: C * (x @ a.to(x.dtype).T), lambda: kernels.shrink(x, a, C)),
        "expand": (lambda: s @ b.to(s.dtype).T, lambda: kernels.low_rank(s, b)),
        "grads dS+dB": (lambda: (C * (dy @ b.to(s.dtype)), dy.T @ s), lambda: kernels.grad_s_and_b(dy, s, b, C)),
        "grad dA": (lambda: ds.T @ x, lambda: kernels.grad_a(ds, x, 0.0, 0, a.dtype)),
        "row norms": (lambda: dy.norm(dim=1), lambda: kernels.row_norms(dy)),
        "gemm": (lambda: x @ w.T, lambda: kernels.gemm(x, w)[0]),
        "gemm + low rank": (lambda: (s @ b.to(s.dtype).T).addmm_(x, w.T), lambda: kernels.gemm(x, w, s, b)[0]),
    }


class _Plain(LoRALinear):
    """What one writes without a library, the yardstick; for float64 inputs the specification."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, a, b = self.frozen.weight_NK, self.lora_A, self.lora_B
        if x.dtype == torch.float64:
            return reference.lora_linear(x.flatten(0, -2), w, a, b, C).unflatten(0, x.shape[:-1])
        return x @ w.T + C * (x @ a.to(x.dtype).T @ b.to(x.dtype).T)


class _Layer(nn.Module):
    """transformers' Llama layer: attention through SDPA, rotary positions, seven linears. x [rows, tokens, hidden]."""

    def __init__(self, hidden: int, mlp: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        from transformers.models.llama import modeling_llama as llama

        config = llama.LlamaConfig(
            hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )  # fmt: skip
        self.layer = llama.LlamaDecoderLayer(config, 0)
        rotary = llama.LlamaRotaryEmbedding(config)
        self.angles = nn.Buffer(torch.stack(rotary(torch.empty(1), torch.arange(SEQUENCE)[None])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, position_embeddings=tuple(self.angles[:, :, : x.shape[1]]))


def _adapted(base: nn.Module, kind: type[LoRALinear] | str, rank: int, backend: str = "torch") -> nn.Module:
    """`base` with adapters on every linear, its weights shared; `kind` "peft" is PEFT's, in the base's dtype.

    All have the same A and B, whatever order a library makes them in; bfloat16 holds them exactly, and so every dtype.
    """
    root = nn.Sequential(copy.deepcopy(base, {id(p): p for p in base.parameters()}))
    linears = {name: module for name, module in root.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(kind, str):
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=int(C * rank), target_modules=list(linears)), root)
        root.to(next(base.parameters()).dtype)
    else:
        for name, module in linears.items():
            replace_module(root, name, kind(module, rank, C * rank, backend=backend))
    generator = torch.Generator().manual_seed(0)
    for p in _adapters(root):
        p.data.copy_((torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5).bfloat16())
    return root[0]


def _adapters(module: nn.Module) -> list[torch.Tensor]:
    return [parameter for name, parameter in module.named_parameters() if "lora_" in name]


def _step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, adapters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients."""
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *adapters], dy)]


class _Bench:
    """The device and what it has measured; `measure` and `tune` take one case and its share of the seconds."""

    def __init__(self, dtype: str, repeats: int, dry: bool) -> None:
        if dtype not in ("bfloat16", "float16", "float32") or repeats < 2:
            raise ConfigError(f"expected bfloat16, float16 or float32 and 2 repeats at least, got {dtype}, {repeats}")
        if not dry and not torch.cuda.is_available():
            raise BackendError("torch finds no GPU (CUDA or ROCm); a dry run shows on the CPU what would be measured")
        self.dtype, self.repeats, self.dry = getattr(torch, dtype), 2 if dry else repeats, dry
        self.device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
        reason = "" if dry else dispatch.cannot_run(self.device)
        self.kernels = not dry and not reason
        self.target = dispatch.target_of(self.device) if self.kernels else dispatch.Target("interpreter", 1, "dry-run")
        strategies = {name: name for name in dispatch.STRATEGIES} if self.kernels else {}
        self.backends = {**strategies, "lora-first" if dry else "torch": "torch"}
        self.flush = None if dry else torch.empty(FLUSH_MIB << 20, dtype=torch.int8, device=self.device)
        self.rows: list[dict[str, Any]] = []
        self.lines = ["DRY RUN on the CPU: these times mean nothing" if dry else machine.describe()]
        self.note(f"fused and lora-first left out: {reason}" if reason else "")
        for package, what in (("peft", "variant peft"), ("transformers", "whole layers")):
            self.note("" if importlib.util.find_spec(package) else f"{what} left out: {package} is not installed")
        self.origin = {
            "dry": dry, "gpu": "" if dry else torch.cuda.get_device_name(),
            "target": self.target.name if self.kernels else "", "commit": machine.commit(),
            "versions": machine.versions() | tuning.version() | {"cuda": torch.version.cuda, "hip": torch.version.hip},
            "date": datetime.date.today().isoformat(), "dtype": dtype,
        }  # fmt: skip

    def note(self, text: str) -> None:
        self.lines += [text] if text else []

    def each(self, work: Callable[[Case, float], None], cases: list[Case], budget_s: float, progress: bool) -> None:
        """Calls `work` for every case that time and memory allow, with its share of the seconds left."""
        deadline = time.perf_counter() + budget_s
        with bar("bench", len(cases), "cases", progress) as shown:
            for done, case in enumerate(cases):
                left_s = deadline - time.perf_counter()
                try:
                    if left_s > 0:
                        work(case, left_s / (len(cases) - done))
                    else:
                        self.note(f"{case.kind} {case} left out: {budget_s:g} s are spent")
                except torch.OutOfMemoryError:
                    self.note(f"{case.kind} {case} left out: too little GPU memory")
                shown.update()

    def operands(self, case: Case) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        """The frozen linear or layer, x [..., K] and dy [..., N]."""
        torch.manual_seed(0)
        with torch.device(self.device):
            layer = case.kind == "layer"
            base = (
                _Layer(*{**MODELS, **TINY}[case.label.split()[0]]) if layer else nn.Linear(case.k, case.n, bias=False)
            )
            rows = (-1, min(case.m, SEQUENCE)) if layer else (case.m,)
            x, dy = (torch.randn(case.m, side).to(self.dtype).view(*rows, side) for side in (case.k, case.n))
        return base.to(self.dtype).requires_grad_(False), x.requires_grad_(), dy

    def measure(self, case: Case, budget_s: float) -> None:
        """Adds the rows of one case, each variant checked before it is timed."""
        base, x, dy = self.operands(case)
        if case.kind == "ops":
            return self.measure_ops(case, budget_s, x.detach(), dy, frozen_of(base).weight_NK)
        modules = {name: _adapted(base, LoRALinear, case.rank, to) for name, to in self.backends.items()}
        if importlib.util.find_spec("peft"):
            modules["peft"] = _adapted(base, "peft", case.rank)
        modules = {**self.verified(case, base, x, dy, modules), "frozen": base}
        flops = 2.0 * case.m * case.n * case.k * (case.kind == "linear")
        tiles = dispatch.plan(self.device, self.dtype, *case[2:], "fused").tiles if flops and self.kernels else ""
        forward = {name: partial(module, x) for name, module in modules.items()}
        self.record(case, f"{case.kind} forward", forward, budget_s / 3, flops, tiles=tiles)
        step = {name: partial(_step, module, x, dy, _adapters(module)) for name, module in modules.items()}
        self.record(case, f"{case.kind} step", step, budget_s / 3, 2 * flops, tiles=tiles)
        grad = partial(torch.autograd.grad, grad_outputs=dy, retain_graph=True)
        backward = {name: partial(grad, module(x), [x, *_adapters(module)]) for name, module in modules.items()}
        self.record(case, f"{case.kind} backward", backward, budget_s / 3, flops, tiles=tiles)

    def measure_ops(self, case: Case, budget_s: float, x: torch.Tensor, dy: torch.Tensor, w: torch.Tensor) -> None:
        """Adds the rows of each kernel on its own."""
        m, n, k, r = case[2:]
        a, b = (t.detach() for t in _adapters(_adapted(nn.Linear(k, n, device=self.device), LoRALinear, r)))
        operands = (x, dy, w, a, b, C * (x @ a.to(x.dtype).T), C * (dy @ b.to(x.dtype)))
        if self.kernels:
            from ..kernels import triton_ops
        exact = _ops(*(t.double() for t in operands))
        read = {"shrink": m * (k + r), "expand": m * (n + r), "grads dS+dB": m * (n + 2 * r), "grad dA": m * (k + r)}
        for op, (plain, kernel) in _ops(*operands, triton_ops if self.kernels else None).items():
            both = {"torch": plain, "triton": kernel} if self.kernels else {"torch": plain}
            calls = self.right(f"{op} of {case}", both, plain(), exact[op][0]())
            flops = 2.0 * m * n * (k + r * (op != "gemm")) if op.startswith("gemm") else 0.0
            moved = 0.0 if flops else float(read.get(op, m * n) * x.element_size())
            tiles = dispatch.candidates(self.target, self.dtype, m)[0] if flops else ""
            self.record(case, op, calls, budget_s / len(exact), flops, moved, tiles)

    def tune(self, case: Case, budget_s: float) -> dict[str, dict[str, Any]]:
        """The row of dispatch's table for one linear, under its key."""
        base, x, dy = self.operands(case)
        key = dispatch.key(self.target, self.dtype, *case[2:])
        aligned = case.n % 8 == 0 and case.k % 8 == 0
        every = {f"fused {t}": t for t in dispatch.candidates(self.target, self.dtype, case.m, aligned)}
        prepare = {name: partial(dispatch.use_table, {key: ("fused", t)}) for name, t in every.items()}
        backends = {name: "torch" if self.dry else name.split()[0] for name in ("lora-first", *every)}
        modules = {name: _adapted(base, LoRALinear, case.rank, to) for name, to in backends.items()}
        modules = self.verified(case, base, x, dy, modules, prepare)
        if not modules:
            return {}
        steps = {name: partial(_step, module, x, dy, _adapters(module)) for name, module in modules.items()}
        ms = {name: statistics.median(times) for name, times in self.time_ms(steps, budget_s, prepare).items()}
        fused, best = min(every, key=lambda name: ms.get(name, inf)), min(ms, key=lambda name: ms[name])
        self.note(f"{key}: {best} (" + ", ".join(f"{name} {t:.3f} ms" for name, t in ms.items()) + ")")
        return {key: tuning.row(best.split()[0], every[fused], ms, str(self.origin["date"]))}

    def verified(self, case: Case, base: nn.Module, x, dy, modules: dict[str, nn.Module], prepare: Calls = NONE):
        """The modules that run here, output and gradients right. Raises BackendError where one is wrong."""
        if case.kind == "layer":
            x, dy = x[:1, :CHECKED], dy[:1, :CHECKED]
        x = x.detach().requires_grad_()
        x64 = x.detach().double().requires_grad_()
        plain = _adapted(base, _Plain, case.rank)
        wide = _adapted(copy.deepcopy(base).double(), _Plain, case.rank).double()
        exact = _step(wide, x64, dy.double(), _adapters(wide))
        calls = {name: partial(_step, module, x, dy, _adapters(module)) for name, module in modules.items()}
        right = self.right(f"{case.kind} {case}", calls, _step(plain, x, dy, _adapters(plain)), exact, prepare)
        return {name: modules[name] for name in right}

    def right(self, where: str, calls: Calls, plain: Any, exact: Any, prepare: Calls = NONE) -> Calls:
        """The calls that run here. Raises BackendError where one errs more than twice as far as `plain` does."""
        kept: dict[str, Callable[[], Any]] = {}
        for name, call in calls.items():
            prepare.get(name, bool)()
            try:
                got = _listed(call())
            except Exception as failure:
                if not type(failure).__module__.startswith("triton."):  # which need not be installed
                    raise
                self.note(f"{where}: {name} left out, it does not compile or launch here ({failure})")
                continue
            for number, (ours, theirs, truth) in enumerate(zip(got, _listed(plain), _listed(exact), strict=True), 1):
                norm = truth.norm().item() or 1.0
                error, usual = ((t.double() - truth).norm().item() / norm for t in (ours, theirs))
                if not error <= 2 * usual + torch.finfo(ours.dtype).eps:  # so that NaN is wrong too
                    raise BackendError(
                        f"{where}: {name} is wrong: tensor {number} of {len(got)} errs by {error:.1e} of its norm, "
                        f"plain torch's by {usual:.1e}; nothing is written. Please report it, with `plopfast info`"
                    )
            kept[name] = call
        return kept

    def time_ms(self, calls: Calls, budget_s: float, prepare: Calls = NONE) -> dict[str, list[float]]:
        """Milliseconds of each call, one after the other in every repeat, the order rotated; `prepare` is not timed."""
        names, until = list(calls), time.perf_counter() + budget_s
        ms: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(-WARM, self.repeats):
            if repeat >= LEAST and time.perf_counter() > until:
                break
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                prepare.get(name, bool)()
                took = _time_ms(calls[name], self.flush)
                ms[name] += [took] if repeat >= 0 else []
        return ms

    def record(self, case: Case, op: str, calls: Calls, budget_s: float, flops=0.0, moved=0.0, tiles: Any = "") -> None:
        """Times the calls and adds a row for each."""
        times = self.time_ms(calls, budget_s)
        base = next(name for name in ("peft", "frozen", "torch") if name in calls)
        for name, ms in times.items():
            median, (low, *_, high) = statistics.median(ms), statistics.quantiles(ms, n=5, method="inclusive")
            row = {
                **self.origin, "case": case.label, "op": op, "variant": name,
                "tiles": str(tiles) if name in ("fused", "triton") else "",
                "M": case.m, "N": case.n, "K": case.k, "R": case.rank,
                "median_ms": median, "q20_ms": low, "q80_ms": high, "repeats": len(ms),
                "peak_mib": None if self.flush is None else _peak_mib(calls[name]),
                "tflops": flops / median / 1e9 or None, "gbytes_per_s": moved / median / 1e6 or None,
                "relative": median / statistics.median(times[base]), "relative_to": base,
            }  # fmt: skip
            self.rows.append(row)
            units = ", ".join(f"{row[key]:.1f} {unit}" for key, unit in UNITS.items() if row[key] is not None)
            spread = f"{median:9.3f} ms ({low:.3f} to {high:.3f})"
            self.note(f"{case!s:<44} {op:<16} {name:<11}{spread}, {row['relative']:.2f} of {base}, {units}")


def _listed(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _time_ms(call: Callable[[], Any], flush: torch.Tensor | None) -> float:
    if flush is None:  # the CPU of a dry run
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _peak_mib(call: Callable[[], Any]) -> float:
    """GPU memory that a call needs above what is allocated before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _plot(steps: list[dict[str, Any]], title: str) -> Any:
    """Bars of each variant's step time relative to PEFT's (or the frozen module's), grouped by case."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row["case"], row["M"], row["R"]) for row in steps))
    variants = list(dict.fromkeys(row["variant"] for row in steps))
    axes = (figure := Figure(figsize=(9, 1.5 + 0.5 * len(cases)), layout="constrained")).subplots()
    for place, variant in enumerate(variants):
        bars = {(r["case"], r["M"], r["R"]): r["relative"] for r in steps if r["variant"] == variant}
        axes.barh([cases.index(case) + place * 0.16 for case in bars], list(bars.values()), 0.16, label=variant)
    axes.set_yticks(range(len(cases)), [f"{case}, {m} tokens, rank {rank}" for case, m, rank in cases])
    axes.invert_yaxis()
    axes.set(title=title, xlabel=f"time of a step relative to {steps[0]['relative_to']}")
    axes.legend()
    return figure
