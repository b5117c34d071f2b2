"""OUT/previous: earlier results, which wait there until those that replace them are complete.

history.jsonl says where they are: "moving" before the first one is moved, "aside" after the last one, then "complete" or
"back", and "cleared" once the folder is empty again. A kill in between is made up for by `tidy`.
"""

import glob
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files
from .errors import FileError
from .ledger import Ledger, inside

PREVIOUS = "previous"


class Previous:
    """The earlier results of a folder."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.folder, self.path = ledger, ledger.folder, ledger.folder / PREVIOUS

    def waiting(self) -> str:
        """The stage that has to be complete before they are deleted; nothing if there are none."""
        last = self._last()
        return last["until"] if last.get("event") == "aside" and self._is_filled() else ""

    def set_aside(self, stage: str, names: Mapping[str, Iterable[str]], copied: Sequence[str] = ()) -> bool:
        """Moves the results of the stages in `names` here, until `stage` is complete; returns whether there are any.

        Files in `copied` go here, too, and stay. Where an earlier result of the same name waits here already, the one in
        the folder is the rest of a work that was stopped: it is deleted. Raises FileError, before anything is moved, as
        `Ledger.check` does, and where results wait here for another stage than this one or, for "run", than any.
        """
        present = [
            name
            for name in dict.fromkeys(name for of in names.values() for name in of)
            if (self.folder / name).exists()
        ]
        if not present:
            return False
        self.ledger.check(present)
        waiting = self.waiting()
        if self._is_filled() and not (waiting and stage in (waiting, "run")):
            why = f": what is in it waits until {waiting} is complete (plopfast {waiting} --resume)" if waiting else ""
            raise FileError(f"{self.path}: in the way{why}; move it away, or {files.OTHER_OUT}")
        files_in = [f"{name}/{file}" for name in present for file in inside(self.folder / name)]
        claims = {PREVIOUS: [glob.escape(part) for part in (*present, *copied, *files_in)]}
        self.ledger.claim(claims, "moving", stages=list(names), moved=present, copied=list(copied), until=stage)
        self._end_the_move()
        return True

    def bring_back(self, stage: str) -> None:
        """Moves those back that waited for this stage, which has failed, unless it has made something."""
        if self.waiting() != stage:
            return
        last = self._last()
        names, copied = ([name for name in last[key] if (self.path / name).exists()] for key in ("moved", "copied"))
        if not any((self.folder / name).exists() for name in names):
            for name in (*names, *copied):
                _move(self.path / name, self.folder / name)
            self.ledger.add("back", stage=stage)
            self.tidy()

    def complete(self, stage: str) -> None:
        """Deletes those that waited for this stage."""
        if self.waiting() == stage:
            self.ledger.add("complete", stage=stage)
            self.tidy()

    def tidy(self) -> None:
        """Ends what a kill interrupted. Call it only while no other process writes here."""
        event = self._last().get("event")
        if event == "moving":
            self._end_the_move()
        elif event in ("back", "complete"):
            self.ledger.clear(PREVIOUS)
            self.ledger.add("cleared")  # whatever is there later is the user's

    def _end_the_move(self) -> None:
        """Does what the last line, "moving", says."""
        last = self._last()
        self.path.mkdir(exist_ok=True)
        for name in last["copied"]:
            if (self.folder / name).is_file() and not (self.path / name).exists():
                shutil.copy2(self.folder / name, self.path / name)
        for name in last["moved"]:
            if (self.path / name).exists():
                self.ledger.remove([name])
            elif (self.folder / name).exists():
                _move(self.folder / name, self.path / name)
        moved = [path.name for path in self.path.iterdir() if path.name not in last["copied"]]
        self.ledger.add("aside", moved=moved, copied=last["copied"], until=last["until"])

    def _is_filled(self) -> bool:
        return self.path.is_dir() and any(self.path.iterdir())

    def _last(self) -> dict[str, Any]:
        moves = ("moving", "aside", "back", "complete", "cleared")
        return next((event for event in reversed(self.ledger.events()) if event["event"] in moves), {})


def _move(path: Path, target: Path) -> None:
    try:
        path.replace(target)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be moved to {target} ({error.strerror}); nothing is lost: run it again"
        ) from error
