"""A run folder: what is in it, its settings, and the model and data, loaded when a stage first needs them."""

import contextlib
import dataclasses
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..data.labels import tokenize
from ..data.rows import DEMO, Example, read_jsonl
from ..data.text import read_text
from ..models.linears import context_length
from ..models.loading import DEFAULT_HUB_ID, load_model
from ..support import files, machine, ranks
from ..support.config import FILES, FREE, RunConfig, load_settings
from ..support.devices import device_for, dtype_for
from ..support.errors import ConfigError, FileError
from ..support.inputs import check_same
from ..training import parallel
from ..training.trainer import CHECKPOINTS

DEMO_SETTINGS = {"max_steps": 60, "batch_tokens": 160}  # 8 rows a step: minutes on 2 cores
SCORE_ROWS = 8  # rows in a batch as it is handed to score(), which batches anew
CONFIG, EVA = "config.json", "eva.safetensors"


@dataclass(frozen=True)
class Artefact:
    """A file or folder in a run folder, the stage that makes it, and whether its presence means that the stage is done."""

    name: str
    stage: str
    result: bool = False


# The stage that makes an artefact may delete it, and `plopfast run --overwrite` deletes all that are in this table.
ARTEFACTS = (
    Artefact("scores.json", "score", result=True),
    Artefact("scores.safetensors", "score"),
    Artefact(EVA, "score"),
    Artefact("placement.json", "place", result=True),
    Artefact("estimate.json", "estimate", result=True),
    Artefact("adapter", "train", result=True),
    Artefact("model", "train"),  # the result with --full
    Artefact("metrics.jsonl", "train"),
    Artefact("training.json", "train"),
    Artefact(CHECKPOINTS, "train"),  # while it runs
    Artefact("tensorboard", "train"),
    Artefact("adapter-before-failure", "train"),
    Artefact("eval.json", "eval", result=True),
    Artefact("report.html", "report", result=True),
    Artefact("report", "report"),
    Artefact("merged", "merge", result=True),
    Artefact("audit.json", "audit", result=True),
    Artefact("trial.json", "trial", result=True),
    Artefact("trial", "trial"),
    Artefact("search.json", "search", result=True),
    Artefact("search.db", "search"),
    Artefact("search.db-journal", "search"),
)
NEVER_DELETED = (
    CONFIG,
    "stages.json",
)  # every stage writes them; a run that failed before its first result leaves them
RESULTS = {artefact.stage: artefact.name for artefact in ARTEFACTS if artefact.result}


class Run:
    """A run folder, its settings, and the model and data, which are loaded when a stage first needs them.

    `overwrite` lets stages replace their results, `resume` lets them go on with unfinished work, and `progress` shows what
    they do on stderr. Raises ConfigError where `resume` meets other settings than the folder's own.
    """

    def __init__(
        self, folder: Path, config: RunConfig, *, overwrite: bool = False, resume: bool = False, progress: bool = False
    ) -> None:
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
        """The rows of a split, as read.

        Without a file of its own, the validation split is every 20th training row (held out from training), and the test
        split is the validation split.
        """
        if not self._rows:
            self._rows = {name: read_jsonl(path) for name, path in self.paths.items() if name != "unlabeled"}
            if "valid" not in self._rows:
                whole = self._rows["train"]
                self._rows |= {"valid": whole[::20], "train": [row for i, row in enumerate(whole) if i % 20] or whole}
            self._rows.setdefault("test", self._rows["valid"])
        return self._rows[split]

    def examples(self, split: str) -> list[Example]:
        """The rows of a split, tokenised; "unlabeled" is the text, if any, in rows of max_length or 512 tokens."""
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
        """Draws the training rows to score, in random order, with the settings' seed by default.

        Rows of messages know the roles of their tokens.
        """
        rows, config = self.rows("train"), self.config
        self.examples("train")  # raises for a row that cannot be used
        rng = random.Random(config.seed if seed is None else seed)
        chosen = rng.sample(rows, min(config.score_prompts, len(rows)))
        return tokenize(chosen, self.tokenizer, roles=True)

    def file(self, stage: str) -> Path:
        """The result of a stage."""
        return self.folder / ("model" if stage == "train" and self.config.full else RESULTS[stage])

    def delete(self, stage: str | None = None) -> None:
        """Deletes what a stage made (None: every stage), so that the results of two runs do not mix."""
        for artefact in ARTEFACTS:
            if stage in (None, artefact.stage):
                path = self.folder / artefact.name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def refuse_results(self) -> None:
        """Raises FileError for a new run in a folder that holds results, and for a folder that is not plopfast's."""
        left = (
            [path for path in self.folder.iterdir() if path.name not in NEVER_DELETED] if self.folder.is_dir() else []
        )
        if left and not self.overwrite:
            files.refuse_existing(self.folder, False)
        config = self.folder / CONFIG
        ours = config.is_file() and '"plopfast": "config"' in config.read_text(encoding="utf-8", errors="replace")
        named = {path.name for path in left} & {artefact.name for artefact in ARTEFACTS}
        if named and not ours:
            raise FileError(
                f"{self.folder}: --overwrite would delete {min(named)}, but the folder has no config.json of plopfast: choose "
                "another --out"
            )

    def say(self, text: str) -> None:
        if self.progress:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Notes the seconds and peak memory of a stage in stages.json, once it has ended well.

        What the stage puts into the yielded dict is noted too.
        """
        machine.reset_peak()
        began = time.perf_counter()
        noted: dict[str, Any] = {}
        yield noted
        if not ranks.is_main():
            return
        path = self.folder / "stages.json"
        stages = files.read_json(path, "plopfast") if path.exists() else {}
        stages[name] = {
            "seconds": round(time.perf_counter() - began, 3),
            "peak_mib": round(machine.peak_mib(), 1),
            "command": " ".join(["plopfast", *sys.argv[1:]]),
        } | noted
        files.write_json(path, stages)

    def begin(self, stage: str) -> None:
        """Raises FileError where the stage's result exists and may not be replaced, then keeps the settings."""
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
        ranks.on_main(lambda: files.write_json(self.folder / CONFIG, value))

    def _check_same_settings(self) -> None:
        path = self.folder / CONFIG
        kept = {name: value for name, value in load_settings(path).items() if name not in FREE}
        now = dataclasses.asdict(self.config)
        check_same(kept, {name: now[name] for name in kept}, path)  # an older folder may know fewer settings


def resolve(config: RunConfig) -> RunConfig:
    """Fills in the demo's own settings, and makes the names of files absolute."""
    demo = {} if config.train else DEMO_SETTINGS
    known: dict[str, Any] = {name: value for name, value in demo.items() if getattr(config, name) is None}
    known |= {name: str(Path(value).resolve()) for name in FILES if (value := getattr(config, name))}
    return dataclasses.replace(config, **known)
