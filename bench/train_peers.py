"""plopfast's trainer against what people fine-tune with today: one epoch of the same examples, in one process.

    pip install 'plopfast[hf,bench]' && python bench/train_peers.py [--repeats 3] [--dtype bfloat16] [--cases abc]
    python bench/train_peers.py --keep peers.jsonl       # an hour on shared cores; goes on after a kill

Cases: (a) SmolLM2-135M on the WordNet demo task, (b) on rows of 16 to 512 tokens, log-uniform, from Python's help texts,
(c) a random Llama of 64M parameters on rows of 512 tokens from there.

Arms: plopfast; PEFT with the Hugging Face Trainer, rows in random order or grouped by length; PEFT with TRL's
SFTTrainer; full fine-tuning with the Hugging Face Trainer. All get the same tokens, labels and base weights, torch's
AdamW, the same cosine schedule (no warmup: they count its steps differently), clipping at 1.0 and no dropout; the LoRA
arms also the same learning rate and initial adapters. Peers take 8 rows a step, plopfast the smallest token budget that
needs no more steps. The order of the rows is each trainer's own, seeded with the repeat's number. Evaluation, saving,
logging and gradient checkpointing are off (SFTTrainer would switch checkpointing on; what still differs between its
arguments and the Trainer's is printed). In bfloat16 the base is loaded in bfloat16 and the peers run with `bf16=True`
(autocast); PEFT and plopfast both keep the adapters in float32.

Only training is timed (`fit()`, `train()`). Tokens are real ones, without padding; the share of padding counts the last
tokens of rows too, from which nothing is predicted. CPU time is less disturbed by other processes than wall time. Memory
is the peak of resident memory during training, less that of the loaded model before adapters and trainer exist.
plopfast's `evaluate` gives every arm's validation loss in each repeat, and its accuracy in the first. An unmeasured round
of 8 rows comes before.
"""

import argparse
import copy
import importlib.metadata
import json
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from plopfast.support import machine, threads

threads.set_waiting_policy()

import measure
import torch

try:
    import datasets
    import peft
    import transformers
    import trl
except ImportError as error:
    raise SystemExit(f"{error}: the trainers to compare with come with pip install 'plopfast[hf,bench]'") from None

import plopfast as pf
from plopfast.cli import bench_arms
from plopfast.data.example import Example
from plopfast.data.rows import DEMO, IGNORE
from plopfast.training.evaluate import choices_of, evaluate

PEERS = ("peft", "transformers", "accelerate", "datasets", "trl")
TYPES = ["v_proj", "up_proj", "down_proj"]
RANK, ALPHA, ROWS, LORA_LR, FULL_LR = 16, 32.0, 8, 1e-3, 2e-5
LORA = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TYPES, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
# ratios of plopfast to PEFT with the Hugging Face Trainer in random order
TARGETS = dict.fromkeys("ab", "tokens/s >= 2.0, extra MiB <= 0.5, loss <= 1.01")
TARGETS["c"] = "tokens/s >= 1.3, loss <= 1.01"
RATIOS = {"tokens_per_s": "tokens/s", "tokens_per_cpu_s": "tokens/CPU s", "extra_mib": "extra MiB", "loss": "loss"}
COLUMNS = {**RATIOS, "padding": "padding", "steps": "steps", "accuracy": "accuracy"}


@dataclass
class Case:
    """A model and its data."""

    title: str
    model: Any
    tokenizer: Any
    train: list[Example]
    valid: list[Example]
    test: list[Example] | None = None
    choices: list[list[int]] | None = None
    accumulate: int = 1
    batch_tokens: int = 0

    def __post_init__(self) -> None:
        scratch = copy.deepcopy(self.model)
        pf.inject(scratch, placement(scratch))
        self.batch_tokens = max(len(e.tokens) for e in self.train)
        while pf.Trainer(scratch, train_config(self), self.train).max_steps > math.ceil(len(self.train) / ROWS):
            self.batch_tokens = math.ceil(self.batch_tokens * 1.02)


def case_a(dtype: torch.dtype, scale: float) -> Case:
    model, tokenizer = pf.load_model(dtype=dtype)
    counts = {"train": 192, "valid": 128, "test": 256}
    whole = {split: pf.tokenize(pf.read_jsonl(DEMO[split]), tokenizer) for split in counts}
    data = {split: whole[split][: max(ROWS, int(count * scale))] for split, count in counts.items()}
    return Case("SmolLM2-135M, WordNet demo", model, tokenizer, **data, choices=choices_of(whole["test"]))


def case_b(dtype: torch.dtype, scale: float) -> Case:
    model, tokenizer = pf.load_model(dtype=dtype)
    rng, held_out = random.Random(0), max(ROWS, int(16 * scale))
    lengths = [round(16 * 32 ** rng.random()) for _ in range(3 * held_out)]
    data = help_texts(tokenizer, lengths[held_out:], lengths[:held_out])
    # four micro-batches a step, each of rows of like length, instead of one with all lengths in it
    return Case("SmolLM2-135M, rows of 16 to 512 tokens", model, tokenizer, *data, accumulate=4)


def case_c(dtype: torch.dtype, scale: float) -> Case:
    tokenizer = pf.load_model()[1]
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    data = help_texts(tokenizer, [512] * max(ROWS, int(16 * scale)), [512] * 8)
    return Case("random Llama, rows of 512 tokens", model, tokenizer, *data)


def help_texts(tokenizer: Any, *lengths: list[int]) -> list[list[Example]]:
    """Training and validation rows of these lengths: consecutive pieces of Python's help topics, every fifth of which is
    for validation. Every token but a row's first carries a label."""
    texts, splits = [text for _, text in sorted(topics.items())], []
    for part, sizes in zip(([t for i, t in enumerate(texts) if i % 5], texts[::5]), lengths, strict=True):
        tokens = tokenizer("\n\n".join(part))["input_ids"]
        assert sum(sizes) <= len(tokens), "the help texts are too short for so many rows: choose a smaller --rows"
        stream = iter(tokens)
        splits.append(
            [Example.after_prompt(tuple(islice(stream, size)), 1, None, f"row {i}") for i, size in enumerate(sizes)]
        )
    return splits


@dataclass(frozen=True)
class Job:
    """One training, in place. An arm takes a job, prepares it, and returns what trains and then gives the steps."""

    case: Case
    model: Any
    examples: list[Example]
    folder: str
    seed: int


def placement(model: Any) -> pf.Placement:
    modules = {m.name: (RANK, ALPHA) for m in pf.linear_modules(model) if m.type in TYPES}
    return pf.Placement(modules, TYPES, "explicit", 0)


def train_config(case: Case, seed: int = 0) -> pf.TrainConfig:
    size = {"batch_tokens": case.batch_tokens, "accumulate": case.accumulate}
    return pf.TrainConfig(lr=LORA_LR, warmup=0.0, clip=1.0, epochs=1, **size, seed=seed)


def plopfast(job: Job) -> Callable[[], int]:
    pf.inject(job.model, placement(job.model))
    trainer = pf.Trainer(job.model, train_config(job.case, job.seed), job.examples)
    return lambda: trainer.fit().steps


def peft_hf(job: Job, order: str = "random") -> Callable[[], int]:
    return hf(replace(job, model=bench_arms.peft_model(job.model, placement(job.model))), LORA_LR, order)


def peft_trl(job: Job) -> Callable[[], int]:
    arguments = trl.SFTConfig(**hf_settings(job, LORA_LR))
    trainer = trl.SFTTrainer(job.model, arguments, **hf_data(job), peft_config=peft.LoraConfig(**LORA))
    bench_arms.start_alike(job.model, placement(job.model))
    return starter(trainer)


def hf(job: Job, lr: float = FULL_LR, order: str = "random") -> Callable[[], int]:
    arguments = transformers.TrainingArguments(**hf_settings(job, lr), train_sampling_strategy=order)
    collator = transformers.DataCollatorForSeq2Seq(job.case.tokenizer)  # pads to the longest row, labels with -100
    return starter(transformers.Trainer(job.model, arguments, collator, **hf_data(job)))


ARMS: dict[str, Callable[[Job], Callable[[], int]]] = {
    "plopfast": plopfast, "peft+hf": peft_hf, "peft+hf grouped": lambda job: peft_hf(job, "group_by_length"),
    "peft+trl": peft_trl, "full+hf": hf,
}  # fmt: skip


def starter(trainer: Any) -> Callable[[], int]:
    trainer.remove_callback(transformers.PrinterCallback)
    return lambda: int(trainer.train().global_step)


def hf_settings(job: Job, lr: float) -> dict[str, Any]:
    settings = bench_arms.hf_settings(job.folder, ROWS, lr, job.seed, job.model)
    return settings | {"num_train_epochs": 1, "gradient_checkpointing": False}


def hf_data(job: Job) -> dict[str, Any]:
    labels = [
        [token if learned else IGNORE for token, learned in zip(e.tokens, e.is_learned(), strict=True)]
        for e in job.examples
    ]
    rows = datasets.Dataset.from_dict({"input_ids": [e.tokens for e in job.examples], "labels": labels})
    return {"train_dataset": rows, "processing_class": job.case.tokenizer}


def sft_differences(case: Case) -> dict[str, list[str]]:
    """Arguments that SFTConfig has in common with TrainingArguments and sets otherwise in this benchmark."""
    settings = hf_settings(Job(case, case.model, [], "unused", 0), LORA_LR)
    plain, sft = vars(transformers.TrainingArguments(**settings)), vars(trl.SFTConfig(**settings))
    return {k: [str(plain[k]), str(sft[k])] for k in plain if plain[k] != sft[k] and k != "distributed_state"}


def run(case: Case, arm: str, repeat: int) -> dict[str, float]:
    """Trains a copy of the case's model once; the figures, with those of quality unless it is the warm-up (0)."""
    figures: dict[str, float] = {"processed": 0}

    def count(_module: Any, arguments: Any, _output: Any) -> None:
        figures["processed"] += arguments[0].numel()

    def timed() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        figures["steps"] = train()
        figures.update(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)

    with tempfile.TemporaryDirectory() as folder:
        job = Job(case, copy.deepcopy(case.model), case.train if repeat else case.train[:ROWS], folder, repeat)
        figures["model_mib"] = measure.peak_mib(lambda: None)
        train = ARMS[arm](job)
        hook = job.model.get_input_embeddings().register_forward_hook(count)
        figures["extra_mib"] = measure.peak_mib(timed) - figures["model_mib"]
        hook.remove()
    tokens = sum(len(e.tokens) for e in job.examples)
    needed = tokens - len(job.examples)  # nothing is predicted from a row's last token
    assert figures["processed"] >= needed, f"{arm} saw {figures['processed']} tokens of {needed}: not one epoch"
    figures |= {"tokens_per_s": tokens / figures["seconds"], "tokens_per_cpu_s": tokens / figures["cpu_seconds"]}
    figures["padding"] = 1 - needed / figures["processed"]
    return figures | (quality(case, job.model, accuracy=repeat == 1) if repeat else {})


def quality(case: Case, model: Any, accuracy: bool) -> dict[str, float]:
    test = evaluate(model, case.test, choices=case.choices).accuracy if accuracy and case.test else None
    return {"loss": evaluate(model, case.valid).loss} | ({} if test is None else {"accuracy": test})


class Kept:
    """Figures of runs, kept in a file of JSON lines, if any; those of a case that it has are not made again."""

    def __init__(self, path: Path | None, case: str) -> None:
        self.path, self.case = path, case
        lines = path.read_text().splitlines() if path and path.exists() else []
        rows = [row for row in map(json.loads, lines) if row["case"] == case]
        self.runs: dict[tuple[str, int], dict[str, float]] = {
            (row["arm"], row["repeat"]): row["figures"] for row in rows
        }

    def run(self, case: Case, arm: str, repeat: int) -> dict[str, float]:
        found = self.runs.get((arm, repeat)) or run(case, arm, repeat)
        if self.path and repeat and (arm, repeat) not in self.runs:
            with self.path.open("a") as file:
                print(json.dumps({"case": self.case, "arm": arm, "repeat": repeat, "figures": found}), file=file)
        return found


def compare(case: Case, arms: list[str], repeats: int, kept: Kept) -> tuple[list[str], dict[str, Any]]:
    """The case's lines of the table, and every run's figures."""
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    base = quality(case, case.model, accuracy=True)
    measured = {(arm, repeat) for arm in arms for repeat in range(1, repeats + 1)}
    # where nothing is left to measure, nothing is warmed up
    for repeat in range(0 if measured - kept.runs.keys() else 1, repeats + 1):
        for arm in arms:
            found = kept.run(case, arm, repeat)
            print(f"{repeat} {arm}:", ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
            if repeat:
                runs[arm].append(found)
    size, lengths = sum(p.numel() for p in case.model.parameters()) / 1e6, [len(e.tokens) for e in case.train]
    lines = [
        f"{case.title}: {size:.0f}M parameters, {len(lengths)} rows of {min(lengths)} to {max(lengths)}, {sum(lengths)} tokens",
        f"{'':<18}" + "".join(f"{label:>14}" for label in COLUMNS.values()),
        line("base model", [base]),
    ]
    lines += [line(arm, each) for arm, each in runs.items()]
    for arm in arms if "plopfast" in arms else []:
        parts = []
        for key, label in RATIOS.items():
            values = {who: [each[key] for each in runs[who]] for who in ("plopfast", arm)}
            parts.append("{} {:.3g} ({:.3g} to {:.3g})".format(label, *measure.ratios(values, "plopfast", arm)))
        lines += [f"plopfast / {arm}: {', '.join(parts)}"] if arm != "plopfast" else []
    return lines, {"base": base, "batch_tokens": case.batch_tokens, "runs": runs}


def line(who: str, runs: list[dict[str, float]]) -> str:
    values = [[run[key] for run in runs if key in run] for key in COLUMNS]
    return f"{who:<18}" + "".join(f"{statistics.median(each):>14.4g}" if each else " " * 14 for each in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="abc")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=float, default=1.0, help="scales the number of rows")
    parser.add_argument(
        "--keep", type=Path, help="a file of results that is added to; runs that it has are not made again"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing is being renamed
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    lines, figures = [], {"versions": machine.versions() | {name: importlib.metadata.version(name) for name in PEERS}}
    for name in arguments.cases:
        case = {"a": case_a, "b": case_b, "c": case_c}[name](getattr(torch, arguments.dtype), arguments.rows)
        figures["sft_differences"] = sft_differences(case)
        kept = Kept(arguments.keep, f"{name} {arguments.dtype} {arguments.rows:g}")
        more, figures[name] = compare(case, arguments.arms, arguments.repeats, kept)
        lines += [f"({name}) {more[0]}", *more[1:], f"targets against peft+hf: {TARGETS[name]}", ""]
    lines.append(f"arguments that Trainer and SFTTrainer set otherwise: {figures['sft_differences']}")
    measure.save(f"train_peers_{arguments.dtype}", "\n".join(lines), figures)


if __name__ == "__main__":
    main()
