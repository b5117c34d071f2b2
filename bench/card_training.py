"""Tokens a second of training on this GPU: plopfast by backend, and PEFT with the Hugging Face Trainer.

    python bench/card_training.py [--seconds 240] [--one-thread] [--compile] [--dry]

Two models: the default one, and a random Llama of 1.2 billion parameters. All seven linears are adapted with rank 16; rows
have 512 random tokens; bfloat16, torch's AdamW, no checkpointing, no dropout. Medians of up to three trainings after a
warm-up. "GPU ms" and "kernels" are torch's profiler's sums for one step. --one-thread runs backward passes in the calling
thread. Then one CUDA graph of the default model's forward and backward pass against the same calls without one. --dry: a
tiny model on the CPU, which tests the script and measures nothing.
"""

import argparse
import copy
import gc
import tempfile
import time
from collections.abc import Callable
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import peft
import torch
import transformers

import plopfast as pf
from plopfast.data.example import Example
from plopfast.data.rows import IGNORE
from plopfast.lora.shared import prepared
from plopfast.training.loss import Objective

RANK, ALPHA = 16, 32.0
TYPES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARMS = ["torch", "lora-first", "fused", "PEFT"]
ADAPTED = dict[str, tuple[int, float]]
Fit = Callable[[int], float]  # steps -> seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no case after this time (default: 240)")
    parser.add_argument("--one-thread", action="store_true", help="backward passes in the calling thread")
    parser.add_argument("--compile", action="store_true", help="compiled blocks (plopfast's alone)")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    until = time.monotonic() + given.seconds
    with torch.autograd.set_multithreading_enabled(not given.one_thread):
        if given.dry:
            compare(
                "tiny",
                llama("cpu", torch.float32, 64, 128, 2, 4, 2, 100),
                16,
                [(4, 1, 2)],
                ARMS[::3],
                given.compile,
                until,
            )
            return
        model, _ = pf.load_model(dtype=torch.bfloat16, device="cuda")
        compare("SmolLM2-135M", model, 512, [(4, 5, 15), (32, 3, 8)], ARMS, given.compile, until)
        for rows in (4, 32):
            for backend in ("torch", "lora-first"):
                if time.monotonic() < until:
                    compare_graph(adapt(model, backend), rows, 512, backend)
        del model
        torch.manual_seed(0)
        billion = llama("cuda", torch.bfloat16, 2048, 8192, 16, 32, 8, 128_256)
        compare("Llama of 1.2B, random", billion, 512, [(4, 3, 8), (32, 2, 4)], ARMS, given.compile, until)


def llama(device: str, dtype: torch.dtype, hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype).eval()


def compare(
    title: str,
    model: Any,
    length: int,
    batches: list[tuple[int, int, int]],
    arms: list[str],
    compiled: bool,
    until: float,
) -> None:
    """Trains each arm on each (rows of a step, steps of the warm-up, steps), and prints a line for each."""
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{title}: {count:.0f}M parameters, rows of {length}, rank {RANK}, {model.dtype}")
    print(f"{'tokens':>7} {'path':<12}{'tokens/s':>10}{'step, ms':>10}{'GPU ms':>9}{'kernels':>9}{'peak MiB':>10}")
    cuda = model.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    for rows, warm, steps in batches:
        tokens = torch.randint(0, model.config.vocab_size, (rows * 8, length), generator=generator).tolist()
        for arm in arms:
            if time.monotonic() > until:
                print(f"time is up before {rows * length} tokens, {arm}")
                return
            gc.collect()
            fit = (
                peft_training(model, tokens, rows)
                if arm == "PEFT"
                else our_training(model, tokens, rows, arm, compiled)
            )
            fit(warm)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            runs = [fit(steps) for _ in range(3)]
            seconds = sorted(runs)[1]
            peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
            busy, kernels = gpu_time(lambda fit=fit: fit(3)) if cuda else (0.0, 0.0)
            line = f"{rows * length:>7} {arm:<12}{rows * length * steps / seconds:>10.0f}{seconds / steps * 1e3:>10.1f}"
            each = [round(run / steps * 1e3, 1) for run in runs]
            print(f"{line}{busy / 3:>9.1f}{kernels / 3:>9.0f}{peak:>10.0f}   runs {each}", flush=True)
            del fit


def adapt(model: Any, backend: str) -> Any:
    model = copy.deepcopy(model)
    adapted: ADAPTED = {i.name: (RANK, ALPHA) for i in pf.linear_modules(model) if i.type in TYPES}
    pf.inject(model, pf.Placement(adapted, TYPES, "explicit", 0), backend=backend)
    return model


def our_training(model: Any, tokens: list[list[int]], rows: int, backend: str, compiled: bool) -> Fit:
    model = adapt(model, backend)
    examples = [Example.after_prompt(tuple(row), 1, None, f"row {i}") for i, row in enumerate(tokens)]

    def fit(steps: int) -> float:
        options = {"warmup": 0.0, "batch_tokens": rows * len(tokens[0]), "compile": compiled}
        trainer = pf.Trainer(model, pf.TrainConfig(lr=1e-4, max_steps=steps, **options), examples)
        return seconds_of(trainer.fit)

    return fit


def peft_training(model: Any, tokens: list[list[int]], rows: int) -> Fit:
    cpu = model.device.type == "cpu"
    config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=TYPES, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    data = [{"input_ids": row, "labels": [IGNORE, *row[1:]]} for row in tokens]

    def fit(steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder, per_device_train_batch_size=rows, max_steps=steps, learning_rate=1e-4,
                lr_scheduler_type="cosine", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, bf16=not cpu, use_cpu=cpu,
                save_strategy="no", eval_strategy="no", logging_steps=steps, report_to="none", disable_tqdm=True,
            )  # fmt: skip
            trainer = transformers.Trainer(tuned, arguments, _collated, train_dataset=data)
            trainer.remove_callback(transformers.PrinterCallback)
            return seconds_of(trainer.train)

    return fit


def _collated(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any]) -> float:
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def gpu_time(call: Callable[[], Any]) -> tuple[float, int]:
    """(milliseconds of all kernels, their number)"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    rows = [e for e in profile.key_averages() if e.self_device_time_total]
    return sum(e.self_device_time_total for e in rows) / 1e3, sum(e.count for e in rows)


def compare_graph(model: Any, rows: int, length: int, backend: str) -> None:
    """One forward and backward pass in a CUDA graph against the same calls without one."""
    objective = Objective(model.train())
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device="cuda")
    batch = {
        "input_ids": ids, "labels": ids, "at": torch.where(torch.ones(rows, length - 1, dtype=torch.bool, device="cuda")),
    }  # fmt: skip
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        with prepared(model):
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
    graph.replay()
    wait()
    apart = max(float((p.float() - q.float()).abs().max()) for p, q in zip(found, wanted, strict=True))
    eager, captured = (seconds_of(lambda call=call: [call() for _ in range(10)]) * 100 for call in (step, graph.replay))
    print(
        f"graph, {rows * length} tokens, {backend}: {eager:.1f} ms eagerly, {captured:.1f} captured, {apart:.1g} apart",
        flush=True,
    )


if __name__ == "__main__":
    main()
