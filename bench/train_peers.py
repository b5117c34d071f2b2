"""plopfast's trainer against what people fine-tune with today: one epoch of the same examples, in one process.

    pip install 'plopfast[bench]' && python bench/train_peers.py [--cases abc] [--repeats 3] [--dtype bfloat16]

Cases: (a) SmolLM2-135M on the WordNet demo task, (b) on rows of 16 to 512 tokens, log-uniform, from Python's help texts,
(c) a random Llama of 64M parameters on rows of 512 tokens from there.

Arms: plopfast; PEFT with the Hugging Face Trainer, rows in random order or grouped by length; PEFT with TRL's
SFTTrainer; full fine-tuning with the Hugging Face Trainer. All get the same tokens, labels and base weights, torch's
AdamW, the same cosine schedule (no warmup: they count its steps differently), clipping at 1.0 and no dropout; the LoRA
arms also the same learning rate and initial adapters. Peers take 8 rows a step, plopfast the smallest token budget that
needs no more steps. The order of the rows is each trainer's own. Evaluation, saving, logging and gradient checkpointing
are off for all (SFTTrainer would switch checkpointing on; what still differs between its arguments and the Trainer's is
printed). In bfloat16 the base is loaded in bfloat16 and the peers run with `bf16=True` (autocast); PEFT and plopfast
both keep the adapters in float32.

Only training is timed (`train()`, `fit()`), in real tokens: padding is no work done. Memory is the peak of resident memory
during training less that of the loaded model before adapters and trainer exist. The first repeat also evaluates the
trained models, all by plopfast's `evaluate`; a round of a few rows that nobody measures comes before it.
"""

import argparse
import copy
import dataclasses
import importlib.metadata
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pydoc_data.topics import topics
from typing import Any

from plopfast import machine

machine.set_waiting_policy()

import measure
import torch

try:
    import datasets
    import peft
    import transformers
    import trl
    from transformers.trainer_callback import PrinterCallback
except ImportError as error:
    raise SystemExit(f"{error}: the trainers to compare with come with pip install 'plopfast[hf,bench]'") from None

import plopfast as pf
from plopfast.data import DEMO, IGNORE, Example
from plopfast.evaluate import choices_of, evaluate
from plopfast.lora import adapters

PEERS = ("peft", "transformers", "accelerate", "datasets", "trl")
TYPES = ["v_proj", "up_proj", "down_proj"]
RANK, ALPHA, ROWS = 16, 32.0, 8
LORA_LR, FULL_LR = 1e-3, 2e-5
# ratios of plopfast to PEFT with the Hugging Face Trainer in random order
TARGETS = dict.fromkeys("ab", "tokens/s >= 2.0, extra MiB <= 0.5, valid loss <= 1.01")
TARGETS["c"] = "tokens/s >= 1.3, valid loss <= 1.01"
COLUMNS = {
    "tokens_per_s": "tokens/s", "tokens_per_cpu_s": "tokens/CPU s", "padding": "padding", "steps": "steps",
    "extra_mib": "extra MiB", "valid_loss": "valid loss", "accuracy": "accuracy",
}  # fmt: skip


@dataclass
class Case:
    """A model and its data; `initial`: module name -> the lora_A from which every arm starts."""

    title: str
    model: Any
    tokenizer: Any
    train: list[Example]
    valid: list[Example]
    test: list[Example] = dataclasses.field(default_factory=list)
    choices: list[list[int]] | None = None
    batch_tokens: int = 0
    initial: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        scratch = copy.deepcopy(self.model)
        pf.inject(scratch, placement(scratch))
        self.initial = {name: module.lora_A.detach().clone() for name, module in adapters(scratch).items()}
        self.batch_tokens = max(len(e.tokens) for e in self.train)
        while pf.Trainer(scratch, train_config(self), self.train).max_steps > math.ceil(len(self.train) / ROWS):
            self.batch_tokens = math.ceil(self.batch_tokens * 1.02)


def placement(model: Any) -> pf.Placement:
    modules = {m.name: (RANK, ALPHA) for m in pf.linear_modules(model) if m.type in TYPES}
    return pf.Placement(modules, TYPES, "explicit", 0)


def case_a(dtype: torch.dtype, scale: float) -> Case:
    model, tokenizer = pf.load_model(dtype=dtype)
    counts = {"train": 192, "valid": 256, "test": 256}
    data = {k: pf.tokenize(pf.read_jsonl(DEMO[k])[: max(ROWS, int(n * scale))], tokenizer) for k, n in counts.items()}
    choices = choices_of(pf.tokenize(pf.read_jsonl(DEMO["test"]), tokenizer), tokenizer)
    return Case("SmolLM2-135M, WordNet demo", model, tokenizer, **data, choices=choices)


def case_b(dtype: torch.dtype, scale: float) -> Case:
    model, tokenizer = pf.load_model(dtype=dtype)
    train, valid = help_texts(tokenizer)
    rng = random.Random(0)
    log_uniform = [round(math.exp(rng.uniform(math.log(16), math.log(512)))) for _ in range(max(ROWS, int(72 * scale)))]
    held_out = max(1, len(log_uniform) * 4 // 9)
    data = cut(train, log_uniform[held_out:]), cut(valid, log_uniform[:held_out])
    return Case("SmolLM2-135M, rows of 16 to 512 tokens", model, tokenizer, *data)


def case_c(dtype: torch.dtype, scale: float) -> Case:
    tokenizer = pf.load_model()[1]
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=12,
        num_attention_heads=8, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    data = [cut(stream, [512] * max(ROWS, int(16 * scale))) for stream in help_texts(tokenizer)]
    return Case("random Llama, rows of 512 tokens", model, tokenizer, *data)


def help_texts(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of Python's help topics, for training and (every fifth topic) for validation."""
    texts = [text for _, text in sorted(topics.items())]
    split = [text for i, text in enumerate(texts) if i % 5], texts[::5]
    train, valid = (list(tokenizer("\n\n".join(part))["input_ids"]) for part in split)
    return train, valid


def cut(stream: list[int], lengths: list[int]) -> list[Example]:
    """Consecutive pieces of these lengths; every token but the first carries a label."""
    assert sum(lengths) <= len(stream), "the help texts are too short for so many rows: choose a smaller --rows"
    tokens = iter(stream)
    return [Example(tuple(islice(tokens, length)), 1, None, f"row {i}") for i, length in enumerate(lengths)]


def train_config(case: Case) -> pf.TrainConfig:
    return pf.TrainConfig(lr=LORA_LR, schedule="cosine", warmup=0.0, clip=1.0, batch_tokens=case.batch_tokens)


def plopfast(case: Case, model: Any, examples: list[Example], _folder: str) -> Callable[[], int]:
    pf.inject(model, placement(model))
    trainer = pf.Trainer(model, train_config(case), examples)
    return lambda: trainer.fit().steps


def peft_hf(case: Case, model: Any, examples: list[Example], folder: str, order: str = "random") -> Callable[[], int]:
    wrapped = peft.get_peft_model(model, lora_config())
    same_start(case, model)
    return hf_trainer(case, wrapped, examples, folder, LORA_LR, order)


def peft_trl(case: Case, model: Any, examples: list[Example], folder: str) -> Callable[[], int]:
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**hf_settings(model.dtype, folder, LORA_LR)), train_dataset=hf_dataset(examples),
        processing_class=case.tokenizer, peft_config=lora_config(),
    )  # fmt: skip
    same_start(case, model)
    return starter(trainer)


def hf_trainer(
    case: Case, model: Any, examples: list[Example], folder: str, lr: float = FULL_LR, order: str = "random"
) -> Callable[[], int]:
    arguments = transformers.TrainingArguments(**hf_settings(model.dtype, folder, lr), train_sampling_strategy=order)
    collator = transformers.DataCollatorForSeq2Seq(case.tokenizer)  # pads to the longest row, labels with -100
    data = {"train_dataset": hf_dataset(examples), "processing_class": case.tokenizer}
    return starter(transformers.Trainer(model, arguments, collator, **data))


ARMS = {
    "plopfast": plopfast, "peft+hf": peft_hf, "peft+hf grouped": partial(peft_hf, order="group_by_length"),
    "peft+trl": peft_trl, "full+hf": hf_trainer,
}  # fmt: skip


def starter(trainer: Any) -> Callable[[], int]:
    trainer.remove_callback(PrinterCallback)
    return lambda: int(trainer.train().global_step)


def hf_settings(dtype: torch.dtype, folder: str, lr: float) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": ROWS, "num_train_epochs": 1, "learning_rate": lr,
        "lr_scheduler_type": "cosine", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "use_cpu": True,
        "bf16": dtype == torch.bfloat16, "gradient_checkpointing": False, "save_strategy": "no",
        "eval_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_num_workers": 0, "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip


def hf_dataset(examples: list[Example]) -> Any:
    rows = [(list(e.tokens), [IGNORE] * e.start + list(e.tokens[e.start :])) for e in examples]
    return datasets.Dataset.from_list([{"input_ids": tokens, "labels": labels} for tokens, labels in rows])


def lora_config() -> Any:
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TYPES, lora_dropout=0.0, task_type="CAUSAL_LM")


def same_start(case: Case, model: Any) -> None:
    """PEFT's adapters of `model` get the values that plopfast's start from (B is zero in both)."""
    for name, lora_A in case.initial.items():
        model.get_submodule(name).lora_A["default"].weight.data.copy_(lora_A)


def sft_differences(dtype: torch.dtype) -> dict[str, list[Any]]:
    """Arguments that SFTConfig has in common with TrainingArguments and sets otherwise in this benchmark."""
    import transformers

    settings = hf_settings(dtype, "unused", LORA_LR)
    hf, sft = vars(transformers.TrainingArguments(**settings)), vars(trl.SFTConfig(**settings))
    return {key: [hf[key], sft[key]] for key in hf if hf[key] != sft[key] and key != "distributed_state"}


def run(case: Case, arm: str, examples: list[Example], evaluated: bool) -> dict[str, float]:
    """Trains a copy of the case's model on `examples` once; the figures, with the quality where `evaluated`."""
    model = copy.deepcopy(case.model)
    processed = 0

    def count(_module: Any, arguments: Any, _output: Any) -> None:
        nonlocal processed
        processed += arguments[0].numel()

    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = measure.peak_mib(lambda: None)
        train = ARMS[arm](case, model, examples, folder)
        hook = model.get_input_embeddings().register_forward_hook(count)

        def timed() -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            figures["steps"] = train()
            figures.update(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)

        figures["extra_mib"] = measure.peak_mib(timed) - before
        hook.remove()
    tokens = sum(len(e.tokens) for e in examples)
    assert processed >= tokens, f"{arm} saw {processed} tokens of {tokens}: not one epoch"
    figures |= {"tokens_per_s": tokens / figures["seconds"], "tokens_per_cpu_s": tokens / figures["cpu_seconds"]}
    figures |= {"padding": 1 - tokens / processed, "model_mib": before}
    return figures | (quality(case, model) if evaluated else {})


def quality(case: Case, model: Any) -> dict[str, float]:
    figures = {"valid_loss": evaluate(model, case.valid).loss}
    if case.choices:
        figures["accuracy"] = evaluate(model, case.test, choices=case.choices).accuracy
    return figures


def compare(name: str, case: Case, arms: list[str], repeats: int) -> tuple[list[str], dict[str, Any]]:
    """The case's lines of the table, and every run's figures."""
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    base = quality(case, case.model)
    for repeat in range(repeats + 1):
        for arm in arms:
            examples = case.train if repeat else case.train[: 2 * ROWS]
            figures = run(case, arm, examples, evaluated=repeat == 1)
            print(f"({name}) round {repeat}, {arm}:", ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
            if repeat:
                runs[arm].append(figures)
    size, tokens = sum(p.numel() for p in case.model.parameters()) / 1e6, [len(e.tokens) for e in case.train]
    lines = [
        f"({name}) {case.title}: {size:.0f}M parameters, {len(tokens)} rows of {min(tokens)} to {max(tokens)}, {sum(tokens)} tokens",
        f"{'arm':<18}" + "".join(f"{label:>14}" for label in COLUMNS.values()),
        line("base model", [base]),
        *(line(arm, each) for arm, each in runs.items()),
    ]
    if "plopfast" in arms:
        lines += [against(name, runs, arm) for arm in arms if arm != "plopfast"]
    return lines, {"base": base, "batch_tokens": case.batch_tokens, "runs": runs}


def line(who: str, runs: list[dict[str, float]]) -> str:
    """Medians; the quality is known from the first run alone."""
    text = f"{who:<18}"
    for key in COLUMNS:
        values = [run[key] for run in runs if key in run]
        text += f"{statistics.median(values):>14.4g}" if values else " " * 14
    return text


def against(name: str, runs: dict[str, list[dict[str, float]]], arm: str) -> str:
    ours, theirs = runs["plopfast"], runs[arm]
    parts = [f"valid loss {ours[0]['valid_loss'] / theirs[0]['valid_loss']:.4f}"]
    for key in ("extra_mib", "tokens_per_cpu_s", "tokens_per_s"):
        values = {"ours": [run[key] for run in ours], "theirs": [run[key] for run in theirs]}
        parts.insert(0, "{} {:.2f} ({:.2f} to {:.2f})".format(COLUMNS[key], *measure.ratios(values, "ours", "theirs")))
    targets = f"; targets {TARGETS[name]}" if arm == "peft+hf" else ""
    return f"plopfast / {arm}: {', '.join(parts)}{targets}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="abc")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of them, with commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=float, default=1.0, help="scales the number of rows")
    arguments = parser.parse_args()
    arms = arguments.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise SystemExit(f"--arms: expected some of {', '.join(ARMS)}, got {', '.join(unknown)}")
    import datasets

    warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing is being renamed
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    dtype = getattr(torch, arguments.dtype)
    differences = sft_differences(dtype)
    lines, cases = [f"SFTTrainer's other arguments, Trainer's and its own: {differences}"], {}
    for name in arguments.cases:
        case = {"a": case_a, "b": case_b, "c": case_c}[name](dtype, arguments.rows)
        more, cases[name] = compare(name, case, arms, arguments.repeats)
        lines += ["", *more]
    versions = machine.versions() | {name: importlib.metadata.version(name) for name in PEERS}
    figures = {"versions": versions, "sft_differences": {k: list(map(str, v)) for k, v in differences.items()}}
    measure.save(f"train_peers_{arguments.dtype}", "\n".join(lines), {**figures, "cases": cases})


if __name__ == "__main__":
    main()
