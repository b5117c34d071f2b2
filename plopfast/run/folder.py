"""A run folder: what is in it, its settings, and the model and data, loaded when a stage first needs them."""

import contextlib
import dataclasses
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..data.describe import DataFacts, facts_of, left_out
from ..data.example import Example
from ..data.labels import tokenize
from ..data.notices import Notices
from ..data.rows import DEMO, Row, Rows
from ..data.text import read_text
from ..models.frozen import fingerprint
from ..models.linears import linear_modules
from ..models.loading import DEFAULT_HUB_ID, load_model, load_tokenizer
from ..support import files, machine, memory, ranks
from ..support.config import FILES, FREE, ROWS, RunConfig
from ..support.devices import device_for, dtype_for
from ..support.errors import ConfigError, DataError, FileError
from ..support.inputs import check_same
from ..support.progress import say
from ..support.settings_file import load_settings
from ..training import parallel
from ..training.state import CHECKPOINTS
from .splits import read_splits, resolved, sha256_of, sources_of

DEMO_SETTINGS = {"max_steps": 60, "batch_tokens": 160}  # 8 rows a step: minutes on 2 cores
SCORE_ROWS = 8  # rows in a batch as it is handed to score(), which batches anew
CONFIG, EVA = "config.json", "eva.safetensors"


# What each stage makes, its result first: a stage is done once that exists. The stage itself may delete these files and
# folders, and `plopfast run --overwrite` all of them. Nothing else in a run folder is ever deleted.
ARTEFACTS = {
    "data": ("data.json",),
    "score": ("scores.json", "scores.safetensors", EVA),
    "place": ("placement.json",),
    "estimate": ("estimate.json",),
    "train": (
        "adapter", "model", "metrics.jsonl", "training.json", CHECKPOINTS, "tensorboard", "adapter-before-failure",
    ),  # with --full the result is "model"
    "eval": ("eval.json",),
    "report": ("report.html", "report"),
    "merge": ("merged",),
    "audit": ("audit.json",),
    "trial": ("trial.json", "trial"),
    "search": ("search.json", "search.db", "search.db-journal"),
}  # fmt: skip
BY_ALL = (CONFIG, "stages.json")  # every stage writes these; a run that failed before its first result leaves them


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
        self._splits: dict[str, Rows] = {}
        self._examples: dict[str, list[Example]] = {}
        self.notes: dict[str, list[str]] = {}  # what is to be said of the rows of each split that was tokenised
        self._told: set[str] = set()
        self.overlap: list[str] = []  # what splits share
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

    @cached_property
    def _tokenizer(self) -> tuple[Any, int | None]:
        with ranks.first_on_each_machine():
            return load_tokenizer(self.config.model)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; it loads without the model, so that broken rows are found in seconds."""
        return self._tokenizer[0]

    def read(self, split: str) -> Rows:
        """The rows of "train", "valid" or "test" with their formats, columns that are not used, and bad rows.

        All splits are read at the first call; see `read_splits`.
        """
        if not self._splits:
            self._splits, self.overlap = read_splits(self.config, self.say)
            for line in self.overlap:
                self.say(line)
        return self._splits[split]

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, as read."""
        return self.read(split).rows

    def hashes(self, split: str) -> list[dict[str, str]]:
        """The sources of a split, "file", with their hashes, "sha256"; without files that are gone."""
        sources = sources_of(self.config)

        def rows() -> list[Row]:
            held_out = self.rows("valid") if split == "train" and "valid" not in sources else []
            return [*self.rows(split), *held_out]

        hashes = ((source, sha256_of(source, rows)) for source in sources.get(split, []))
        return [{"file": source, "sha256": digest} for source, digest in hashes if digest]

    def examples(self, split: str) -> list[Example]:
        """The rows of a split, tokenised; "unlabeled" is the text, if any, in rows of max_length or 512 tokens."""
        if split not in self._examples:
            if split == "test" and self.rows("test") is self.rows("valid"):  # there are no others
                self._examples[split] = self.examples("valid")
            elif split != "unlabeled":
                self._examples[split] = self._tokenized(split, self.rows(split))
            elif self.config.unlabeled:
                limits = [n for n in (self.config.max_length, self._tokenizer[1]) if n]
                room = min([self.config.max_length or 512, *limits, self.config.batch_tokens or 512])
                self._examples[split] = read_text(self.config.unlabeled, self.tokenizer, room)
            else:
                self._examples[split] = []
        return self._examples[split]

    def _tokenized(self, split: str, rows: Sequence[Row], roles: bool = False) -> list[Example]:
        """Rows tokenised as the settings say; what is to be said of them is kept in `notes`."""
        config, notices = self.config, Notices()
        limits = [n for n in (config.max_length, self._tokenizer[1]) if n]
        skipped: list[str] | None = [] if config.bad_rows == "skip" else None
        examples = tokenize(
            rows, self.tokenizer, min(limits, default=None), roles, learn=config.learn, long=config.long, skipped=skipped,
            notices=notices,
        )  # fmt: skip
        lines = [*left_out(skipped, len(rows)), *notices.lines(self._told)]
        if not examples:
            held_out = split == "valid" and split not in sources_of(config)
            remedy = "; they were held out from the training rows: give --valid FILE" if held_out else ""
            raise DataError(f"{split}: no row can be used; {'; '.join(lines)}{remedy}")
        if split not in self.notes:
            for line in lines:
                self.say(f"{split}: {line}")
        if not roles:
            self.notes[split] = lines
        return examples

    def described(self) -> DataFacts:
        """What the settings make of the rows: lengths, learned tokens, what is left out or overlaps, the first row."""
        found = []
        for split in DEMO:
            if split != "test" or self.rows("test") is not self.rows("valid"):
                examples = self.examples(split)
                found.append(facts_of(split, examples, self.tokenizer, [*self.read(split).lines(), *self.notes[split]]))
        if self.config.unlabeled:
            found.append(facts_of("unlabeled", self.examples("unlabeled"), self.tokenizer))
        return DataFacts(found, self.overlap)

    def sample(self, seed: int | None = None) -> list[Example]:
        """Draws the training rows to score, in random order, with the settings' seed by default.

        Rows of messages know the roles of their tokens.
        """
        rows, config = self.rows("train"), self.config
        rng = random.Random(config.seed if seed is None else seed)
        return self._tokenized("train", rng.sample(rows, min(config.score_prompts, len(rows))), roles=True)

    def inputs(self, without: str = "") -> dict[str, Any]:
        """What a study rests on besides settings, by name: the hash of each file but one, and some of the weights."""
        given = {split: self.hashes(split) for split in sources_of(self.config) if split != without}
        hashes = {f"the {split} file": _alone([one["sha256"] for one in of]) for split, of in given.items()}
        names = [info.name for info in linear_modules(self.model)][:8]
        return hashes | {"the model's weights": fingerprint(self.model, names)}

    def file(self, stage: str) -> Path:
        """The result of a stage."""
        return self.folder / ("model" if stage == "train" and self.config.full else ARTEFACTS[stage][0])

    def delete(self, *stages: str) -> None:
        """Deletes what these stages made, so that the results of two runs do not mix."""
        for name in (name for stage in stages for name in ARTEFACTS[stage]):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def refuse_results(self) -> None:
        """Raises FileError for a new run where results may not be replaced, or in a folder that is not plopfast's own."""
        left = {path.name for path in self.folder.iterdir()} - {*BY_ALL} if self.folder.is_dir() else set()
        if left and not self.overwrite:
            files.refuse_existing(self.folder, False)
        path = self.folder / CONFIG
        ours = path.is_file() and '"plopfast": "config"' in path.read_text(encoding="utf-8", errors="replace")
        if (named := left.intersection(chain(*ARTEFACTS.values()))) and not ours:
            raise FileError(
                f"{self.folder}: --overwrite would delete {min(named)}, but the folder has no config.json of plopfast: choose "
                "another --out"
            )

    def say(self, text: str) -> None:
        if self.progress:
            say(text)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Notes the seconds and peak memory of a stage in stages.json, once it has ended well.

        What the stage puts into the yielded dict is noted too.
        """
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
        """Raises FileError where the stage's result exists and may not be replaced, then keeps the settings."""
        ranks.on_main(lambda: files.refuse_existing(self.file(stage), self.overwrite))
        self.write_config()

    def write_config(self) -> None:
        given = {split: self.hashes(split) for split in sources_of(self.config)}
        value = {
            "plopfast": "config",
            "settings": dataclasses.asdict(self.config),
            "model": self.config.model or DEFAULT_HUB_ID,
            "device": str(device_for(self.config.device)),
            "data": {split: _alone(hashes) for split, hashes in given.items() if hashes},
            "versions": machine.versions(),
            "machine": machine.describe(),
        }
        ranks.on_main(lambda: files.write_json(self.folder / CONFIG, value))

    def _check_same_settings(self) -> None:
        path = self.folder / CONFIG
        kept = {name: value for name, value in load_settings(path).items() if name not in FREE}
        now = dataclasses.asdict(self.config)
        check_same(kept, {name: now[name] for name in kept}, path)  # an older folder may know fewer settings
        self._check_same_files(path)

    def _check_same_files(self, path: Path) -> None:
        """Rows of a folder or of the hub are not compared: they would have to be read."""
        sources, was, now = sources_of(self.config), {}, {}
        for split, kept in files.read_json(path, "plopfast run").get("data", {}).items():
            if split in sources and all(Path(name).is_file() for name in sources[split]):
                was[f"the {split} file"] = [one["sha256"] for one in (kept if isinstance(kept, list) else [kept])]
                now[f"the {split} file"] = [one["sha256"] for one in self.hashes(split)]
        check_same(was, now, path)


def resolve(config: RunConfig) -> RunConfig:
    """Fills in the demo's own settings, and makes the names of files absolute."""
    demo = {} if config.train else DEMO_SETTINGS
    known: dict[str, Any] = {name: value for name, value in demo.items() if getattr(config, name) is None}
    if config.epochs:
        known.pop("max_steps", None)
    rows = {name: resolved(value) for name in ROWS if (value := getattr(config, name))}
    text = {name: str(Path(value).resolve()) for name in {*FILES} - {*ROWS} if (value := getattr(config, name))}
    return dataclasses.replace(config, **known | rows | text)


def _alone(values: list[Any]) -> Any:
    """A single value without its list, as most splits have one file."""
    return values[0] if len(values) == 1 else values
