"""A run: its settings, and the model and data, which are loaded when a stage first needs them."""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..data.describe import DataFacts, facts_of, left_out
from ..data.example import Example
from ..data.labels import tokenize
from ..data.notices import Notices
from ..data.rows import Row, Rows, drawn
from ..data.text import read_text
from ..integrations.rewards import absolute
from ..models.fingerprints import fingerprint
from ..models.linears import linear_modules, number_of_weights, words_of_codes
from ..models.loading import DEFAULT_HUB_ID, load_model, load_tokenizer, path_of, shapes_source
from ..models.shapes import model_of
from ..report import kinds
from ..support import files, machine, ranks
from ..support.config import FILES, FREE, ROWS, RunConfig
from ..support.devices import device_for, dtype_for
from ..support.errors import ConfigError, DataError, ModelError
from ..support.inputs import check_same
from ..support.progress import say
from ..support.settings_file import load_settings
from ..training import parallel
from .folder import CONFIG, Folder
from .splits import read_splits, resolved, sha256_of, sources_of

DEMO_SETTINGS = {"max_steps": 60, "batch_tokens": 160}  # 8 rows a step: minutes on 2 cores


class Run:
    """A run folder, its settings, and the model and data, which are loaded when a stage first needs them.

    `overwrite` lets stages replace their results, `resume` lets them go on with unfinished work, and `progress` shows what
    they do on stderr. A run that is `like` another has its model and tokenizer. Raises ConfigError where `resume` meets other settings than the folder's own.
    """

    def __init__(
        self, folder: Path, config: RunConfig, *, overwrite: bool = False, resume: bool = False, progress: bool = False,
        like: "Run | None" = None,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.like = folder, resolve(config), like
        self.resume, self.progress = resume, progress
        self.at = Folder(
            folder,
            overwrite=overwrite,
            resume=resume,
            full=config.full,
            facts=self._facts,
            given=self._given,
            say=self.say,
        )
        self.file, self.stage = self.at.file, self.at.stage
        self._examples: dict[str, list[Example]] = {}
        self._hashes: dict[str, list[dict[str, str]]] = {}
        self.notes: dict[str, list[str]] = {}  # what is to be said of the rows of each split that was tokenised
        self._told: set[str] = set()
        self.overlap: list[str] = []  # what splits share
        if config.threads:
            torch.set_num_threads(config.threads)
        if resume:
            self._check_same_settings()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        if self.like:
            return self.like._loaded
        device, sharded = self._where()
        self.say(f"loading {self.config.model or DEFAULT_HUB_ID} (a GGUF file is converted once, half a minute or so)")
        with self.stage("load") as noted, ranks.first_on_each_machine():
            model, tokenizer = load_model(
                self.config.model,
                dtype=dtype_for(self.config.dtype, device, self.config.full),
                device="cpu" if sharded else device,
                quantize=self.config.quantize,
                quantize_head=self.config.quantize_head,
                embedding=self.config.embedding,
                stream=self.config.stream,
                resident_share=self.config.resident_share,
            )
            noted |= {"model": model.name_or_path, "model_type": model.config.model_type}
            noted["revision"] = getattr(model.config, "_commit_hash", None)
        if path := path_of(self.config.model):
            self.at.reads.append(path)
        if sharded:
            parallel.shard(model, device)
        codes = words_of_codes(model)
        if self.config.full and codes:
            raise ModelError(
                f"--full trains all weights, and {model.name_or_path} holds {codes}: give it dense weights"
            )
        more = f", {codes}" if codes else ""
        self.say(
            f"{model.name_or_path}: {number_of_weights(model) / 1e6:.1f}M parameters, {model.dtype}{more}, {device}"
        )
        if self.config.stream:
            self.say(str(model.streaming))
        return model, tokenizer

    def _where(self) -> tuple[torch.device, bool]:
        """The device, and whether the weights are spread over the processes. Raises ConfigError where that cannot be."""
        device, sharded = device_for(self.config.device), self.config.parallel == "fsdp"
        if sharded and ranks.size() == 1:
            raise ConfigError("--parallel fsdp spreads the weights over several processes: start it with torchrun")
        return device, sharded

    def ready(self, stage: str, *splits: str) -> None:
        """Raises what would stop a stage that needs these splits, before the model is loaded and anything is written: results
        that are there to stay, a device that is not there, rows that cannot be used.
        """
        ranks.on_main(lambda: self.at.look(stage))
        if not self.like:
            self._where()
        for split in splits:
            self.examples(split)

    def shapes(self) -> Any:
        """The model, or, before it is loaded, one of its shapes without values, for what its names and sizes tell."""
        found = None
        if not (self.is_loaded or (self.like and self.like.is_loaded)):
            with ranks.first_on_each_machine(), contextlib.suppress(ModelError):  # no such shapes: the model is loaded
                found = model_of(shapes_source(self.config.model))
        return self.model if found is None else found

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return "_loaded" in vars(self)

    @cached_property
    def _tokenizer(self) -> tuple[Any, int | None]:
        if self.like:
            return self.like._tokenizer
        with ranks.first_on_each_machine():
            return load_tokenizer(self.config.model)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; it loads without the model, so that broken rows are found in seconds."""
        return self._tokenizer[0]

    @property
    def context(self) -> int | None:
        """The longest row in tokens that the model takes, where that is known."""
        return self._tokenizer[1]

    @cached_property
    def splits(self) -> dict[str, Rows]:
        """The rows of "train", "valid" and "test", as far as there are any; see `read_splits`. "test" may be "valid"."""
        splits, self.overlap = read_splits(self.config, self.say)
        for line in self.overlap:
            self.say(line)
        return splits

    def read(self, split: str) -> Rows:
        """The rows of a split with their formats, columns that are not used, and bad rows.

        Raises ConfigError where only other splits were given.
        """
        if split not in self.splits:
            raise ConfigError(
                f"no {split} rows: the demo's do not go with --valid or --test of your own: give --{split} FILE too"
            )
        return self.splits[split]

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, as read."""
        return self.read(split).rows

    def hashes(self, split: str) -> list[dict[str, str]]:
        """The sources of a split, "file", with their hashes, "sha256"; without files that are gone. Kept, as each stage
        asks, and rows of a folder or of the hub are hashed one by one."""
        if split in self._hashes:
            return self._hashes[split]
        sources = sources_of(self.config)

        def rows() -> list[Row]:
            held_out = self.rows("valid") if split == "train" and "valid" not in sources else []
            return [*self.rows(split), *held_out]

        hashes = ((source, sha256_of(source, rows)) for source in sources.get(split, []))
        self._hashes[split] = [{"file": source, "sha256": digest} for source, digest in hashes if digest]
        return self._hashes[split]

    def examples(self, split: str) -> list[Example]:
        """The rows of a split, tokenised; "unlabeled" is the text, if any, in rows of max_length or 512 tokens."""
        if split not in self._examples:
            if split == "test" and self.read("test") is self.splits.get("valid"):  # there are no others
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
        for split, rows in self.splits.items():
            if split != "test" or rows is not self.splits.get("valid"):
                examples = self.examples(split)
                found.append(facts_of(split, examples, self.tokenizer, [*rows.lines(), *self.notes[split]]))
        if self.config.unlabeled:
            found.append(facts_of("unlabeled", self.examples("unlabeled"), self.tokenizer))
        return DataFacts(found, self.overlap)

    def sample(self, seed: int | None = None) -> list[Example]:
        """Draws the training rows to score, in random order, with the settings' seed by default.

        Rows of messages know the roles of their tokens.
        """
        rows = drawn(self.rows("train"), self.config.score_prompts, self.config.seed if seed is None else seed)
        return self._tokenized("train", rows, roles=True)

    def inputs(self, without: str = "") -> dict[str, Any]:
        """What a study rests on besides settings, by name: the hash of each file but one, and some of the weights."""
        given = {split: self.hashes(split) for split in sources_of(self.config) if split != without}
        hashes = {f"the {split} file": _alone([one["sha256"] for one in of]) for split, of in given.items()}
        names = [info.name for info in linear_modules(self.model)][:8]
        return hashes | {"the model's weights": fingerprint(self.model, names)}

    def say(self, text: str) -> None:
        if self.progress:
            say(text)

    def _given(self) -> list[tuple[str, Path]]:
        """The inputs (option, path) that the user gave; paths that do not exist are names of the hub."""
        rows = [(f"--{split}", name) for split, names in sources_of(self.config).items() for name in names]
        rows += [(option, name.partition(":")[0]) for option, name in rows]  # FOLDER:SPLIT
        config = self.config
        named = [("--model", config.model), ("--general", config.general), ("--must-keep", config.must_keep)]
        return [(option, Path(name)) for option, name in [*rows, *named] if name]

    def _facts(self) -> dict[str, Any]:
        """What config.json and the history keep of a stage that begins."""
        given = {split: self.hashes(split) for split in sources_of(self.config)}
        return {
            "settings": dataclasses.asdict(self.config),
            "model": self.config.model or DEFAULT_HUB_ID,
            "device": str(device_for(self.config.device)),
            "data": {split: _alone(hashes) for split, hashes in given.items() if hashes},
            "versions": machine.versions(),
            "machine": machine.describe(),
        }

    def _check_same_settings(self) -> None:
        path = self.folder / CONFIG
        kept = {name: value for name, value in load_settings(path).items() if name not in FREE}
        now = dataclasses.asdict(self.config)
        if "model" in kept:  # earlier versions kept it as it was given
            kept["model"] = _absolute(kept["model"])
        check_same(kept, {name: now[name] for name in kept}, path)  # an older folder may know fewer settings
        self._check_same_files(path)

    def _check_same_files(self, path: Path) -> None:
        """Rows of a folder or of the hub are not compared: they would have to be read."""
        sources, was, now = sources_of(self.config), {}, {}
        for split, kept in kinds.read(path, "plopfast run").get("data", {}).items():
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
    text = {name: str(files.real(value)) for name in {*FILES} - {*ROWS} if (value := getattr(config, name))}
    if config.model and "://" in config.model and not Path(config.model).exists():  # before it is written down
        raise ConfigError("model: a URL, where a Hugging Face hub id, a folder or a .gguf file is expected")
    known["model"] = _absolute(config.model)
    known["reward"] = absolute(config.reward)
    return dataclasses.replace(config, **known | rows | text)


def _absolute(model: str | None) -> str | None:
    """A folder of the same name elsewhere is another model. Links stay: those to a GGUF file may lead to another name."""
    return str(Path(model).absolute()) if model and Path(model).exists() else model


def _alone(values: list[Any]) -> Any:
    """A single value without its list, as most splits have one file."""
    return values[0] if len(values) == 1 else values
