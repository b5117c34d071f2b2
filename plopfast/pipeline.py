"""The stages of a run, each reading and writing files of one run folder:

data -> score -> scores.json -> place -> placement.json -> train -> adapter/ -> evaluate -> eval.json -> report.html
"""

import contextlib
import dataclasses
import random
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from . import files, machine
from .checkpoint import load_adapter, save_adapter
from .config import RunConfig
from .data import DEMO, Example, batches_of, read_jsonl, tokenize
from .errors import ConfigError, FileError, TrainingError
from .evaluate import Metrics, choices_of, evaluate
from .lora import adapters, disabled, inject, merge, unload
from .models import DEFAULT_HUB_ID, context_length, load_model
from .nfn import NFNReport, score
from .placement import RULES, Placement, place
from .train import Trainer, TrainResult

DEMO_SETTINGS = {"max_steps": 60, "batch_tokens": 160}  # 8 rows a step: minutes on 2 cores
SCORE_ROWS = 8  # rows in a batch as it is handed to score(), which batches anew
STAGES = {  # what each stage leaves behind
    "score": "scores.json",
    "place": "placement.json",
    "train": "adapter",
    "eval": "eval.json",
    "report": "report.html",
}


class Run:
    """A run folder, its settings, and the model and data, loaded when a stage first needs them."""

    def __init__(
        self, folder: Path, config: RunConfig, *, overwrite: bool = False, resume: bool = False, progress: bool = False
    ) -> None:
        self.folder, self.config = folder, config
        self.overwrite, self.resume, self.progress = overwrite, resume, progress
        if config.threads:
            torch.set_num_threads(config.threads)

    # --- model and data ----------------------------------------------------------------------------------------------

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        with self.stage("load"):
            model, tokenizer = load_model(
                self.config.model, dtype=getattr(torch, self.config.dtype), device=device_for(self.config.device)
            )
        size = sum(p.numel() for p in model.parameters()) / 1e6
        self.say(f"{model.name_or_path}: {size:.1f}M parameters, {self.config.dtype}, {device_for(self.config.device)}")
        return model, tokenizer

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def paths(self) -> dict[str, Path]:
        given = {split: getattr(self.config, split) for split in DEMO}
        if given["train"] is None:
            if any(given[split] for split in ("valid", "test")):
                return {split: Path(path) if path else DEMO[split] for split, path in given.items()}
            return dict(DEMO)
        return {split: Path(path) for split, path in given.items() if path}

    def examples(self, split: str) -> list[Example]:
        """The tokenised rows of a split. Without a file of its own, validation is every 20th training row (held out
        from training) and test is validation."""
        if split not in self._examples:
            if split in self.paths:
                limit = self.config.max_length or context_length(self.model)
                self._examples[split] = tokenize(read_jsonl(self.paths[split]), self.tokenizer, limit)
                if split == "train" and "valid" not in self.paths:
                    rows = self._examples["train"]
                    self._examples["valid"] = rows[::20]
                    self._examples["train"] = [row for i, row in enumerate(rows) if i % 20] or rows
            elif split == "valid":
                self.examples("train")
            else:
                self._examples[split] = self.examples("valid")
        return self._examples[split]

    @cached_property
    def _examples(self) -> dict[str, list[Example]]:
        return {}

    # --- the run folder ----------------------------------------------------------------------------------------------

    def file(self, stage: str) -> Path:
        return self.folder / STAGES[stage]

    def say(self, text: str) -> None:
        if self.progress:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Notes a stage's seconds and peak memory in stages.json once it has ended well."""
        machine.reset_peak()
        began = time.perf_counter()
        yield
        path = self.folder / "stages.json"
        stages = files.read_json(path, "plopfast") if path.exists() else {}
        stages[name] = {
            "seconds": round(time.perf_counter() - began, 3),
            "peak_mib": round(machine.peak_mib(), 1),
            "command": " ".join(["plopfast", *sys.argv[1:]]),
        }
        files.write_json(path, stages)

    def write_config(self) -> None:
        settings = dataclasses.asdict(self.config)
        data = {s: {"file": str(p), "sha256": files.sha256(p)} for s, p in self.paths.items() if p.is_file()}
        value = {
            "plopfast": "config",
            "settings": settings,
            "model": self.config.model or DEFAULT_HUB_ID,
            "data": data,
            "versions": machine.versions(),
            "machine": machine.describe(),
        }
        files.write_json(self.folder / "config.json", value)

    def guard(self, stage: str) -> None:
        """Refuses to overwrite what a stage left behind, unless asked to."""
        files.refuse_existing(self.file(stage), self.overwrite)


def device_for(name: str) -> torch.device:
    """The device that a --device value names. Raises ConfigError where this machine has none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used on this machine: {first}; leave --device out") from None
    return device


# --- the stages ------------------------------------------------------------------------------------------------------


def run_score(run: Run) -> NFNReport:
    run.guard("score")
    rows = run.examples("train")
    sample = random.Random(run.config.seed).sample(rows, min(run.config.score_prompts, len(rows)))
    with run.stage("score"):
        report = score(
            run.model,
            batches_of(sample, SCORE_ROWS),
            tokens=run.config.score_tokens,
            baseline=run.config.baseline,
            compat=run.config.compat,
            seed=run.config.seed,
            progress=run.progress,
        )
    report.save(run.file("score"))
    run.write_config()
    run.say(report.table())
    return report


def run_place(run: Run) -> Placement:
    run.guard("place")
    report = NFNReport.load(run.file("score"))
    config = run.config
    rule = config.rule if config.rule in RULES else [name.strip() for name in config.rule.split(",") if name.strip()]
    placement = place(report, rule, k=config.k, rank=config.rank, alpha=config.alpha, seed=config.seed)
    placement.save(run.file("place"))
    run.say(str(placement))
    return placement


def run_train(run: Run) -> TrainResult:
    run.guard("train")
    placement = Placement.load(run.file("place"))
    config = run.config
    if run.paths["train"] == DEMO["train"]:
        unset: dict[str, Any] = {name: value for name, value in DEMO_SETTINGS.items() if getattr(config, name) is None}
        config = dataclasses.replace(config, **unset)
    train, valid = run.examples("train"), run.examples("valid")
    checkpoint = run.folder / "checkpoint.safetensors"
    if checkpoint.exists() and not (run.resume or run.overwrite):
        raise FileError(f"{checkpoint}: an unfinished training; pass --resume to go on, or --overwrite to start anew")
    unload(run.model)
    inject(run.model, placement, dropout=config.dropout, rslora=config.rslora, seed=config.seed)
    trainer = Trainer(run.model, config, train, valid, out=run.folder, progress=run.progress)
    with run.stage("train"):
        try:
            result = trainer.fit(resume=run.resume and checkpoint.exists())
        except TrainingError:
            if trainer.step:  # the last good adapters are of use to somebody
                save_adapter(run.model, run.folder / "adapter-before-failure", overwrite=True)
            raise
    save_adapter(run.model, run.file("train"), overwrite=run.overwrite)
    files.write_json(run.folder / "training.json", {**dataclasses.asdict(result), "tokens_per_s": result.tokens_per_s})
    checkpoint.unlink(missing_ok=True)
    run.write_config()
    return result


def run_eval(run: Run, adapter: Path | None = None) -> dict[str, Metrics]:
    """Base and tuned on the test rows; the base is the same model with its adapters switched off."""
    run.guard("eval")
    examples = run.examples("test")
    if not adapters(run.model):
        load_adapter(run.model, adapter or run.file("train"))
    choices = choices_of(examples, run.tokenizer)
    with run.stage("eval"):
        with disabled(run.model):
            base = evaluate(run.model, examples, choices=choices, progress="base" if run.progress else "")
        tuned = evaluate(run.model, examples, choices=choices, progress="tuned" if run.progress else "")
    files.write_json(run.file("eval"), {"base": base.as_dict(), "tuned": tuned.as_dict()})
    return {"base": base, "tuned": tuned}


def run_report(run: Run) -> Path:
    from .report import write_report  # needs the extra `report`

    run.guard("report")
    return write_report(run.folder)


def run_merge(run: Run, adapter: Path | None = None) -> Path:
    """The model with its adapter merged in, as Hugging Face writes it, in the run folder's `merged`."""
    target = run.folder / "merged"
    files.refuse_existing(target, run.overwrite)
    load_adapter(run.model, adapter or run.file("train"))
    merge(run.model)
    with files.replacing(target) as scratch:
        run.model.save_pretrained(scratch)
        run.tokenizer.save_pretrained(scratch)
    return target


def run_all(run: Run) -> str:
    """Every stage in order; with `resume`, those whose result lies in the folder already are left out."""
    if not run.resume:
        files.refuse_existing(run.folder, run.overwrite)
    else:
        run.overwrite = False
    from . import report  # noqa: F401  # a missing extra should stop the run before its work, not after

    for stage, do in (
        ("score", run_score), ("place", run_place), ("train", run_train), ("eval", run_eval), ("report", run_report),
    ):  # fmt: skip
        if run.resume and run.file(stage).exists():
            run.say(f"{stage}: already done")
            continue
        do(run)
    return summary(run.folder)


def summary(folder: Path) -> str:
    """The short table that ends a run."""
    scores = NFNReport.load(folder / STAGES["score"])
    placement = Placement.load(folder / STAGES["place"])
    metrics = files.read_json(folder / STAGES["eval"], "plopfast eval")
    stages = files.read_json(folder / "stages.json", "plopfast")
    chosen = ", ".join(f"{t} {scores.types[t]:.3f}" for t in placement.types)
    rows = [
        ("adapters", f"{chosen} (NFN; {placement.rule}), {placement.parameters:,} parameters"),
        *(
            (who, f"loss {m['loss']:.4f}, accuracy {m['accuracy']:.4f} ({m['metric']}, {m['examples']} rows)")
            for who, m in metrics.items()
        ),
        ("seconds", ", ".join(f"{name} {stage['seconds']:.1f}" for name, stage in stages.items())),
        ("written", str(folder)),
    ]
    return "\n".join(f"{label:<10}{text}" for label, text in rows)
