"""The two trainings that `plopfast bench --train` compares, and the process of its own in which one of them runs.

Both train the same adapters from the same values on the same rows: AdamW, a cosine schedule without warmup, clipping at 1,
no dropout, no weight decay, the same number of steps of the same number of rows. PEFT trains as its documentation says:
`get_peft_model`, then transformers' Trainer, with autocast where the base is in 16 bits; its adapters are float32, as ours.
liger-kernel is in neither, as the Trainer's default is. Each trainer orders the rows in its own way, seeded with the number
of the repeat: the Trainer at random, plopfast by like length, which is part of what is compared.
"""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import collate
from ..data.example import Example
from ..data.labels import tokenize
from ..data.rows import read_rows
from ..lora.init import draw_seeded_A
from ..lora.injection import inject, unload
from ..lora.placement import Placement
from ..models.linears import linear_modules
from ..models.loading import load_model
from ..support import devices, memory
from ..support.config import TrainConfig
from ..support.errors import PlopfastError
from ..training.evaluate import evaluate
from ..training.trainer import Trainer

ARMS = {"plopfast": "plopfast", "peft": "PEFT + HF Trainer"}
ALPHA = 2.0  # over the rank
WARM = 2  # steps before the measurement
Fit = Callable[[], tuple[int, float]]  # trains, and returns the number of steps and the seconds


@dataclass(frozen=True)
class Recipe:
    """How long and how fast both train; `rows` are those of one step."""

    rows: int
    steps: int
    lr: float
    rank: int
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One training of one arm, as its process is told."""

    arm: str
    model: str | None
    data: list[str]
    dtype: str
    device: str
    recipe: Recipe


def everywhere(model: nn.Module, rank: int) -> Placement:
    """Every linear module that both libraries adapt: all but the output head."""
    found = linear_modules(model)
    return Placement({info.name: (rank, ALPHA * rank) for info in found}, sorted({i.type for i in found}), "all", 0)


def plopfast_fit(model: nn.Module, examples: Sequence[Example], recipe: Recipe, **more: Any) -> Fit:
    """Trains a model that has adapters. `more` are settings of TrainConfig."""
    longest = max(len(example.tokens) for example in examples)
    size: dict[str, Any] = {"batch_rows": recipe.rows, "batch_tokens": recipe.rows * longest, "max_steps": recipe.steps}
    config = TrainConfig(lr=recipe.lr, warmup=0.0, seed=recipe.seed, liger=False, **size, **more)
    trainer, device = Trainer(model, config, examples, progress=False), next(model.parameters()).device

    def fit() -> tuple[int, float]:
        began = _now(device)
        steps = trainer.fit().steps
        return steps, _now(device) - began

    return fit


def peft_model(model: nn.Module, placement: Placement, seed: int = 0) -> Any:
    """Puts PEFT's adapters into `model`, which start as ours do."""
    import peft

    ranks = {rank for rank, _ in placement.modules.values()}
    assert len(ranks) == 1
    rank = ranks.pop()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=int(ALPHA * rank),
        lora_dropout=0.0,
        target_modules=list(placement.modules),
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config)
    start_alike(model, placement, seed)
    return wrapped


def start_alike(model: nn.Module, placement: Placement, seed: int = 0) -> None:
    """Gives PEFT's adapters in `model` the values from which `inject(..., seed=seed)` starts (B is zero in both)."""
    for name, (rank, _) in placement.modules.items():
        lora_A = model.get_submodule(f"{name}.lora_A.default").weight
        assert isinstance(lora_A, torch.Tensor)
        lora_A.data.copy_(draw_seeded_A("kaiming", rank, lora_A.shape[1], seed, name))


def hf_settings(folder: str, rows: int, lr: float, seed: int, model: nn.Module) -> dict[str, Any]:
    """The arguments of transformers' Trainer that make it train as plopfast does, and do nothing else."""
    parameter = next(model.parameters())
    return {
        "output_dir": folder, "per_device_train_batch_size": rows, "learning_rate": lr, "lr_scheduler_type": "cosine",
        "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": seed, "use_cpu": parameter.device.type == "cpu",
        "bf16": parameter.dtype == torch.bfloat16, "remove_unused_columns": False, "save_strategy": "no", "eval_strategy": "no",
        "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_num_workers": 0, "dataloader_pin_memory": parameter.device.type == "cuda",
    }  # fmt: skip


def hf_fit(model: Any, examples: Sequence[Example], recipe: Recipe, folder: str) -> Fit:
    """Trains what requires a gradient with transformers' Trainer. What it prepares before its first step is not timed."""
    import transformers

    device, times = next(model.parameters()).device, []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(_now(device))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(_now(device))

    settings = hf_settings(folder, recipe.rows, recipe.lr, recipe.seed, model)
    arguments = transformers.TrainingArguments(**settings, max_steps=recipe.steps)
    trainer = transformers.Trainer(model, arguments, collate, train_dataset=list(examples))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Clock)

    def fit() -> tuple[int, float]:
        steps = trainer.train().global_step
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or the next one would wrap it once more
        return steps, times[1] - times[0]

    return fit


def rows_of(data: Sequence[str], tokenizer: Any, longest: int | None, count: int) -> list[Example]:
    """The first `count` rows of the files; fewer are taken again from the start."""
    found = tokenize(read_rows(list(data)).rows[:count], tokenizer, longest)
    return (found * -(-count // len(found)))[:count]


def train(job: Job) -> dict[str, Any]:
    """Loads the model, warms up, trains once, and returns the figures.

    Memory is in MiB: at its peak, and above that of the loaded model (and of the process, on the CPU). Losses are of the
    rows that were trained on, before and after, measured by plopfast for both.
    """
    recipe, device = job.recipe, devices.device_for(job.device)
    model, tokenizer = load_model(job.model, dtype=devices.dtype_for(job.dtype, device), device=device)
    limit = getattr(model.config, "max_position_embeddings", None)
    examples = rows_of(job.data, tokenizer, limit, recipe.rows * recipe.steps)
    placement = everywhere(model, recipe.rank)
    before = evaluate(model, examples).loss
    _fit_once(job.arm, model, placement, examples, Recipe(recipe.rows, WARM, recipe.lr, recipe.rank))
    gc.collect()
    memory.reset_peak(device)
    held = memory.peak_mib(device)
    figures = _fit_once(job.arm, model, placement, examples, recipe, evaluated=True)
    peak, tokens = figures.pop("peak_mib"), sum(len(example.tokens) for example in examples)
    return {
        **figures, "tokens": tokens, "tokens_per_s": tokens / figures["seconds"], "peak_mib": peak, "above_mib": peak - held,
        "loss_before": before, "modules": len(placement.modules), "parameters": sum(p.numel() for p in model.parameters()),
        "shortest": min(len(e.tokens) for e in examples), "longest": max(len(e.tokens) for e in examples),
        "name": model.name_or_path, "dtype": str(model.dtype).removeprefix("torch."), "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
    }  # fmt: skip


def _fit_once(
    arm: str, model: nn.Module, placement: Placement, examples: list[Example], recipe: Recipe, evaluated: bool = False
) -> dict[str, Any]:
    """Trains new adapters and takes them out again."""
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        if arm == "plopfast":
            inject(model, placement)
            fit, undo = plopfast_fit(model, examples, recipe), lambda: unload(model)
        else:
            wrapped = peft_model(model, placement)
            fit, undo = hf_fit(wrapped, examples, recipe, folder), wrapped.unload
        steps, seconds = fit()
        figures: dict[str, Any] = {"steps": steps, "seconds": seconds, "peak_mib": memory.peak_mib(device)}
        if evaluated:
            figures["loss"] = evaluate(model, examples).loss
        undo()
    return figures


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """`python -m plopfast.cli.bench_arms JOB RESULT`: what `train` returns, or {"error": message}, or {"left_out": message}."""
    told = json.loads(Path(sys.argv[1]).read_text())
    job = Job(**{**told, "recipe": Recipe(**told["recipe"])})
    try:
        result = train(job)
    except PlopfastError as error:
        result = {"error": str(error)}
    except torch.OutOfMemoryError:
        result = {"left_out": "too little GPU memory"}
    Path(sys.argv[2]).write_text(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main()
