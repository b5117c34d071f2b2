"""What each way to save memory saves and costs on this GPU, and whether a step of it computes the same.

    python bench/card_memory.py [--seconds 240] [--rows 8] [--length 512] [--steps 6] [--out FILE] [--dry]

A random Llama of Llama-3.2-1B's shape with a head of its own, written to a folder and read with `load_model` by each arm: rank
16 on all seven linears, bfloat16, AdamW, the same rows and adapters for all. "peak" is the most that torch's allocator gave on
the GPU in training, and "loading" while the model was read; "estimate" is what `plopfast estimate` says of the step before it.
"step" is the median of the steps after the first two, "GPU" what its kernels and copies take together, some of them at a time.
"apart" is the greatest relative difference of losses and gradient norms of all steps from the arm whose weights are of the same
kind, resident. --dry: a tiny model on the CPU.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import card_gpu
import card_tiny
import measure
import torch
import transformers

import plopfast as pf
from plopfast.cli.bench_arms import everywhere
from plopfast.data.example import Example
from plopfast.support import memory
from plopfast.training.estimate import estimate

RANK, WARM = 16, 2
LOADED = {"quantize", "stream", "resident_share", "embedding"}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, checkpointing": {"checkpointing": True},
    "dense, checkpointing, mlp rows": {"checkpointing": True, "mlp_rows": 512},
    "dense, checkpointing, offload": {"checkpointing": True, "offload": True},
    "dense, offload": {"offload": True},
    "dense, embedding on the CPU": {"embedding": "cpu"},
    "dense, streamed": {"stream": True},
    "dense, every second streamed": {"stream": True, "resident_share": 0.5},
    "dense, streamed, checkpointing, offload": {"stream": True, "checkpointing": True, "offload": True},
    "nf4": {"quantize": "nf4"},
    "nf4, streamed": {"quantize": "nf4", "stream": True},
    "nf4, all of it": {
        "quantize": "nf4", "stream": True, "embedding": "cpu", "checkpointing": True, "mlp_rows": 512, "offload": True,
    },
    "int8": {"quantize": "int8"},
    "fp8": {"quantize": "fp8"},
}  # fmt: skip
SHAPES = {"large": (2048, 8192, 16, 32, 8, 128_256), "dry": (64, 128, 2, 4, 2, 300)}


def write_model(folder: Path, shape: tuple[int, ...], device: str) -> None:
    hidden, inner, layers, heads, kv, vocabulary = shape
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=False, max_position_embeddings=8192,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    card_tiny.tokenizer_of_bytes().save_pretrained(folder)


def train(folder: str, device: torch.device, how: dict[str, Any], rows: int, length: int, steps: int) -> dict[str, Any]:
    memory.reset_peak(device)
    began = time.perf_counter()
    model, _ = pf.load_model(
        folder, dtype=torch.bfloat16, device=device, **{key: how[key] for key in LOADED & how.keys()}
    )
    load_seconds, loading_mib = time.perf_counter() - began, memory.peak_mib(device)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, model.config.vocab_size, (rows * steps, length), generator=draw).tolist()
    examples = [Example.after_prompt(row, 1, None, f"row {i}") for i, row in enumerate(tokens)]
    config = pf.TrainConfig(
        lr=1e-4, batch_rows=rows, batch_tokens=rows * length, max_steps=steps,
        **{key: how[key] for key in how.keys() - LOADED},
    )  # fmt: skip
    placement = everywhere(model, RANK)
    told = estimate(model, {"all": placement}, config, rows=rows, row_tokens=length, label_tokens=length - 1)[0]
    pf.inject(model, placement)
    trainer = pf.Trainer(model, config, examples)
    gc.collect()
    memory.reset_peak(device)
    trainer.fit()
    peak = memory.peak_mib(device)
    busy_ms, kernels = card_gpu.gpu_time(lambda: pf.Trainer(model, replace(config, max_steps=2), examples).fit())
    times = [record["seconds"] for record in trainer.history][WARM:]
    return {
        "gpu_ms": busy_ms / 2, "kernels": kernels // 2, "step_ms": statistics.median(times) * 1e3, "tokens_per_s": rows * length / statistics.median(times), "peak_mib": peak,
        "estimate_mib": told.total_mib, "loading_mib": loading_mib, "load_s": load_seconds, "steps_ms": [1e3 * t for t in times],
        "host_estimate_mib": told.host_mib, "losses": [record["loss"] for record in trainer.history],
        "norms": [record["grad_norm"] for record in trainer.history],
    }  # fmt: skip


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = zip(one["losses"] + one["norms"], other["losses"] + other["norms"], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 8), ("length", 512), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no arm after this time (default: 240)")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "card_memory.json", help="the file to write")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    given = parser.parse_args()
    until, device = time.monotonic() + given.seconds, torch.device("cpu" if given.dry else "cuda")
    rows, length = (2, 16) if given.dry else (given.rows, given.length)
    lines = [
        f"{'arm':<44}{'step, ms':>9}{'GPU, ms':>9}{'tokens/s':>10}{'peak MiB':>10}{'estimate':>10}{'loading':>9}{'apart':>9}"
    ]
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), SHAPES["dry" if given.dry else "large"], device.type)
        for name, how in ARMS.items():
            if given.dry and "offload" in how:
                continue  # it needs a GPU
            if time.monotonic() > until:
                lines.append(f"time is up before {name}")
                break
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                figures[name] = one = train(folder, device, how, rows, length, given.steps)
            except Exception as error:  # an arm's failure is a finding, and the others are wanted too
                lines.append(f"{name}: FAILED, {type(error).__name__}: {error}")
                print(lines[-1], flush=True)
                traceback.print_exc()
                continue
            one["apart"] = apart(one, figures[name.partition(",")[0]])
            lines.append(
                f"{name:<44}{one['step_ms']:>9.1f}{one['gpu_ms']:>9.1f}{one['tokens_per_s']:>10.0f}{one['peak_mib']:>10.0f}"
                f"{one['estimate_mib'] / one['peak_mib']:>10.3f}{one['loading_mib']:>9.0f}{one['apart']:>9.1g}"
            )
            print(lines[-1], flush=True)
    measure.save(given.out, "\n".join(lines), {"rows": rows, "length": length, "arms": figures})
    if any(": FAILED" in line for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
