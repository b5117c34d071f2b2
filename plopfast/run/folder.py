"""A run folder: settings, files and what they hold; model and data, loaded when a stage first needs them."""

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

from ..data.labels import tokenize
from ..data.rows import DEMO, Example, read_jsonl
from ..data.text import read_text
from ..models.loading import DEFAULT_HUB_ID, load_model
from ..models.running import context_length
from ..support import files, machine, memory, ranks
from ..support.config import FREE, RunConfig, load_settings
from ..support.devices import device_for, dtype_for
from ..support.errors import ConfigError
from ..training import parallel
from ..training.state import CHECKPOINTS

DEMO_SETTINGS = {"max_steps": 60, "batch_tokens": 160}  # 8 rows a step: minutes on 2 cores
SCORE_ROWS = 8  # rows in a batch as it is handed to score(), which batches anew
NO_RESULT = ("config.json", "stages.json")  # a run that failed before its first result leaves these
STAGES = {  # what each stage leaves behind
    "score": "scores.json", "place": "placement.json", "estimate": "estimate.json", "train": "adapter",
    "eval": "eval.json", "report": "page.html", "audit": "audit.json", "trial": "trial.json", "search": "search.json",
}  # fmt: skip


EVA = "eva.safetensors"  # beside scores.json, where init is "eva"
OTHERS = (
    "scores.safetensors",
    EVA,
    "model",
    "metrics.jsonl",
    "training.json",
    CHECKPOINTS,
    "tensorboard",
    "adapter-before-failure",
    "merged",
    "report",
    "trial",
    "search.db",
)


class Run:
    """A run folder, its settings, and the model and data, loaded when a stage first needs them."""

    def __init__(self, folder: Path, config: RunConfig, *, overwrite=False, resume=False, progress=False) -> None:
        self.folder, self.config = folder, resolve(config)
        self.overwrite, self.resume, self.progress = overwrite, resume, progress
        self._rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        self._examples: dict[str, list[Example]] = {}
        if config.threads:
            torch.set_num_threads(config.threads)
        if resume:
            self._check_same_settings()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        self.say(f"loading {self.config.model or DEFAULT_HUB_ID} (a GGUF file is converted once, half a minute or so)")
        device, sharded = device_for(self.config.device), self.config.parallel == "fsdp"
        if sharded and ranks.size() == 1:
            raise ConfigError("--parallel fsdp spreads the weights over several processes: start it with torchrun")
        with self.stage("load"), ranks.first_on_each_machine():
            model, tokenizer = load_model(
                self.config.model,
                dtype=dtype_for(self.config.dtype, device, self.config.full),
                device="cpu" if sharded else device,
            )
        if sharded:
            parallel.shard(model, device)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        self.say(f"{model.name_or_path}: {size:.1f}M parameters, {model.dtype}, {device}")
        if self.config.dtype == "auto" and device.type == "cpu" and machine.has_bfloat16():
            self.say("this CPU multiplies bfloat16 faster than float32: try --dtype bfloat16")
        return model, tokenizer

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @property
    def paths(self) -> dict[str, Path]:
        given = {split: getattr(self.config, split) for split in (*DEMO, "unlabeled")}
        demo = DEMO if given["train"] is None else {}
        return demo | {split: Path(path) for split, path in given.items() if path}

    def rows(self, split: str) -> list[tuple[str, dict[str, Any]]]:
        """A split's rows as read. Without a file of its own, validation is every 20th training row (held out from
        training) and test is validation."""
        if not self._rows:
            self._rows = {name: read_jsonl(path) for name, path in self.paths.items() if name != "unlabeled"}
            if "valid" not in self._rows:
                whole = self._rows["train"]
                self._rows |= {"valid": whole[::20], "train": [row for i, row in enumerate(whole) if i % 20] or whole}
            self._rows.setdefault("test", self._rows["valid"])
        return self._rows[split]

    def examples(self, split: str) -> list[Example]:
        """A split's rows, tokenised; "unlabeled" is the text, if any, in rows as long as max_length or 512 tokens."""
        if split not in self._examples:
            limits = [n for n in (self.config.max_length, context_length(self.model)) if n]
            if split != "unlabeled":
                self._examples[split] = tokenize(self.rows(split), self.tokenizer, min(limits, default=None))
            elif self.config.unlabeled:
                room = min([self.config.max_length or 512, *limits, self.config.batch_tokens or 512])
                self._examples[split] = read_text(self.config.unlabeled, self.tokenizer, room)
            else:
                self._examples[split] = []
        return self._examples[split]

    def sample(self, seed: int | None = None) -> list[Example]:
        """Training rows to score, in random order, as many as the settings say (and with their seed by default); rows of
        messages know their tokens' roles."""
        rows, config = self.rows("train"), self.config
        self.examples("train")  # raises for a row that cannot be used
        rng = random.Random(config.seed if seed is None else seed)
        chosen = rng.sample(rows, min(config.score_prompts, len(rows)))
        return tokenize(chosen, self.tokenizer, roles=True)

    def file(self, stage: str) -> Path:
        return self.folder / ("model" if stage == "train" and self.config.full else STAGES[stage])

    def say(self, text: str) -> None:
        if self.progress:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Notes a stage's seconds and peak memory in stages.json once it has ended well, and what the stage puts into the
        yielded dict."""
        memory.reset_peak()
        began = time.perf_counter()
        noted: dict[str, Any] = {}
        yield noted
        if not ranks.is_main():
            return
        path = self.folder / "stages.json"
        stages = files.read_json(path, "plopfast") if path.exists() else {}
        stages[name] = {
            "seconds": round(time.perf_counter() - began, 3),
            "peak_mib": round(memory.peak_mib(), 1),
            "command": " ".join(["plopfast", *sys.argv[1:]]),
        } | noted
        files.write_json(path, stages)

    def begin(self, stage: str) -> None:
        """Refuses to overwrite what the stage left behind, unless asked to; then keeps the settings."""
        ranks.on_main(lambda: files.refuse_existing(self.file(stage), self.overwrite))
        self.write_config()

    def write_config(self) -> None:
        data = {s: {"file": str(p), "sha256": files.sha256(p)} for s, p in self.paths.items() if p.is_file()}
        value = {
            "plopfast": "config",
            "settings": dataclasses.asdict(self.config),
            "model": self.config.model or DEFAULT_HUB_ID,
            "device": str(device_for(self.config.device)),
            "data": data,
            "versions": machine.versions(),
            "machine": machine.describe(),
        }
        ranks.on_main(lambda: files.write_json(self.folder / "config.json", value))

    def _check_same_settings(self) -> None:
        kept = load_settings(self.folder / "config.json")
        changed = [
            f"{name} was {kept[name]}, is {value}"
            for name, value in dataclasses.asdict(self.config).items()
            if name not in FREE and name in kept and kept[name] != value
        ]
        if changed:
            raise ConfigError(f"--resume keeps a run's settings, but {'; '.join(changed)}: leave those options out")


def resolve(config: RunConfig) -> RunConfig:
    """The settings with the demo's own filled in and file names made absolute."""
    demo = {} if config.train else DEMO_SETTINGS
    known: dict[str, Any] = {name: value for name, value in demo.items() if getattr(config, name) is None}
    known |= {s: str(Path(value).resolve()) for s in (*DEMO, "unlabeled", "general") if (value := getattr(config, s))}
    return dataclasses.replace(config, **known)
