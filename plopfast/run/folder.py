"""A run folder: which stage makes which files, which of them are done, and that nobody else's files are touched."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..integrations.checkpoints import GRPO_CHECKPOINT_FILES, GRPO_CHECKPOINTS
from ..lora.peft_files import FILES as ADAPTER
from ..support import files, machine, memory, ranks
from ..support.errors import ConfigError, FileError
from ..support.ledger import HISTORY, Ledger
from ..support.lock import LOCK, locked
from ..support.previous import Previous
from ..training.state import CHECKPOINT_FILES, CHECKPOINTS

CONFIG, EVA = "config.json", "eva.safetensors"
TENSORBOARD = "tensorboard"

# What each stage makes, its result first, with the names of the files inside a folder (None: `Ledger.replacing` claims them
# as they are written). history.jsonl has these claims, and only what is claimed there is ever replaced or deleted.
ARTEFACTS: dict[str, dict[str, Sequence[str] | None]] = {
    "run": {CONFIG: ()},  # every stage writes it
    "data": {"data.json": ()},
    "score": {"scores.json": (), "scores.safetensors": (), EVA: ()},
    "place": {"placement.json": ()},
    "estimate": {"estimate.json": ()},
    "train": {
        "adapter": ADAPTER, "model": None, "metrics.jsonl": (), "training.json": (), CHECKPOINTS: CHECKPOINT_FILES,
        TENSORBOARD: ("events.*",), "adapter-before-failure": ADAPTER,
    },  # with --full the result is "model"
    "grpo": {"adapter": ADAPTER, "grpo.json": (), "rewards.jsonl": (), GRPO_CHECKPOINTS: GRPO_CHECKPOINT_FILES},
    "eval": {"eval.json": (), "eval_rows.jsonl": ()},
    "report": {"report.html": (), "report": None},
    "merge": {"merged": None},
    "audit": {"audit.json": ()},
    "trial": {
        "trial.json": (),
        "trial": (
            "inputs.json", "criteria.json", "base/test.json", f"*{files.SCRATCH}/*",
            *(f"*/lr-*-seed-*/{name}" for name in (
                "result.json", "test.json", "metrics.jsonl", HISTORY, "model.safetensors", f"{TENSORBOARD}/events.*",
                *(f"adapter/{name}" for name in ADAPTER), *(f"{CHECKPOINTS}/{name}" for name in CHECKPOINT_FILES),
            )),
        ),
    },
    "multi": {"multi.json": ()},  # and jobs/NAME, each a run folder of its own
    "search": {"search.json": (), "search.db": (), "search.db-journal": ()},
}  # fmt: skip
READS = {
    "place": "score",
    "estimate": "place",
    "train": "place",
    "grpo": "place",
    "eval": "train",
    "merge": "train",
}  # from the folder
UNFINISHED = {
    "train": CHECKPOINTS,
    "grpo": GRPO_CHECKPOINTS,
    "trial": "trial",
    "search": "search.db",
}  # what a stage leaves that can be resumed
CARD = "README.md"  # of an adapter: what the hub shows of it. No stage reads it, and eval writes its figures into it
EARLIER = ("stages.json",)  # names that earlier versions wrote
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".gguf")


class Folder:
    """A run folder's files: a stage opens it, claims what it makes, and notes in history.jsonl how it ended.

    `facts()` gives what the history keeps of a beginning stage, `given()` the user's inputs (option, path), and
    `say` shows a line. `reads` are files that this process has read, and whose hashes a stage keeps.
    """

    def __init__(
        self, path: Path, *, overwrite: bool, resume: bool, full: bool, facts: Callable[[], dict[str, Any]],
        given: Callable[[], Sequence[tuple[str, Path]]], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.path, self.ledger, self.overwrite, self.resume = path, Ledger(path), overwrite, resume
        self.previous = Previous(self.ledger)
        self._full, self._facts, self._given, self._say = full, facts, given, say
        self.reads: list[Path] = []
        self.rewritten: list[str] = []  # files of earlier stages that the present one has changed
        self._holding = contextlib.ExitStack()
        self._opened = False
        self._pending: list[tuple[str, dict[str, Any]]] = []  # of the time before the folder was opened
        self._inner = 0.0  # seconds of the stages inside the present one

    def file(self, stage: str) -> Path:
        """The result of a stage."""
        return self.path / ("model" if stage == "train" and self._full else next(iter(ARTEFACTS[stage])))

    def is_done(self, stage: str) -> bool:
        """Whether the stage's result exists and is whole. One that was copied here, without a history, is."""
        if not self.file(stage).exists():
            return False
        return self.file(stage).name not in self.ledger.claims() or stage in self.ledger.done()

    def holds_results(self) -> bool:
        """Whether there is anything that a stage made, other than a page or settings."""
        made = [name for stage, names in ARTEFACTS.items() if stage not in ("run", "report") for name in names]
        return any((self.path / name).exists() for name in made)

    def open(self) -> None:
        """Locks the folder for this process until `close`, and ends what a kill interrupted in it.

        Raises FileError for a folder that is not plopfast's, is in use, or holds the inputs.
        """
        if self._opened:
            return
        self.check()
        self._holding.enter_context(locked(self.path))
        self._opened = True
        self.ledger.tidy()
        self.previous.tidy()
        if not self.ledger.exists() and _is_tagged(self.path / CONFIG):  # copied here, or an earlier version's
            self.ledger.add("adopted", claims={CONFIG: []})
        if "train" in self.ledger.done():  # a kill right at the end of the training left them
            self.ledger.clear(CHECKPOINTS)
        while self._pending:
            event, value = self._pending.pop(0)
            self.ledger.add(event, **value)

    def close(self) -> None:
        """Lets other processes in."""
        self._holding.close()
        self._opened = False

    def check(self) -> None:
        """Raises FileError for a folder that is not plopfast's, or holds the inputs.

        A folder without a history may hold nothing but plopfast's files: copies, or those of an earlier version.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileError(f"{self.path}: a file, where --out names a folder; {files.OTHER_OUT}")
        for name, given in self._given():
            if given.exists() and files.real(given).is_relative_to(files.real(self.path)):
                raise FileError(
                    f"{name} {given}: lies in --out {self.path}, whose files a run replaces: {files.OTHER_OUT}"
                )
        if self.ledger.events() or not self.path.is_dir():
            return
        held = sorted(path for path in self.path.iterdir() if path.name not in (LOCK, HISTORY))  # it can be empty yet
        known = {*EARLIER, *(name for names in ARTEFACTS.values() for name in names)}
        others = [path for path in held if path.name not in known]
        if held and (others or not any(map(_is_tagged, held))):
            raise FileError(
                f"{self.path}: holds {(others or held)[0].name} and no {HISTORY} of plopfast, which writes only into new or "
                f"empty folders and its own; {files.OTHER_OUT}"
            )

    def refuse_results(self) -> None:
        """Raises FileError where the folder has results, which a new run may replace only with `overwrite`."""
        self.open()
        self._refuse_earlier()

    def look(self, stage: str) -> None:
        """Raises FileError as the stage would when it begins, and writes nothing: call it before slow work."""
        self.check()
        if stage == "run":
            if not self.resume:
                self._refuse_earlier()
        elif not self.overwrite:
            self._refuse_taken(stage)
            if stage in UNFINISHED and not self.resume:
                self._refuse_unfinished(stage)

    def _refuse_earlier(self) -> None:
        names = [name for of in ARTEFACTS.values() for name in of if name != CONFIG and (self.path / name).exists()]
        if names and not self.overwrite:
            raise files.exists_already(self.path, f" (it holds {names[0]})", ", or --resume to go on")
        self.ledger.check(names)

    @contextlib.contextmanager
    def stage(self, stage: str, *, inputs: Sequence[Path] = ()) -> Iterator[dict[str, Any]]:
        """Works on a stage: claims its files before, and notes time, memory and hashes after, with what is put into the
        yielded dict. `inputs` are files or folders that it reads besides those of the run.

        Raises FileError where the stage's result exists and may not be replaced.
        """
        path = self.path / CONFIG
        kept = files.read_text(path, "gone") if stage in ARTEFACTS and path.is_file() else ""
        ranks.on_main(lambda: self._begin(stage))
        noted: dict[str, Any] = {}
        memory.reset_peak()
        began, outside, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield noted
        except BaseException as error:
            if ranks.is_main():
                with contextlib.suppress(FileError):  # a full disk is what has failed, as likely as not
                    self._add("failed", {"stage": stage, "error": str(error) or type(error).__name__})
                    if self._opened:
                        self.previous.bring_back(stage)
                    if kept and isinstance(error, ConfigError):  # settings that cannot be are not kept
                        files.write_text(path, kept)
            raise
        seconds = time.perf_counter() - began
        noted = {"seconds": round(seconds - self._inner, 3), "peak_mib": round(memory.peak_mib(), 1)} | noted
        self._inner = outside + seconds
        ranks.on_main(lambda: self._end(stage, noted, inputs))

    def _begin(self, stage: str) -> None:
        if stage not in ARTEFACTS:  # loading the model: it makes no files
            return
        self.open()
        if stage == "run":  # refuse_results has looked at the results
            if self.overwrite:
                self.set_aside("run", list(ARTEFACTS))
        elif self.overwrite and stage in UNFINISHED:
            self.set_aside(stage, [one for one in ARTEFACTS if self.file(one) == self.file(stage)])
        elif not self.overwrite:
            self._refuse_taken(stage)
        self.ledger.check(name for name in ARTEFACTS[stage] if name != "model" or self._full)
        if stage in UNFINISHED and not self.resume:
            self._refuse_unfinished(stage)
        claims = {name: patterns for name, patterns in ARTEFACTS[stage].items() if patterns is not None}
        facts = self._facts()
        self.ledger.claim({CONFIG: (), **claims}, stage=stage, command=machine.command(), **facts)
        files.write_json(self.path / CONFIG, {"plopfast": "config", **facts})

    def _refuse_taken(self, stage: str) -> None:
        if self._is_taken(stage):
            raise files.exists_already(self.file(stage), more=", or --resume to go on" * (stage == "search"))

    def _refuse_unfinished(self, stage: str) -> None:
        left = self.path / UNFINISHED[stage]
        if left.is_file() or (left.is_dir() and any(left.iterdir())):
            raise FileError(f"{left}: an unfinished {stage}; pass --resume to go on, or --overwrite to start anew")

    def _is_taken(self, stage: str) -> bool:
        """Whether the result is there to stay: done, or not of plopfast. A search that is done can be widened."""
        result = self.file(stage)
        own = result.name in self.ledger.claims()
        makers = [one for one in ARTEFACTS if self.file(one) == result]  # train and grpo both make adapter/
        done = any(map(self.is_done, makers)) if own else result.exists()
        return done and not (own and self.resume and stage == "search")

    def _end(self, stage: str, noted: dict[str, Any], inputs: Sequence[Path]) -> None:
        facts: dict[str, Any] = {"stage": stage, "command": machine.command()}
        if stage in ARTEFACTS:
            made = [CONFIG, *(name for name in ARTEFACTS[stage] if name not in (CHECKPOINTS, GRPO_CHECKPOINTS))]
            read = [self.file(READS[stage])] if stage in READS else []
            facts["outputs"] = hashes_in(self.path, [*made, *self.rewritten])
            read_here = hashes_in(self.path, [path.name for path in read])
            read_here.pop(f"adapter/{CARD}", None)
            facts["inputs"] = read_here | _hashes_of([*self.reads, *inputs])
            self.rewritten = []
        self._add("done", facts | noted)
        if stage in ("run", *UNFINISHED):
            self.previous.complete(stage)

    def _add(self, event: str, facts: dict[str, Any]) -> None:
        if self._opened:
            self.ledger.add(event, **facts)
        else:
            self._pending.append((event, facts))

    def set_aside(self, until: str, stages: Sequence[str]) -> None:
        """Moves the results of these stages to `previous` until the stage `until` is done."""
        names = {stage: ARTEFACTS[stage] for stage in stages if stage != "run"}
        if self.previous.set_aside(until, names, copied=[CONFIG]):
            self._say(f"the earlier results wait in {self.previous.path} until the new ones are complete")


def hashes_in(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of the files under these names in a folder, by their path in it."""
    found: dict[str, str] = {}
    for name in names:
        path = folder / name
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found |= {file.relative_to(folder).as_posix(): files.sha256(file) for file in inside if file.is_file()}
    return found


def _hashes_of(paths: Sequence[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in map(files.real, paths):
        inside = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES) if path.is_dir() else [path]
        found |= {str(file): files.sha256(file) for file in inside if file.is_file()}
    return found


def _is_tagged(path: Path) -> bool:
    """Whether this is a JSON file of plopfast's."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with contextlib.suppress(FileError):
        value = files.read_json(path, "plopfast")
        return isinstance(value, dict) and "plopfast" in value
    return False
