"""What quantised frozen weights cost and save on a CPU, and what they do to the training and to the scores.

    OMP_NUM_THREADS=1 python bench/quantized.py [--seeds 3] [--steps 60] [--arms dense nf4 "PEFT nf4"]

Arms: plopfast with dense, nf4, int8 and fp8 weights, and PEFT with bitsandbytes' nf4 and int8 and the Hugging Face Trainer.
All train the same adapters of SmolLM2-135M (rank 16 on v, up and down, from the same values) on the same rows of the demo, 8
a step, in float32, with AdamW and a cosine schedule. Each training has a process of its own; the arms take turns within a
seed. "peak" is the process's resident memory at its highest in training, "loading" while the model was read, pages of the
mapped file included; "held" are codes, scales and dense weights of the linear modules inside the layers. The loss is that of 200 validation rows after the last step, a mean over label tokens, measured
by plopfast for all; its ratio to the dense arm's has the 95 % interval of Student's t over the seeds, from the logarithm.

Then the NFN of each module type on 64 rows, with its 95 % interval, for each kind of weights, and the untrained model's loss
with a quantised output head.
"""

import argparse
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import measure
import torch

import plopfast as pf
from plopfast.cli import bench_arms
from plopfast.data.batches import batches_of
from plopfast.data.rows import DEMO
from plopfast.models.frozen import find_frozen
from plopfast.models.loading import find_default_gguf, load_model, path_of
from plopfast.models.quantized import quantized
from plopfast.scoring.stopping import student_t
from plopfast.support import memory
from plopfast.training.evaluate import evaluate

KINDS = ("dense", "nf4", "int8", "fp8")
ARMS = (*KINDS, "PEFT nf4", "PEFT int8")
TYPES = ("v_proj", "up_proj", "down_proj")
RANK, ROWS, LR, JUDGED = 16, 8, 1e-3, 200


def rows_of(split: str, tokenizer: Any, count: int, seed: int = 0) -> list[Any]:
    rows = list(pf.read_jsonl(str(DEMO[split])))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return pf.tokenize([rows[i] for i in order[:count]], tokenizer)


def loaded(arm: str) -> tuple[Any, Any]:
    if not arm.startswith("PEFT"):
        return load_model(quantize=None if arm == "dense" else arm)
    import transformers

    from plopfast.models import loading

    _, tokenizer = load_model()
    how = (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        if "nf4" in arm
        else {"load_in_8bit": True}
    )
    folder = loading._converted(find_default_gguf()) if path_of(None) else loading.DEFAULT_HUB_ID
    config = transformers.BitsAndBytesConfig(**how)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    ), tokenizer


def held_mib(model: Any) -> float:
    """The weights of the linear modules inside the layers."""
    frozen = [find_frozen(info.module) for info in pf.linear_modules(model)]
    return sum(f.weight_NK.nbytes for f in frozen) / 2**20


def train(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """One training: figures."""
    memory.reset_peak()
    began = time.perf_counter()
    model, tokenizer = loaded(arm)
    load_seconds, load_mib, held = time.perf_counter() - began, memory.peak_mib(), held_mib(model)
    memory.trim()
    memory.reset_peak()
    names = [info.name for info in pf.linear_modules(model) if info.type in TYPES]
    placement = pf.Placement(dict.fromkeys(names, (RANK, bench_arms.ALPHA * RANK)), list(TYPES), "types", 0)
    examples = rows_of("train", tokenizer, steps * ROWS, seed)
    recipe = bench_arms.Recipe(ROWS, steps, LR, RANK, seed)
    with tempfile.TemporaryDirectory() as folder:
        if arm.startswith("PEFT"):
            fit = bench_arms.hf_fit(bench_arms.peft_model(model, placement, seed), examples, recipe, folder)
        else:
            pf.inject(model, placement, seed=seed)
            fit = bench_arms.plopfast_fit(model, examples, recipe)
        cpu = time.process_time()
        done, seconds = fit()
        cpu = time.process_time() - cpu
    peak = memory.peak_mib()
    loss = evaluate(model, rows_of("valid", tokenizer, JUDGED)).loss
    return {"arm": arm, "seed": seed, "steps": done, "step_ms": 1e3 * seconds / done, "step_cpu_ms": 1e3 * cpu / done,
            "loss": loss, "peak_mib": peak, "load_mib": load_mib, "held_mib": held, "load_s": load_seconds}  # fmt: skip


def scores(kind: str) -> dict[str, Any]:
    model, tokenizer = loaded(kind)
    report = pf.score(model, batches_of(rows_of("train", tokenizer, 64), 8), confidence=None)
    picked = sorted(report.types, key=report.types.__getitem__)[:3]
    found = {"kind": kind, "types": dict(report.types), "intervals": report.intervals().types, "picked": picked}
    if kind != "dense":
        return found
    judges, head = rows_of("valid", tokenizer, JUDGED), model.get_output_embeddings()
    found["head"] = {"dense": evaluate(model, judges).loss}
    for other in KINDS[1:]:  # the model's head is tied to its embedding, which stays dense here
        model.set_output_embeddings(quantized(head, other))
        found["head"][other] = evaluate(model, judges).loss
    return found


def in_a_process(*arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        subprocess.run([sys.executable, __file__, *arguments, "--out", str(out)], check=True)
        return json.loads(out.read_text())


def ratio(values: list[float], base: list[float]) -> str:
    """The geometric mean of the ratios within seeds, and its 95 % interval where there are several."""
    logs = [math.log(a / b) for a, b in zip(values, base, strict=True)]
    mean = statistics.mean(logs)
    if len(logs) < 2:
        return f"{math.exp(mean):.3f}"
    half = student_t(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.3f} ({math.exp(mean - half):.3f} to {math.exp(mean + half):.3f})"


def table_of(runs: list[dict[str, Any]], scored: list[dict[str, Any]]) -> str:
    lines = [
        f"{'weights':<12}{'held MiB':>9}{'peak MiB':>9}{'loading MiB':>12}{'step ms':>9}{'CPU ms':>8}{'loss':>8}"
        "  step / dense        loss / dense"
    ]
    of = {
        arm: sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["seed"])
        for arm in dict.fromkeys(r["arm"] for r in runs)
    }
    for arm, rows in of.items():
        mid = {key: statistics.median(r[key] for r in rows) for key in rows[0] if key not in ("arm", "seed")}
        known = {r["seed"]: r for r in of.get("dense", [])}
        pairs = [(r, known[r["seed"]]) for r in rows if r["seed"] in known]
        compared = "".join(
            f"  {ratio([one[key] for one, _ in pairs], [two[key] for _, two in pairs]):<22}"
            for key in ("step_cpu_ms", "loss")
            if pairs and arm != "dense"
        )
        lines.append(
            f"{arm:<12}{mid['held_mib']:>9.0f}{mid['peak_mib']:>9.0f}{mid['load_mib']:>12.0f}{mid['step_ms']:>9.0f}"
            f"{mid['step_cpu_ms']:>8.0f}{mid['loss']:>8.3f}{compared}"
        )
    for one in scored:
        order = sorted(one["types"].items(), key=lambda item: item[1])
        values = ", ".join(
            "{} {:.3f} ({:.3f} to {:.3f})".format(name, value, *one["intervals"][name]) for name, value in order
        )
        lines.append(f"NFN, {one['kind']} weights: {values}")
        if "head" in one:
            heads = ", ".join(f"{name} {loss:.4f}" for name, loss in one["head"].items())
            lines.append(f"loss before training, by the kind of the output head: {heads}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--score", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.out:
        found = train(given.one[0], int(given.one[1]), given.steps) if given.one else scores(given.score)
        given.out.write_text(json.dumps(found))
        return
    runs: list[dict[str, Any]] = []
    scored: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        for arm in given.arms:
            runs.append(in_a_process("--one", arm, str(seed), "--steps", str(given.steps)))
            print(f"seed {seed}: {runs[-1]}", flush=True)
        save(runs, scored)
    for kind in [arm for arm in given.arms if arm in KINDS]:
        scored.append(in_a_process("--score", kind))
    save(runs, scored)


def save(runs: list[dict[str, Any]], scored: list[dict[str, Any]]) -> None:
    packages = {name: importlib.metadata.version(name) for name in ("bitsandbytes", "accelerate")}
    measure.save("quantized", table_of(runs, scored), {"runs": runs, "scores": scored, "packages": packages})


if __name__ == "__main__":
    main()
