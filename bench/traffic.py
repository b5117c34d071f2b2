"""Bytes and FLOPs of LoRA linears at the shapes of real models, against the floor, PEFT and the bare GEMM. Needs no GPU.

    python bench/traffic.py

Bytes are each launch's compulsory ones, by tests/gpu/formulas.py, which tests compare with the checked
interpreter's exact count. Grids are what the launchers choose for the GPU named. "outside" leaves out the operands of the
frozen product, which the bare GEMM moves too, and the L that LoRA-first's GEMM adds to; "all / GEMM" has everything.
Adapters are float32; PEFT's have the base's dtype, which moves least. What torch itself computes (LoRA-first's GEMM) is
written down, not counted. "augmented" is no strategy of plopfast's; docs/kernels.md says why.

Times are a roofline model, not measured: for every launch, the longer of FLOPs / peak and bytes / bandwidth by the data
sheet, without a cache between launches and without launch overhead.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "gpu"))

import formulas  # tests/gpu/formulas.py
import interpreter
import measure
import torch
import traffic  # tests/gpu/traffic.py, which comes before this file's folder

from plopfast.kernels.dispatch import Target

RANK, DROPOUT, MIB, MODEL = 16, 0.1, 1 << 20, "model, not measured"


@dataclass(frozen=True)
class Gpu:
    """By the data sheet: dense bfloat16 with float32 accumulation, and memory bandwidth."""

    target: Target
    peak_tflops: float
    bandwidth_tb_s: float

    def model_ms(self, costs: list[formulas.Cost]) -> float:
        """The roofline's milliseconds."""
        return sum(max(c.useful / (self.peak_tflops * 1e9), c.bytes / (self.bandwidth_tb_s * 1e9)) for c in costs)


GPUS = {
    "H100 SXM": Gpu(Target("sm_90", 132), 989, 3.35),
    "A100 80GB SXM": Gpu(Target("sm_80", 108), 312, 2.04),
    "RTX 4090": Gpu(Target("sm_89", 128), 165, 1.01),
    "MI300X": Gpu(Target("gfx942", 304), 1307, 5.3),
}
MODELS = {  # linears of one layer by shape: (K in, N out)
    "Llama-3-8B": {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)},
    "SmolLM2-135M": {"q, o": (576, 576), "k, v": (576, 192), "gate, up": (576, 1536), "down": (1536, 576)},
}
EXPERTS = {  # experts, those of a token, and the shapes of their weights
    "Qwen3-30B-A3B": (128, 8, {"gate_up": (2048, 1536), "down": (768, 2048)}),
    "Mixtral-8x7B": (8, 2, {"gate_up": (4096, 28672), "down": (14336, 4096)}),
}
MANY = [(count, tokens) for tokens in (4096, 16384) for count in (8, 16)]  # adapters, and their rows together
MANY_SHAPE = (4096, 4096)  # K, N
DETAILED = ("H100 SXM", "A100 80GB SXM")  # of which every linear is saved
RUNS = [("Llama-3-8B", 16384), ("Llama-3-8B", 8192), ("SmolLM2-135M", 16384)]
PATHS = {  # label -> path and dropout rate; without dropout the vendor makes some of fused's and lora-first's products
    "fused": ("fused", DROPOUT), "lora-first": ("lora-first", DROPOUT), "PEFT": ("peft", 0.0),
    "PEFT, dropout": ("peft", DROPOUT), "augmented": ("augmented", 0.0), "bare GEMM": ("bare", 0.0),
}  # fmt: skip
COUNTED, L2_MIB = (1024, 512, 512), 50  # M, N, K


def figures(o: SimpleNamespace, label: str, gpu: Gpu) -> dict[str, float]:
    """One linear by one path: bytes, FLOPs, milliseconds."""
    path, p = PATHS[label]
    step, table = traffic.launches_of(path, o, p, gpu.target), traffic.table_bytes(path, o, p)
    halves = [[formulas.cost(launch) for launch in half] for half in (step.forward, step.backward)]
    costs = halves[0] + halves[1]
    return {
        "forward": sum(c.outside for c in halves[0]), "backward": sum(c.outside for c in halves[1]),
        "forward_floor": table[0], "backward_floor": table[1], "all": sum(c.bytes for c in costs),
        "useful_flops": sum(c.useful for c in costs), "executed_flops": sum(c.executed for c in costs),
        **parts_of(o, step), MODEL + ", ms": gpu.model_ms(costs),
    }  # fmt: skip


def parts_of(o: SimpleNamespace, step: traffic.Step) -> dict[str, int]:
    """Bytes of float32 parts, written and read again, by what they add up to."""
    moved = {"parts of S": 0, "parts of dS": 0, "parts of dB": 0, "parts of dA": 0}
    of_shape = {(1, o.m, RANK): "S", (o.m, RANK): "dS", (o.n, RANK): "dB", (RANK, o.k): "dA"}
    for launch in step.forward + step.backward:
        for parts, out in (("partials", "out"), ("other_partials", "other_out")):
            if launch.kernel.startswith("sum_") and out in launch.arguments:
                what = of_shape[tuple(launch.arguments[out].shape)]
                moved[f"parts of {what}"] += 2 * formulas.cost(launch).loads[parts]
    return moved


def layer_of(model: str, tokens: int, gpu: Gpu) -> dict[str, dict[str, dict[str, float]]]:
    """Linears, and "layer" for their sum -> path -> figures."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for names, (k, n) in MODELS[model].items():
        o = traffic.operands(tokens, n, k, RANK, device="meta")
        found[f"{names} {k}->{n}"] = {label: figures(o, label, gpu) for label in PATHS}
    each = [(names.count(",") + 1, rows) for names, rows in found.items()]
    found["layer"] = {
        label: {key: sum(count * rows[label][key] for count, rows in each) for key in each[0][1][label]}
        for label in PATHS
    }
    return found


def lines_of(rows: dict[str, dict[str, float]], name: str) -> list[str]:
    """A line for each path."""
    lines = []
    outside = {label: row["forward"] + row["backward"] for label, row in rows.items()}
    for label, row in rows.items():
        floor = row["forward_floor"] + row["backward_floor"]
        columns = f"{'0':>9}{'0':>9}{'0':>9}{'-':>8}{'-':>7}{'-':>7}{'0':>8}{'0':>8}"
        if floor:
            columns = (
                f"{row['forward'] / MIB:>9.1f}{row['backward'] / MIB:>9.1f}{floor / MIB:>9.1f}"
                f"{row['forward'] / row['forward_floor']:>8.3f}{row['backward'] / row['backward_floor']:>7.3f}"
                f"{outside[label] / floor:>7.3f}"
                f"{outside[label] / outside['PEFT']:>8.3f}{outside[label] / outside['PEFT, dropout']:>8.3f}"
            )
        executed = "-" if "PEFT" in label or "GEMM" in label else f"{row['executed_flops'] / 1e9:.1f}"
        lines.append(
            f"{name:<21}{label:<15}{columns}{row['all'] / rows['bare GEMM']['all']:>9.3f}"
            f"{row['useful_flops'] / 1e9:>10.1f}{executed:>10}"
        )
        name = ""
    return lines


def experts(gpu: Gpu, tokens: int) -> tuple[list[str], dict[str, Any]]:
    """Each weight of a layer's experts, whose tokens are spread evenly: launches, bytes beside the products, the roofline."""
    lines, found = [], {}
    for model, (count, taken, weights) in EXPERTS.items():
        for name, (k, n) in weights.items():
            rows = [tokens * taken // count] * count
            launches = traffic.launches_of_experts(
                rows, n, k, RANK, torch.bfloat16, torch.float32, gpu.target, device="meta"
            )
            costs = [formulas.cost(launch) for launch in launches]
            bare = [formulas.Cost({"all": c.own}, {}, useful=2 * sum(rows) * n * k) for c in costs if c.own]
            # X for S and dA, dY for dS and dB; adapters twice, and their gradients
            floor = 2 * sum(rows) * (2 * k + n) + 3 * 4 * RANK * count * (n + k)
            row = {
                "launches": len(launches), "outside": sum(c.outside for c in costs), "floor": floor,
                "all": sum(c.bytes for c in costs), "bare": sum(c.bytes for c in bare),
                "useful_flops": sum(c.useful for c in costs), "executed_flops": sum(c.executed for c in costs),
                MODEL + ", ms": gpu.model_ms(costs), "bare, ms": gpu.model_ms(bare),
            }  # fmt: skip
            found[f"{model} {name}"] = row
            lines.append(
                f"{model:<15}{f'{name} {k}->{n}':<21}{count:>8}{row['launches']:>10}{row['outside'] / MIB:>14.1f}"
                f"{row['outside'] / floor:>9.3f}{row['all'] / row['bare']:>11.3f}"
                f"{row['executed_flops'] / row['useful_flops']:>18.3f}{row[MODEL + ', ms'] / row['bare, ms']:>11.3f}"
            )
    return lines, found


def several(gpu: Gpu) -> tuple[list[str], dict[str, Any]]:
    """Adapters on one weight, each with as many rows: one lora_linear_grouped, and as many lora_linears."""
    lines, found = [], {}
    k, n = MANY_SHAPE
    for count, tokens in MANY:
        each = tokens // count
        for strategy in ("lora-first", "fused"):
            together = traffic.launches_of_many(
                [(each, RANK)] * count, n, k, strategy, torch.bfloat16, torch.float32, gpu.target, device="meta"
            )
            one = traffic.launches_of(strategy, traffic.operands(each, n, k, RANK, device="meta"), 0.0, gpu.target)
            halves = [
                ([formulas.cost(launch) for launch in ours], [formulas.cost(launch) for launch in theirs] * count)
                for ours, theirs in ((together.forward, one.forward), (together.backward, one.backward))
            ]
            ours, theirs = ([c for half in halves for c in half[which]] for which in (0, 1))
            row = {
                f"{name} {what}": of(costs)
                for name, costs in (("together", ours), ("apart", theirs))
                for what, of in (
                    ("launches", len), ("bytes", lambda costs: sum(c.bytes for c in costs)),
                    ("outside", lambda costs: sum(c.outside for c in costs)), (MODEL + ", ms", gpu.model_ms),
                )
            }  # fmt: skip
            found[f"{count} adapters, {tokens} rows, {strategy}"] = row
            lines.append(
                f"{count:>8}{tokens:>7}  {strategy:<11}{row['together launches']:>10}{row['apart launches']:>7}"
                f"{row['together bytes'] / MIB:>10.1f}{row['apart bytes'] / MIB:>9.1f}"
                f"{row['together outside'] / MIB:>11.1f}{row['apart outside'] / MIB:>8.1f}"
                f"{row['together ' + MODEL + ', ms']:>10.3f}{row['apart ' + MODEL + ', ms']:>8.3f}"
            )
    return lines, found


def counted() -> tuple[list[str], dict[str, Any]]:
    """One linear run in the interpreter, with the H100's grids: its count, and its accesses through a model of L2."""
    m, n, k = COUNTED
    l2_bytes = L2_MIB * MIB * m * k // (16384 * 4096)
    found: dict[str, Any] = {"l2_bytes": l2_bytes}
    lines = [
        f"Counted in the interpreter: M, N, K = {m}, {n}, {k}, H100 grids, forward + backward, MiB. L2 (indicative): LRU, "
        f"{l2_bytes / MIB:.2f} MiB, as small beside X as {L2_MIB} MiB are at 16384 x 4096",
        f"{'path':<15}{'formula':>9}{'counted':>9}{'asked for':>11}{'behind L2: read':>17}{'written':>9}",
    ]
    for label in ("fused", "PEFT", "bare GEMM"):  # LoRA-first's GEMM is the vendor's
        began, (path, p) = time.perf_counter(), PATHS[label]
        o = traffic.operands(m, n, k, RANK)
        with interpreter.checked(race=False, compute=False, trace=True) as check:
            step = traffic.launches_of(path, o, p, GPUS["H100 SXM"].target)
        formula = sum(formulas.cost(launch).bytes for launch in step.forward + step.backward)
        total = sum(check.counts().values(), interpreter.Traffic())
        row = {
            "formula": formula, "counted": check.compulsory(), "asked_for": total.load.bytes + total.store.bytes,
            **check.l2_replay(l2_bytes, 132),
        }  # fmt: skip
        found[label] = row
        assert row["formula"] == row["counted"]
        lines.append(
            f"{label:<15}{formula / MIB:>9.2f}{row['counted'] / MIB:>9.2f}{row['asked_for'] / MIB:>11.1f}"
            f"{row['dram_read'] / MIB:>17.1f}{row['dram_write'] / MIB:>9.1f}"
        )
        print(f"{label}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return lines, found


def main() -> None:
    lines, saved = [], {}
    head = (
        f"{'linear':<21}{'path':<15}{'outside, MiB':>18}{'table':>9}{'outside / table':>22}{'of PEFT':>16}"
        f"{'all /':>9}{'GFLOP':>20}\n{'':<36}{'forward':>9}{'backward':>9}{'both':>9}{'forw.':>8}{'backw.':>7}"
        f"{'both':>7}{'p = 0':>8}{'p > 0':>8}{'GEMM':>9}{'useful':>10}{'executed':>10}"
    )
    for model, tokens in RUNS:
        found = {name: layer_of(model, tokens, gpu) for name, gpu in GPUS.items()}
        saved[f"{model}, {tokens} tokens"] = {
            name: rows if name in DETAILED else {"layer": rows["layer"]} for name, rows in found.items()
        }
        lines += ["", f"{model}, {tokens} tokens, R = {RANK}, bfloat16, float32 adapters, grids of H100 SXM", head]
        lines += [line for name, rows in found["H100 SXM"].items() for line in lines_of(rows, name)]
        lines += [
            "",
            f"{model}, {tokens} tokens, one layer: bytes by GPU, beyond the table's as share of it",
            f"{'GPU (SMs)':<21}{'path':<12}{'outside / table':>16}  of which parts of dS, dB, dA, S; the rest",
        ]
        for name, gpu in GPUS.items():
            for label in ("fused", "lora-first"):
                row = found[name]["layer"][label]
                floor = row["forward_floor"] + row["backward_floor"]
                over = (row["forward"] + row["backward"]) / floor - 1
                parts = [row[f"parts of {what}"] / floor for what in ("dS", "dB", "dA", "S")]
                lines.append(
                    f"{f'{name} ({gpu.target.units})':<21}{label:<12}{1 + over:>16.3f}  "
                    + " ".join(f"{part:.3f}" for part in parts)
                    + f"; {over - sum(parts):.3f}"
                )
        lines += ["", f"{model}, {tokens} tokens, one layer: roofline in ms ({MODEL})"]
        lines.append(f"{'GPU: peak, bandwidth':<40}" + "".join(f"{label:>15}" for label in PATHS))
        for name, gpu in GPUS.items():
            times = "".join(f"{found[name]['layer'][label][MODEL + ', ms']:>15.3f}" for label in PATHS)
            lines.append(f"{f'{name}: {gpu.peak_tflops} TFLOP/s, {gpu.bandwidth_tb_s} TB/s':<40}{times}")
    of_experts, saved_experts = experts(GPUS["H100 SXM"], RUNS[0][1])
    lines += [
        "",
        f"Experts, {RUNS[0][1]} tokens spread evenly, R = {RANK}, bfloat16, float32 adapters, grids of H100 SXM; {MODEL}",
        f"{'model':<15}{'weight':<21}{'experts':>8}{'launches':>10}{'outside, MiB':>14}{'/ floor':>9}{'all / bare':>11}"
        f"{'executed / useful':>18}{'ms / bare':>11}",
        *of_experts,
    ]
    of_several, saved_several = several(GPUS["H100 SXM"])
    lines += [
        "",
        f"Several adapters on one weight {MANY_SHAPE[0]}->{MANY_SHAPE[1]}, R = {RANK}, bfloat16, float32 adapters, forward + "
        f"backward, grids of H100 SXM: one lora_linear_grouped (together), and as many lora_linears (apart); {MODEL}",
        f"{'adapters':>8}{'rows':>7}  {'path':<11}{'launches':>10}{'apart':>7}{'all, MiB':>10}{'apart':>9}{'outside':>11}{'apart':>8}"
        f"{'ms':>10}{'apart':>8}",
        *of_several,
    ]
    more, run = counted()
    figures = {"models": saved, "experts": saved_experts, "several": saved_several, "counted": run}
    measure.save("traffic", "\n".join([*lines[1:], "", *more]), figures)


if __name__ == "__main__":
    main()
