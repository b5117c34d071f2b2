"""history.jsonl: what plopfast did in a folder, and so which files there are its own. Only those are ever replaced or deleted.

A line is written before a stage writes anything ("begin", with the names that it claims) and after it has ended ("done",
with the hashes of its inputs and outputs; "failed"). So a kill at any moment leaves no file that nobody claims. "aside" and
"complete" frame the time in which earlier results wait in `previous` until those that replace them are complete.
"""

import contextlib
import fnmatch
import glob
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

HISTORY, PREVIOUS = "history.jsonl", "previous"
MOVES = ("moving", "aside", "back", "complete", "cleared")
_BEGINS = '{"plopfast": "history", '
Name = Annotated[str, Predicate(lambda name: name not in ("", ".", "..") and "/" not in name)]  # nothing is outside


class Event(TypedDict):
    event: Literal["adopted", "begin", "claim", "failed", "moving", "aside", "back", "complete", "cleared"]
    time: str
    stage: NotRequired[str]
    command: NotRequired[str]
    claims: NotRequired[dict[Name, list[str]]]
    stages: NotRequired[list[str]]
    names: NotRequired[list[Name]]
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
        """The lines of the history, oldest first; one that a kill cut short is left out.

        Raises FileError for a file of that name that plopfast did not write, and for a line that was changed.
        """
        if self.path.is_symlink():
            raise FileError(f"{self.path}: a symbolic link, which could lead to another folder's: {files.OTHER_OUT}")
        if not self.path.exists():
            return []
        found = []
        text = files.read_text(self.path, "no such file")
        for number, line in enumerate(text.split("\n"), 1):  # names may hold other separators of lines
            if not line.strip():
                continue
            try:
                value = StrictJSON().parse(line.strip())
            except ValueError:
                continue
            if not isinstance(value, dict) or value.get("plopfast") != "history":
                break
            kind: Any = Done if value.get("event") == "done" else Event
            found.append(
                checked(kind, value, Path(f"{self.path}, line {number}"), files.OTHER_OUT, more=True) and value
            )
        else:
            cut_short = text.startswith(_BEGINS) and "\n" not in text  # the first line
            if found or not text.strip() or cut_short:
                return found
        raise FileError(f"{self.path}: not a history of plopfast, which has to write one there; {files.OTHER_OUT}")

    def add(self, event: str, **facts: Any) -> None:
        """Appends a line, and waits until it is on the disk. Raises FileError."""
        value = {"plopfast": "history", "event": event, "time": _now(), **facts}
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
            self.add("claim", claims={name: sorted(_inside(scratch))})

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
            elif kind == "aside":
                # what waits already stays; what was made since is deleted
                gone = {name: found.pop(name) for name in event["stages"] if name in found} | gone
                before.clear()
            elif kind == "back":
                found |= gone
            if kind in ("back", "complete"):
                gone = {}
        return found

    def set_aside(self, stage: str, names: Mapping[str, Iterable[str]], copied: Sequence[str] = ()) -> bool:
        """Moves the results of the stages in `names` to `previous`, until `stage` is complete; returns whether there are any.

        Files in `copied` go there, too, and stay. Where an earlier result of the same name waits there already, the one
        here is the rest of a work that was stopped: it is deleted. Raises FileError as `check` does, before anything is moved.
        """
        present = [name for names_of in names.values() for name in names_of if (self.folder / name).exists()]
        if not present:
            return False
        self.check(present)
        waiting = self.waiting()
        self._refuse_to_mix(stage, names, waiting)
        inside = [f"{name}/{file}" for name in present for file in _inside(self.folder / name)]
        self.claim({PREVIOUS: [glob.escape(part) for part in (*present, *copied, *inside)]}, "claim")
        until = "run" if waiting == "run" else stage
        self.add("moving", stages=list(names), names=present, copied=list(copied), until=until)
        self._end_the_move()
        return True

    def _refuse_to_mix(self, stage: str, names: Mapping[str, Iterable[str]], waiting: str) -> None:
        """Raises FileError where `previous` holds what this stage would delete before its time, or what nobody waits for."""
        target, done = self.folder / PREVIOUS, self.done()
        if stage == waiting or not target.is_dir() or not any(target.iterdir()) or (waiting and stage == "run"):
            return
        twice = [one for one in names if one in done and any((target / name).exists() for name in names[one])]
        if waiting != "run" or twice:
            why = f": what is in it waits until {waiting} is complete (plopfast {waiting} --resume)" * bool(waiting)
            raise FileError(f"{target}: in the way{why}; move it away, or {files.OTHER_OUT}")

    def _end_the_move(self) -> None:
        """Does what the line "moving", the last, says; a kill can have interrupted it."""
        last, target = self._last_move(), self.folder / PREVIOUS
        copied = last["copied"]
        target.mkdir(exist_ok=True)
        for name in copied:
            if (self.folder / name).is_file() and not (target / name).exists():
                shutil.copy2(self.folder / name, target / name)
        for name in last["names"]:
            if not (self.folder / name).exists():
                continue
            if (target / name).exists():
                self.remove([name])
            else:
                _move(self.folder / name, target / name)
        moved = [path.name for path in target.iterdir() if path.name not in copied]
        self.add("aside", stages=last["stages"], names=moved, copied=copied, until=last["until"])

    def waiting(self) -> str:
        """The stage that has to be complete before the results in `previous` are deleted; nothing if there are none."""
        last = self._last_move()
        return last["until"] if last.get("event") == "aside" else ""

    def _last_move(self) -> dict[str, Any]:
        moves = [event for event in self.events() if event["event"] in MOVES]
        return moves[-1] if moves else {}

    def bring_back(self, stage: str) -> None:
        """Moves the results in `previous` back that waited for this stage, which has failed, unless it has made something."""
        last = self._last_move()
        if last.get("event") != "aside" or last["until"] != stage:
            return
        names = [name for name in last["names"] if (self.folder / PREVIOUS / name).exists()]
        if not any((self.folder / name).exists() for name in names):
            for name in [*names, *(name for name in last["copied"] if (self.folder / PREVIOUS / name).exists())]:
                _move(self.folder / PREVIOUS / name, self.folder / name)
            self.add("back", stage=stage)
            self.tidy()

    def _are_back(self, names: list[str]) -> bool:
        """Whether the user moved what waited in `previous` to its place again."""
        if any((self.folder / PREVIOUS / name).exists() or not (self.folder / name).exists() for name in names):
            return False
        known: dict[str, set[str]] = {}
        for event in self.events():
            for file, digest in event.get("outputs", {}).items():
                known.setdefault(file, set()).add(digest)
        held = [file for name in names for file in known if file == name or file.startswith(f"{name}/")]
        return all((path := self.folder / file).is_file() and files.sha256(path) in known[file] for file in held)

    def complete(self, stage: str) -> None:
        """Deletes the results in `previous` that waited for this stage."""
        if self.waiting() == stage:
            self.add("complete", stage=stage)
            self.tidy()

    def tidy(self) -> None:
        """Ends what a kill interrupted: half-done swaps, scratch folders, and results in `previous` that wait no longer.

        Call it only while no other process writes here.
        """
        for scratch in [path for path in self.folder.glob(f".*{files.SCRATCH}") if path.is_dir()]:
            files.recover(scratch)
        last = self._last_move().get("event")
        if last == "moving":
            self._end_the_move()
        elif last == "aside" and self._are_back(self._last_move()["names"]):
            self.add("back")
        if self._last_move().get("event") in ("back", "complete"):
            self.clear(PREVIOUS)
            self.add("cleared")  # whatever is there later is the user's


def _move(path: Path, target: Path) -> None:
    try:
        path.replace(target)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be moved to {target} ({error.strerror}); nothing is lost: run it again"
        ) from error


def _inside(folder: Path) -> list[str]:
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
