"""Tokens a second of training on this GPU: plopfast by backend, PEFT with the Hugging Face Trainer, and that with liger-kernel.

    python bench/card_training.py --size small|large [--seconds 240] [--out FILE] [--one-thread] [--compile] [--dry]

Random Llamas: "small" of SmolLM2-135M's shape, "large" of Llama-3.2-1B's. All seven linears are adapted with rank 16; rows
have 512 random tokens; bfloat16, torch's AdamW, no checkpointing, no dropout (plopfast/cli/bench_arms.py). Medians of three
trainings after a warm-up, the arms one after the other. "GPU ms" and "kernels" are torch's profiler's sums for one step.
--one-thread runs backward passes in the calling thread. Then, for "small", one CUDA graph of a forward and backward pass
against the same calls without one. --dry: a tiny model on the CPU, which tests the script and measures nothing.
"""

import argparse
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from plopfast.support import threads

threads.set_waiting_policy()

import card_gpu
import measure
import torch
from card_gpu import seconds_of

import plopfast as pf
from plopfast.cli import bench_arms as arms
from plopfast.data.example import Example
from plopfast.lora.shared import Prepared
from plopfast.training.loss import Objective

RANK = 16
# hidden, MLP, layers, heads, key-value heads, vocabulary
SHAPES = {
    "small": (576, 1536, 30, 9, 3, 49_152),
    "large": (2048, 8192, 16, 32, 8, 128_256),
    "dry": (64, 128, 2, 4, 2, 100),
}
# (rows of a step, steps of the warm-up, steps)
BATCHES = {"small": ((4, 5, 15), (32, 3, 8)), "large": ((4, 3, 8), (32, 2, 4)), "dry": ((4, 1, 2),)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "large"), default="small")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no case after this time (default: 240)")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "card_training.json", help="the file to write")
    parser.add_argument("--one-thread", action="store_true", help="backward passes in the calling thread")
    parser.add_argument("--compile", action="store_true", help="compiled blocks (plopfast's alone)")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    given = parser.parse_args()
    if "transformers" in (gone := card_gpu.missing("transformers", "peft", "accelerate")):
        measure.save(given.out, "no figures", {"trainings": [], "graphs": []})
        return
    backends = ["torch"] if given.dry else ["torch", "lora-first", "fused", "auto"]
    peers = ["PEFT"] + ["PEFT, liger"] * (not given.dry and not card_gpu.missing("liger_kernel"))
    size, device, dtype = ("dry", "cpu", torch.float32) if given.dry else (given.size, "cuda", torch.bfloat16)
    until, length = time.monotonic() + given.seconds, 16 if given.dry else 512
    torch.manual_seed(0)
    model = llama(SHAPES[size], device, dtype)
    lines, figures, graphs = [], [], []
    with torch.autograd.set_multithreading_enabled(not given.one_thread):
        lines += compare(model, length, BATCHES[size], backends + peers * (not gone), given.compile, until, figures)
        for rows in (4, 32) if size == "small" else ():
            for backend, p in (("torch", 0.0), ("lora-first", 0.0), ("lora-first", 0.1)):
                if time.monotonic() < until:
                    graphs.append(compare_graph(adapt(model, backend, p), rows, length, backend, p))
    lines += [
        "{tokens} tokens, {backend}, dropout {dropout}: {eager_ms:.1f} ms eagerly, {graph_ms:.1f} in a CUDA graph, {apart:.1g} apart, {losses} losses of 6 replays".format(
            **g
        )
        for g in graphs
    ]
    measure.save(given.out, "\n".join(lines), {"size": size, "trainings": figures, "graphs": graphs})


def llama(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    hidden, inner, layers, heads, kv, vocabulary = shape
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype).eval()


def compare(
    model: Any, length: int, batches: tuple[tuple[int, int, int], ...], names: list[str], compiled: bool, until: float,
    figures: list[dict[str, Any]],
) -> list[str]:  # fmt: skip
    """Trains each arm on each batch size, adds its figures, and returns the lines of a table."""
    count = sum(p.numel() for p in model.parameters()) / 1e6
    lines = [f"Llama of {count:.0f}M random parameters, rows of {length}, rank {RANK}, {model.dtype}"]
    lines.append(
        f"{'tokens':>7} {'path':<12}{'tokens/s':>10}{'step, ms':>10}{'GPU ms':>9}{'kernels':>9}{'peak MiB':>10}"
    )
    generator = torch.Generator().manual_seed(0)
    for rows, warm, steps in batches:
        tokens = torch.randint(0, model.config.vocab_size, (rows * 8, length), generator=generator).tolist()
        examples = [Example.after_prompt(row, 1, None, f"row {i}") for i, row in enumerate(tokens)]
        for arm in names:
            if time.monotonic() > until:
                return [*lines, f"time is up before {rows * length} tokens, {arm}"]
            gc.collect()
            fit, recipe = fitting(model, examples, arm, compiled), arms.Recipe(rows, steps, 1e-4, RANK)
            fit(replace(recipe, steps=warm))
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds = [fit(recipe) / steps for _ in range(3)]
            peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
            busy_ms, kernels = card_gpu.gpu_time(lambda fit=fit, recipe=recipe: fit(replace(recipe, steps=3)))
            row = {
                "tokens": rows * length, "path": arm, "tokens_per_s": rows * length / statistics.median(seconds),
                "step_ms": statistics.median(seconds) * 1e3, "gpu_ms": busy_ms / 3, "kernels": round(kernels / 3),
                "peak_mib": peak, "runs_ms": [round(each * 1e3, 1) for each in seconds],
            }  # fmt: skip
            figures.append(row)
            lines.append(
                "{tokens:>7} {path:<12}{tokens_per_s:>10.0f}{step_ms:>10.1f}{gpu_ms:>9.1f}{kernels:>9}{peak_mib:>10.0f}"
                "   runs {runs_ms}".format(**row)
            )
            print(lines[-1], flush=True)
            del fit
    return lines


def adapt(model: Any, backend: str, dropout: float = 0.0) -> Any:
    model = copy.deepcopy(model)
    pf.inject(model, arms.everywhere(model, RANK), backend=backend, dropout=dropout)
    for name, parameter in model.named_parameters():
        if dropout and name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)  # or no mask would change the loss
    return model


def fitting(model: Any, examples: list[Example], arm: str, compiled: bool) -> Callable[[arms.Recipe], float]:
    """A function that trains a copy of the model on, and returns the seconds."""
    if not arm.startswith("PEFT"):
        tuned = adapt(model, arm)
        return lambda recipe: arms.plopfast_fit(tuned, examples, recipe, compile=compiled)()[1]
    from transformers.models.llama import modeling_llama

    copied = copy.deepcopy(model)
    rotary = modeling_llama.apply_rotary_pos_emb
    if "liger" in arm:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        with mock.patch.multiple(modeling_llama, apply_rotary_pos_emb=rotary, LlamaRMSNorm=None, LlamaMLP=None):
            apply_liger_kernel_to_llama(model=copied)
            rotary = modeling_llama.apply_rotary_pos_emb  # for this arm alone
    wrapped = arms.peft_model(copied, arms.everywhere(copied, RANK))

    def fit(recipe: arms.Recipe) -> float:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotary):
            return arms.hf_fit(wrapped, examples, recipe, folder)()[1]

    return fit


def compare_graph(model: Any, rows: int, length: int, backend: str, p: float) -> dict[str, Any]:
    """One forward and backward pass in a CUDA graph against the same calls without one. With dropout each replay has a mask and
    a loss of its own, and so have the calls ("apart")."""
    objective = Objective(model.train())
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device="cuda")
    batch = {
        "input_ids": ids, "labels": ids, "at": torch.where(torch.ones(rows, length - 1, dtype=torch.bool, device="cuda")),
    }  # fmt: skip
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        with Prepared(model):
            loss = objective(batch) / (rows * (length - 1))
            return loss.detach(), *torch.autograd.grad(loss, parameters)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph, wanted = torch.cuda.CUDAGraph(), step()
    with torch.cuda.graph(graph):
        found = step()
    losses = set()
    for _ in range(6):
        graph.replay()
        losses.add(found[0].item())
    apart = max(float((p.float() - q.float()).abs().max()) for p, q in zip(found, wanted, strict=True))
    eager, captured = (seconds_of(lambda call=call: [call() for _ in range(10)]) * 100 for call in (step, graph.replay))
    return {"tokens": rows * length, "backend": backend, "dropout": p, "eager_ms": eager, "graph_ms": captured,
            "apart": apart, "losses": len(losses)}  # fmt: skip


if __name__ == "__main__":
    main()
