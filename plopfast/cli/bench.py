"""`plopfast bench`: times the kernels, a LoRA linear and a whole layer on this GPU. `--tune` picks strategy and tiles.

Every variant's outputs and gradients are compared with float64 before they are timed. A variant that breaks the rule of
errors (kernels/accuracy.py) ends the run without a result. Variants take turns in a rotating order, and the caches are
flushed before each call. Times are the GPU's own events; the host enqueues while the flush runs, so launching counts
only as far as it takes longer. A dry run does the same on the CPU in seconds; its rows say so, and their times mean
nothing.

M tokens, K in, N out, R rank. Variants: fused and lora-first (kernels/dispatch.py), torch (lora-first in plain torch),
peft (its own layer with the same adapters in the base's dtype, its fastest way), liger (that in a layer whose norms,
SwiGLU and rotary positions are liger-kernel's), frozen (the GEMM or layer alone). A rival that fails is left out.
"""

import copy
import datetime
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels import accuracy, dispatch
from ..lora import tuning
from ..lora.layer import LoRALinear
from ..models.frozen import frozen_of
from ..support import files, machine
from ..support.errors import BackendError, ConfigError
from ..support.ledger import Ledger
from ..support.progress import bar
from . import bench_timing as timing
from .bench_cases import C, Case, Plain, Shapes, adapted, adapters, cases, op_work, operands, ops, step
from .bench_timing import NONE, Calls

TUNE_TOKENS, TUNE_RANKS = (512, 1024, 2048, 4096, 8192), (16, 32, 64)
CHECKED = 256  # tokens of a layer's first sequence that are checked
RIVALS = {"peft": "peft", "liger": "liger_kernel"}  # variant -> package
UNITS = {"tflops": "TFLOP/s", "gbytes_per_s": "GB/s", "peak_mib": "MiB at its peak"}


def run(
    out: Path, *, shapes: Shapes = "all", dtype: str = "bfloat16", repeats: int = 30, budget_s: float = 540.0,
    dry: bool = False, overwrite: bool = False, progress: bool = False,
) -> tuple[list[dict[str, Any]], str]:  # fmt: skip
    """Times every case. Writes out/bench.jsonl (a row for each op and variant) and out/bench.png; returns rows, text.

    `shapes` is "llama-8b", "smollm2", "all" or pairs (in, out); a dry run has its own tiny ones. When `budget_s`
    seconds are spent, repeats and then cases are left out, and the text says which. Raises BackendError, before
    anything is written, if there is no GPU (unless `dry`) or a variant is wrong; ConfigError and FileError for bad
    settings.
    """
    ledger, written = Ledger(out), {"bench.jsonl": (), "bench.png": ()}
    files.refuse_existing(out / "bench.jsonl", overwrite)
    ledger.check(written)
    bench = Bench(dtype, repeats, dry)
    bench.note("" if dry else tuning.load())
    bench.each(bench.measure, cases(shapes, dry), budget_s, progress)
    few = sum(row["repeats"] < bench.repeats for row in bench.rows)
    bench.note(f"{few} rows have fewer than {bench.repeats} repeats: time was up" if few else "")
    ledger.claim_once(written)
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
    *, shapes: Shapes = "all", dtype: str = "bfloat16", repeats: int = 20, budget_s: float = 540.0, dry: bool = False,
    path: Path | None = None, progress: bool = False,
) -> tuple[dict[str, dict[str, Any]], str]:  # fmt: skip
    """Times a training step of each linear, lora-first and fused with every candidate tiling, and stores the fastest.

    `shapes` is as in `run`; pairs are (in, out) of a model's linears. TUNE_TOKENS and TUNE_RANKS stand for their buckets
    (dispatch.key). Rows go to tuning.save(path) and are put in force; a dry run writes only if `path` is given. Returns
    rows and text. Raises what `run` raises.
    """
    bench = Bench(dtype, repeats, dry)
    if not dry and not bench.kernels:
        raise BackendError(f"nothing to tune: {dispatch.cannot_run(bench.device)}")
    sides = dict.fromkeys((case.n, case.k) for case in cases(shapes, dry))
    points = product(sides, [32] if dry else TUNE_TOKENS, [4] if dry else TUNE_RANKS)
    chosen = [Case("linear", "tune", m, n, k, rank) for (n, k), m, rank in points]
    before, rows = dict(dispatch.TABLE), {}
    try:
        bench.each(lambda case, left_s: rows.update(bench.tune(case, left_s)), chosen, budget_s, progress)
    finally:
        dispatch.use_table(before)
    bench.note(f"written: {tuning.save(rows, path)}" if path or not dry else "")
    bench.note("" if dry else tuning.load(path))
    return rows, "\n".join(bench.lines)


class Bench:
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
        self.flush = None if dry else torch.empty(timing.FLUSH_MIB << 20, dtype=torch.int8, device=self.device)
        self.rows: list[dict[str, Any]] = []
        self.lines = ["DRY RUN on the CPU: these times mean nothing" if dry else machine.describe()]
        self.note(f"fused and lora-first left out: {reason}" if reason else "")
        self.missing = {name for name in (*RIVALS.values(), "transformers") if not importlib.util.find_spec(name)}
        self.rivals = [name for name, package in RIVALS.items() if not self.missing & {"peft", package}]
        for package in sorted(self.missing):
            what = {"peft": "variants peft and liger", "liger_kernel": "variant liger"}.get(package, "whole layers")
            self.note(f"{what} left out: {package} is not installed")
        self.origin = {
            "dry": dry, "gpu": "" if dry else torch.cuda.get_device_name(),
            "target": self.target.name if self.kernels else "", "commit": machine.commit(),
            "versions": machine.versions() | tuning.version() | {"cuda": torch.version.cuda, "hip": torch.version.hip},
            "date": datetime.date.today().isoformat(), "dtype": dtype,
        }  # fmt: skip

    def note(self, text: str) -> None:
        self.lines += [text] if text else []

    def each(self, work: Callable[[Case, float], None], todo: list[Case], budget_s: float, progress: bool) -> None:
        """Calls `work` for every case that time and memory allow, with its share of the seconds left."""
        deadline = time.perf_counter() + budget_s
        with bar("bench", len(todo), "cases", progress) as shown:
            for done, case in enumerate(todo):
                left_s = deadline - time.perf_counter()
                try:
                    if left_s > 0:
                        work(case, left_s / (len(todo) - done))
                    else:
                        self.note(f"{case.kind} {case} left out: {budget_s:g} s are spent")
                except torch.OutOfMemoryError:
                    self.note(f"{case.kind} {case} left out: too little GPU memory")
                shown.update()

    def measure(self, case: Case, budget_s: float) -> None:
        """Adds the rows of one case, each variant checked before it is timed."""
        base, x, dy = operands(case, self.dtype, self.device)
        if case.kind == "ops":
            return self.measure_ops(case, budget_s, x.detach(), dy, frozen_of(base).weight_NK)
        modules = {name: adapted(base, LoRALinear, case.rank, to) for name, to in self.backends.items()}
        for name in self.rivals:
            if name == "peft" or case.kind == "layer":
                modules[name] = adapted(base, name, case.rank)
        modules = {**self.verified(case, base, x, dy, modules), "frozen": base}
        flops = 2.0 * case.m * case.n * case.k * (case.kind == "linear")
        fused = flops and self.kernels
        tiles = str(dispatch.plan(self.device, self.dtype, *case.sizes, "fused").tiles) if fused else ""
        forward = {name: partial(module, x) for name, module in modules.items()}
        self.record(case, f"{case.kind} forward", forward, budget_s / 3, flops, tiles=tiles)
        steps = {name: partial(step, module, x, dy, adapters(module)) for name, module in modules.items()}
        self.record(case, f"{case.kind} step", steps, budget_s / 3, 2 * flops, tiles=tiles)
        grad = partial(torch.autograd.grad, grad_outputs=dy, retain_graph=True)
        backward = {name: partial(grad, module(x), [x, *adapters(module)]) for name, module in modules.items()}
        self.record(case, f"{case.kind} backward", backward, budget_s / 3, flops, tiles=tiles)

    def measure_ops(self, case: Case, budget_s: float, x: torch.Tensor, dy: torch.Tensor, w: torch.Tensor) -> None:
        """Adds the rows of each kernel on its own."""
        _, n, k, r = case.sizes
        a, b = (t.detach() for t in adapters(adapted(nn.Linear(k, n, device=self.device), LoRALinear, r)))
        tensors = (x, dy, w, a, b, C * (x @ a.to(x.dtype).T), C * (dy @ b.to(x.dtype)))
        if self.kernels:
            from ..kernels import triton_ops
        exact = ops(*(t.double() for t in tensors))
        for op, (plain, kernel) in ops(*tensors, triton_ops if self.kernels else None).items():
            both = {"torch": plain, "triton": kernel} if self.kernels else {"torch": plain}
            calls = self.right(f"{op} of {case}", both, plain(), exact[op][0]())
            flops, moved = op_work(op, case, x.element_size())
            tiles = str(dispatch.candidates(self.target, self.dtype)[0]) if flops else ""
            self.record(case, op, calls, budget_s / len(exact), flops, moved, tiles)

    def tune(self, case: Case, budget_s: float) -> dict[str, dict[str, Any]]:
        """The row of dispatch's table for one linear, under its key."""
        base, x, dy = operands(case, self.dtype, self.device)
        key = dispatch.key(self.target, self.dtype, *case.sizes)
        aligned = case.n % 8 == 0 and case.k % 8 == 0
        every = {f"fused {t}": t for t in dispatch.candidates(self.target, self.dtype, aligned)}
        prepare = {name: partial(dispatch.use_table, {key: ("fused", t)}) for name, t in every.items()}
        backends = {name: "torch" if self.dry else name.split()[0] for name in ("lora-first", "torch", *every)}
        modules = {name: adapted(base, LoRALinear, case.rank, to) for name, to in backends.items()}
        modules = self.verified(case, base, x, dy, modules, prepare)
        if not modules:
            return {}
        steps = {name: partial(step, module, x, dy, adapters(module)) for name, module in modules.items()}
        ms = {name: statistics.median(times) for name, times in self.time_ms(steps, budget_s, prepare).items()}
        fused, best = min(every, key=lambda name: ms.get(name, inf)), min(ms, key=lambda name: ms[name])
        self.note(f"{key}: {best} (" + ", ".join(f"{name} {t:.3f} ms" for name, t in ms.items()) + ")")
        return {key: tuning.row(best.split()[0], every[fused], ms, str(self.origin["date"]))}

    def verified(self, case: Case, base: nn.Module, x, dy, modules: dict[str, nn.Module], prepare: Calls = NONE):
        """The modules that run here, with outputs and gradients checked. Raises BackendError if one is wrong."""
        if case.kind == "layer":
            x, dy = x[:1, :CHECKED], dy[:1, :CHECKED]
        x = x.detach().requires_grad_()
        x64 = x.detach().double().requires_grad_()
        plain = adapted(base, Plain, case.rank)
        wide = adapted(copy.deepcopy(base).double(), Plain, case.rank).double()
        exact = step(wide, x64, dy.double(), adapters(wide))
        calls = {name: partial(step, module, x, dy, adapters(module)) for name, module in modules.items()}
        right = self.right(f"{case.kind} {case}", calls, step(plain, x, dy, adapters(plain)), exact, prepare)
        return {name: modules[name] for name in right}

    def right(self, where: str, calls: Calls, plain: Any, exact: Any, prepare: Calls = NONE) -> Calls:
        """The calls that run here. Raises BackendError if one breaks the rule of errors."""
        kept: dict[str, Callable[[], Any]] = {}
        for name, call in calls.items():
            prepare.get(name, bool)()
            try:
                got = _listed(call())
            except Exception as failure:
                if not (type(failure).__module__.startswith("triton.") or name in RIVALS):  # it need not be installed
                    raise
                self.note(f"{where}: {name} left out, it does not compile or launch here ({failure})")
                continue
            wrong = _first_wrong(got, _listed(plain), _listed(exact))
            if wrong and name not in RIVALS:
                raise BackendError(
                    f"{where}: {name} is wrong: {wrong}; nothing was written. Please report it, with the output of "
                    "`plopfast info`"
                )
            if wrong:
                self.note(f"{where}: {name} left out, it is wrong: {wrong}")
            else:
                kept[name] = call
        return kept

    def time_ms(self, calls: Calls, budget_s: float, prepare: Calls = NONE) -> dict[str, list[float]]:
        return timing.interleaved(calls, self.repeats, budget_s, self.flush, prepare)

    def record(
        self, case: Case, op: str, calls: Calls, budget_s: float, flops: float, moved: float = 0.0, tiles: str = ""
    ) -> None:
        """Times the calls and adds a row for each.

        `flops` and `moved`, in bytes, are what a call does (0: not reported); `tiles` are those of the Triton variants.
        """
        times = self.time_ms(calls, budget_s)
        base = next(name for name in ("peft", "frozen", "torch") if name in calls)
        for name, ms in times.items():
            median, (low, *_, high) = statistics.median(ms), statistics.quantiles(ms, n=5, method="inclusive")
            row = {
                **self.origin, "case": case.label, "op": op, "variant": name,
                "tiles": tiles if name in ("fused", "triton") else "",
                "M": case.m, "N": case.n, "K": case.k, "R": case.rank,
                "median_ms": median, "q20_ms": low, "q80_ms": high, "repeats": len(ms),
                "peak_mib": None if self.flush is None else timing.peak_mib(calls[name]),
                "tflops": flops / median / 1e9 or None, "gbytes_per_s": moved / median / 1e6 or None,
                "relative": median / statistics.median(times[base]), "relative_to": base,
            }  # fmt: skip
            self.rows.append(row)
            units = ", ".join(f"{row[key]:.1f} {unit}" for key, unit in UNITS.items() if row[key] is not None)
            spread = f"{median:9.3f} ms ({low:.3f} to {high:.3f})"
            self.note(f"{case!s:<44} {op:<16} {name:<11}{spread}, {row['relative']:.2f} of {base}, {units}")


def _first_wrong(got: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> str:
    """Says which tensor breaks the rule of errors, and by how much; "" where none does."""
    for number, tensors in enumerate(zip(got, plain, exact, strict=True), 1):
        if not (found := accuracy.compare(*tensors)).passes:
            return f"tensor {number} of {len(got)} is {found}"
    return ""


def _listed(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _plot(steps: list[dict[str, Any]], title: str) -> Any:
    """Bars of each variant's step time relative to PEFT's (or the frozen module's), grouped by case."""
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((row["case"], row["M"], row["R"]) for row in steps))
    variants = list(dict.fromkeys(row["variant"] for row in steps))
    axes = (figure := Figure(figsize=(9, 1.5 + 0.5 * len(places)), layout="constrained")).subplots()
    for place, variant in enumerate(variants):
        bars = {(r["case"], r["M"], r["R"]): r["relative"] for r in steps if r["variant"] == variant}
        axes.barh([places.index(case) + place * 0.16 for case in bars], list(bars.values()), 0.16, label=variant)
    axes.set_yticks(range(len(places)), [f"{case}, {m} tokens, rank {rank}" for case, m, rank in places])
    axes.invert_yaxis()
    axes.set(title=title, xlabel=f"time of a step relative to {steps[0]['relative_to']}")
    axes.legend()
    return figure
