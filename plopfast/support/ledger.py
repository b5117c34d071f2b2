"""history.jsonl: what plopfast did in a folder, and so which files there are its own. Only those are ever replaced or deleted.

A line is written before a stage writes anything ("begin", with the names that it claims) and after it has ended ("done",
with the hashes of its inputs and outputs; "failed"). So a kill at any moment leaves no file that nobody claims. The other
events are those of previous.py, claims of single folders, and "adopted": a config.json that was copied here.
"""

import contextlib
import fnmatch
import functools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Predicate
from typing_extensions import NotRequired, TypedDict

from . import files
from .errors import FileError
from .schema import NotNegative, checked
from .strict_json import StrictJSON, dumps

HISTORY = "history.jsonl"
TAG = {"plopfast": "history"}  # begins each line
_BEGIN = dumps(TAG)[:-1]
Name = Annotated[str, Predicate(lambda name: name not in ("", ".", "..") and "/" not in name)]  # nothing is outside


class Event(TypedDict):
    event: Literal["adopted", "begin", "claim", "failed", "moving", "aside", "back", "complete", "cleared"]
    time: str
    stage: NotRequired[str]
    command: NotRequired[str]
    claims: NotRequired[dict[Name, list[str]]]
    stages: NotRequired[list[str]]
    moved: NotRequired[list[Name]]
    copied: NotRequired[list[Name]]
    until: NotRequired[str]
    data: NotRequired[dict[str, Any]]


class Done(TypedDict):
    event: str
    time: str
    stage: str
    command: str
    seconds: NotNegative
    peak_mib: NotNegative
    inputs: NotRequired[dict[str, str]]
    outputs: NotRequired[dict[str, str]]


class Ledger:
    """The history of a folder.

    A claim is a name in the folder with patterns of the files inside, as `fnmatch` reads them (none: it is a file).

    >>> ledger = Ledger(Path("runs/one"))
    >>> ledger.claim({"metrics.jsonl": (), "checkpoints": ("step-*.safetensors",)})
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / HISTORY

    def exists(self) -> bool:
        """Whether the folder carries plopfast's marker."""
        return self.path.is_file()

    def events(self) -> list[dict[str, Any]]:
        """The lines of the history, oldest first; one that a kill or a full disk cut short is left out.

        Raises FileError for a file of that name that plopfast did not write, and for a line that was changed.
        """
        files.check_regular(self.path)
        if self.path.is_symlink():
            raise FileError(f"{self.path}: a symbolic link, which could lead to another folder's: {files.OTHER_OUT}")
        return list(_parsed(self.path, self.path.read_bytes())) if self.path.exists() else []

    def add(self, event: str, **facts: Any) -> None:
        """Appends a line, and waits until it is on the disk. Raises FileError."""
        value = {**TAG, "event": event, "time": _now(), **facts}
        self.events()  # never appended to a file of the user's
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                torn = file.tell() and not _ends_a_line(file)
                file.write(b"\n" * bool(torn) + dumps(value).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FileError(f"{self.path}: cannot be written ({error.strerror}); {files.OTHER_OUT}") from error

    def claims(self) -> dict[str, set[str]]:
        """Every name that plopfast ever claimed here, with the patterns of the files inside."""
        found: dict[str, set[str]] = {}
        for event in self.events():
            for name, patterns in event.get("claims", {}).items():
                found.setdefault(name, set()).update(patterns)
        return found

    def foreign(self, name: str, claims: Mapping[str, Iterable[str]] | None = None) -> list[Path]:
        """What plopfast did not write under a name in the folder: unclaimed files, and all symbolic links."""
        claims, path = self.claims() if claims is None else claims, self.folder / name
        if not path.is_symlink() and not path.exists():
            return []
        if path.is_symlink() or name not in claims or not (path.is_dir() if claims[name] else path.is_file()):
            return [path]
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        return [file for file in inside if not _ours(file, path, claims[name])]

    def check(self, names: Iterable[str]) -> None:
        """Raises FileError where one of the names holds something that plopfast did not write."""
        claims = self.claims()
        for name in names:
            if found := self.foreign(name, claims):
                raise FileError(
                    f"{found[0]}: in the way, and {HISTORY} does not say that plopfast wrote it, so it is neither replaced nor "
                    f"deleted: move it away, or {files.OTHER_OUT}"
                )

    def claim(self, names: Mapping[str, Sequence[str]], event: str = "begin", **facts: Any) -> None:
        """Notes that these names will be written. Raises FileError as `check` does, before anything is noted."""
        self.check(names)
        self.add(event, claims={name: list(patterns) for name, patterns in names.items()}, **facts)

    def claim_once(self, names: Mapping[str, Sequence[str]]) -> None:
        """As `claim`, but notes nothing where all of it was claimed before."""
        claims = self.claims()
        if all(set(patterns) <= claims.get(name, set()) and name in claims for name, patterns in names.items()):
            self.check(names)
        else:
            self.claim(names, "claim")

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """As `files.replacing`, for a folder here whose files are claimed before it takes its place."""
        self.check([name])
        claimed = self.claims().get(name, set())
        with files.replacing(self.folder / name, mine=claimed.__contains__) as scratch:
            yield scratch
            self.add("claim", claims={name: sorted(inside(scratch))})

    def remove(self, names: Iterable[str]) -> None:
        """Deletes what is under these names. Raises FileError as `check` does, before anything is deleted."""
        names = list(names)
        self.check(names)
        for name in names:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def clear(self, name: str) -> None:
        """Deletes a folder's files that are plopfast's, and the folder if nothing else is in it."""
        claims, path = self.claims(), self.folder / name
        if path.is_symlink() or not path.is_dir() or name not in claims:
            return
        for file in sorted(path.rglob("*"), reverse=True):  # what is inside a folder comes before it
            if file.is_dir() and not file.is_symlink():
                with contextlib.suppress(OSError):  # not empty
                    file.rmdir()
            elif _ours(file, path, claims[name]):
                file.unlink()
        with contextlib.suppress(OSError):
            path.rmdir()

    def done(self) -> dict[str, dict[str, Any]]:
        """Each stage whose last work here ended well, with what its lines hold."""
        begun: dict[str, dict[str, Any]] = {}
        gone: dict[str, dict[str, Any]] = {}
        before: dict[str, dict[str, Any]] = {}
        found: dict[str, dict[str, Any]] = {}
        for event in self.events():
            kind, stage = event["event"], event.get("stage", "")
            if kind == "begin":
                begun[stage], before[stage] = event, found.pop(stage, {})
            elif kind == "done":
                found[stage] = begun.pop(stage, {}) | event
            elif kind == "failed" and before.get(stage):  # its earlier result is as it was
                found[stage] = before[stage]
            elif kind == "moving":  # to previous: see previous.py
                gone = {name: found[name] for name in event["stages"] if name in found} | gone
            elif kind == "back":
                found, gone = found | gone, {}
            elif kind == "complete":
                found, gone = {name: event for name, event in found.items() if gone.get(name) is not event}, {}
        return found

    def tidy(self) -> None:
        """Ends the swaps of files that a kill interrupted, and deletes scratch folders.

        Call it only while no other process writes here.
        """
        name = f".*{files.SCRATCH}"
        ours = [path for claimed in self.claims() if (path := self.folder / claimed).is_dir() and not path.is_symlink()]
        found = [*self.folder.glob(name), *(scratch for path in ours for scratch in path.rglob(name))]
        for scratch in sorted(found, reverse=True):  # what is inside a folder comes before it
            files.recover(scratch)


@functools.lru_cache(maxsize=1)  # a stage asks ten times or so, and checking a line takes 40 us
def _parsed(path: Path, content: bytes) -> tuple[dict[str, Any], ...]:
    found = []
    for number, line in enumerate(content.decode(errors="replace").split("\n"), 1):
        if not (line.startswith(_BEGIN) or _BEGIN.startswith(line)):
            raise FileError(f"{path}: not a history of plopfast, which has to write one there; {files.OTHER_OUT}")
        try:
            value = StrictJSON().parse(line)
        except ValueError:
            continue
        kind: Any = Done if value.get("event") == "done" else Event
        checked(kind, value, f"{path}, line {number}", files.OTHER_OUT, more=True)
        found.append(value)
    return tuple(found)


def inside(folder: Path) -> list[str]:
    """Names the files in a folder, relative to it."""
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _ours(file: Path, folder: Path, patterns: Iterable[str]) -> bool:
    relative = file.relative_to(folder).as_posix()
    if file.is_symlink():
        return False
    return file.is_dir() or (file.is_file() and any(fnmatch.fnmatchcase(relative, pattern) for pattern in patterns))


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
