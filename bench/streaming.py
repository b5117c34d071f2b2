"""What streaming frozen weights saves and costs on a CPU, where the blocks stay in mapped files.

    OMP_NUM_THREADS=1 taskset -c 1 python bench/streaming.py [--repeats 3] [--steps 10] [--weights 1.5] [--limit 896]

First SmolLM2-135M (float32, rank 16 on v, up and down, 8 rows of the demo a step), dense and nf4, each resident, streamed, and
with every second layer resident. Each training has a process of its own; they take turns within a repeat. "anonymous" is the
memory of the process that no file stands behind, at its highest from loading to the last step (read every 2 ms from
/proc/self/status, RssAnon); "resident" is all that is in memory then, pages of the mapped files included (VmHWM).
The ratio of a step's CPU time is to the resident arm of the same kind and repeat: median and range.

Then a random Llama of `--weights` GiB in float32, under a limit (RLIMIT_DATA) of `--limit` MiB on all of the process's own
data: without --stream it cannot be loaded, with it it trains three steps; the second time from bfloat16 files, so that the
float32 weights are in plopfast's file.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import measure
import torch
import transformers
from tokenizers import Tokenizer, models

import plopfast as pf
from plopfast.cli import bench_arms
from plopfast.data.example import Example
from plopfast.data.rows import DEMO
from plopfast.models.loading import load_model
from plopfast.support import memory

TYPES, RANK, ROWS = ("v_proj", "up_proj", "down_proj"), 16, 8
WAYS: dict[str, dict[str, Any]] = {
    "resident": {}, "streamed": {"stream": True}, "every second": {"stream": True, "resident_share": 0.5},
}  # fmt: skip
ARMS = {f"{kind or 'dense'} {name}": {"quantize": kind, **how} for kind in (None, "nf4") for name, how in WAYS.items()}


class Anonymous(threading.Thread):
    """Reads the anonymous memory of this process until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0.0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.002):
            self.peak = max(self.peak, anonymous_mib())

    def stop(self) -> float:
        self.over.set()
        self.join()
        return self.peak


def anonymous_mib() -> float:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def train(arm: str, repeat: int, steps: int) -> dict[str, Any]:
    memory.trim()
    memory.reset_peak()
    watch = Anonymous()
    watch.start()
    model, tokenizer = load_model(**ARMS[arm])
    names = [info.name for info in pf.linear_modules(model) if info.type in TYPES]
    pf.inject(model, pf.Placement(dict.fromkeys(names, (RANK, 2.0 * RANK)), list(TYPES), "types", 0))
    rows = pf.tokenize(list(pf.read_jsonl(str(DEMO["train"])))[: steps * ROWS], tokenizer)
    fit = bench_arms.plopfast_fit(model, rows, bench_arms.Recipe(ROWS, steps, 1e-3, RANK, repeat))
    cpu = time.process_time()
    done, seconds = fit()
    cpu = time.process_time() - cpu
    last = [p.detach().double().sum().item() for p in model.parameters() if p.requires_grad]
    return {"arm": arm, "repeat": repeat, "steps": done, "step_ms": 1e3 * seconds / done, "step_cpu_ms": 1e3 * cpu / done,
            "anonymous_mib": watch.stop(), "peak_mib": memory.peak_mib(), "sum": sum(last),
            "said": str(getattr(model, "streaming", ""))}  # fmt: skip


def over(folder: str, limit: int, how: dict[str, Any]) -> dict[str, Any]:
    """Loads and trains under the limit."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit * 2**20, limit * 2**20))
    watch = Anonymous()
    watch.start()
    model, _ = load_model(folder, **how)
    names = [info.name for info in pf.linear_modules(model) if info.type in TYPES]
    pf.inject(model, pf.Placement(dict.fromkeys(names, (4, 8.0)), [], "", 0))
    rows = [Example.after_prompt(tuple(range(5 + n, 69 + n)), 8, None, f"row {n}") for n in range(6)]
    trainer = pf.Trainer(model, pf.TrainConfig(max_steps=3, batch_tokens=128, eval_every=3), rows[:4], rows[4:])
    result = trainer.fit()
    losses = [record["loss"] for record in trainer.history if "loss" in record]
    return {"losses": losses, "anonymous_mib": watch.stop(), "peak_mib": memory.peak_mib(), "seconds": result.seconds,
            "said": str(model.streaming)}  # fmt: skip


def large_model(folder: Path, gib: float, dtype: torch.dtype) -> float:
    """A random Llama with so many GiB of float32 weights; returns what they take in MiB."""
    wide = 1024
    layers = round(gib * 2**30 / (4 * 10 * wide * wide))
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=wide, intermediate_size=2 * wide, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    draw = torch.randn(2 * wide * wide, generator=torch.Generator().manual_seed(0)) * wide**-0.5
    for name, parameter in list(model.named_parameters()):
        values = draw[: parameter.numel()].view(parameter.shape) if parameter.dim() == 2 else torch.ones(wide)
        model.get_submodule(name.rpartition(".")[0]).weight = torch.nn.Parameter(
            values.to(dtype, copy=True), requires_grad=False
        )
    model.save_pretrained(folder, max_shard_size="400MB")
    return sum(p.numel() for p in model.parameters()) * 4 / 2**20


def in_a_process(*arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        done = subprocess.run([sys.executable, __file__, *arguments, "--out", str(out)], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "Error: " in line] or ["killed"]
            return {"failed": re.sub(r"'/\S+'", "FOLDER", said[-1].partition("Error: ")[2] or said[-1])[:300]}
        return json.loads(out.read_text())


def over_the_limit(gib: float, limit: int) -> list[dict[str, Any]]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            size = large_model(Path(folder), gib, dtype)
            small = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="a"))
            wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=small, pad_token="<pad>", eos_token="</s>")
            wrapped.save_pretrained(folder)
            for stream in (False, True):
                one = in_a_process("--over", folder, str(limit), json.dumps({"stream": True} if stream else {}))
                found.append({"files": str(dtype), "stream": stream, "weights_mib": size, "limit_mib": limit, **one})
                print(found[-1], flush=True)
    return found


def table_of(runs: list[dict[str, Any]], limited: list[dict[str, Any]]) -> str:
    lines = [
        f"{'weights':<20}{'anonymous MiB':>14}{'resident MiB':>14}{'step CPU ms':>13}  CPU time / resident (range)"
    ]
    for arm in dict.fromkeys(r["arm"] for r in runs):
        rows = {r["repeat"]: r for r in runs if r["arm"] == arm}
        base = {r["repeat"]: r for r in runs if r["arm"] == f"{arm.split()[0]} resident"}
        found = sorted(rows[n]["step_cpu_ms"] / base[n]["step_cpu_ms"] for n in rows.keys() & base.keys())
        mid = {
            key: statistics.median(r[key] for r in rows.values())
            for key in ("anonymous_mib", "peak_mib", "step_cpu_ms")
        }
        lines.append(
            f"{arm:<20}{mid['anonymous_mib']:>14.0f}{mid['peak_mib']:>14.0f}{mid['step_cpu_ms']:>13.0f}"
            f"  {statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})"
        )
    for kind in ("dense", "nf4"):
        same = {(r["repeat"], r["sum"]) for r in runs if r["arm"].startswith(kind)}
        lines.append(
            f"{kind}: the trained values are {'the same' if len(same) == len({r for r, _ in same}) else 'others'}"
        )
    for one in limited:
        how = (
            f"{one['weights_mib']:.0f} MiB of float32 weights, files in {one['files']}, limit {one['limit_mib']} MiB, "
        )
        how += "streamed: " if one["stream"] else "resident: "
        lines.append(
            how + (one.get("failed") or f"trains (losses {one['losses']}), anonymous {one['anonymous_mib']:.0f} MiB")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--weights", type=float, default=1.5, help="GiB of the large model")
    parser.add_argument("--limit", type=int, default=896, help="MiB of the process's own data")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--over", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.over:
        given.out.write_text(json.dumps(over(given.over[0], int(given.over[1]), json.loads(given.over[2]))))
        return
    if given.one:
        given.out.write_text(json.dumps(train(given.one[0], int(given.one[1]), given.steps)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    load_model()  # a GGUF file is converted once
    limited = over_the_limit(given.weights, given.limit)
    runs: list[dict[str, Any]] = []
    for repeat in range(given.repeats):
        for arm in ARMS:
            runs.append(in_a_process("--one", arm, str(repeat), "--steps", str(given.steps)))
            print(runs[-1], flush=True)
        measure.save("streaming", table_of(runs, limited), {"runs": runs, "limited": limited})


if __name__ == "__main__":
    main()
