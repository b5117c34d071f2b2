"""`plopfast verify`: are the files of a run folder, and what they were made from, still what they were?"""

from pathlib import Path
from typing import Any

from ..support import files
from ..support.errors import FileError, for_terminal
from ..support.ledger import HISTORY, Ledger
from ..support.lock import LOCK
from ..support.tables import Column, Table

SAME, CHANGED, MISSING = "same", "changed", "missing"
HIDDEN = (HISTORY, LOCK)


def verify(folder: Path) -> tuple[bool, str]:
    """Compares the files with the hashes in history.jsonl: of outputs, and of the inputs that they were made from.

    Returns whether all are the same, and a text that names those that are not, rows that are in no single file (they would
    have to be read), stages that did not end, and files that plopfast did not write. Raises FileError where there is no
    history.
    """
    ledger = Ledger(folder)
    if not ledger.exists():
        raise FileError(f"{ledger.path}: no such file; every command that writes into a run folder begins one there")
    done = ledger.done()
    last = _last_writers(ledger)
    found = [row for stage, event in done.items() for row in _compared(folder, stage, event, last)]
    odd = [row for row in found if row[0] != SAME]
    table = Table("", [Column("state"), Column("file"), Column("of"), Column("noted")], odd)
    names, changed = ({row[1] for row in rows} for rows in (found, odd))
    uncompared = dict.fromkeys(name for event in done.values() for name in _rows_of(event) if not _is_file_name(name))
    begun = {event["stage"]: event for event in ledger.events() if event["event"] == "begin"}
    unfinished = [f"unfinished: {stage}, begun {begun[stage]['time']}" for stage in begun if stage not in done]
    claims = ledger.claims()
    holds_runs = [path for path in sorted(folder.iterdir()) if path.name not in claims and _holds_runs(path)]
    others = [
        path
        for path in sorted(folder.iterdir())
        if path.name not in HIDDEN and path not in holds_runs
        for path in ledger.foreign(path.name, claims)
    ]
    lines = [f"{folder}: {len(names - changed)} of {len(names)} files are as they were"]
    lines += [str(table)] * bool(odd) + unfinished
    lines += [f"not compared: {name}, whose rows are in a folder or on the hub" for name in uncompared]
    lines += [f"not compared: {path}, which holds run folders: plopfast verify {path}/NAME" for path in holds_runs]
    lines += [f"not written by plopfast: {path}" for path in others]
    return not odd, for_terminal("\n".join(lines))


def _holds_runs(path: Path) -> bool:
    """Whether all that a folder holds are run folders, as plopfast multi makes them for its jobs."""
    held = list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
    return bool(held) and all(Ledger(one).exists() for one in held)


def _last_writers(ledger: Ledger) -> dict[str, str]:
    """Output -> the stage that wrote it last: eval writes its figures into the card of the adapter that train made."""
    ended = [event for event in ledger.events() if event["event"] == "done"]
    return {name: event["stage"] for event in ended for name in event.get("outputs", {})}


def _compared(folder: Path, stage: str, event: dict[str, Any], last: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """The state of each file of a stage, its name, what it is to the stage, and when its hash was noted. Outputs are compared
    with what the stage noted that wrote them last."""
    rows = {name: digest for name, digest in _rows_of(event).items() if _is_file_name(name)}
    outputs = {name: digest for name, digest in event.get("outputs", {}).items() if last.get(name, stage) == stage}
    kinds = {"input": rows | event.get("inputs", {}), "output": outputs}
    return [
        (_state(folder / name, digest), name, f"{kind} of {stage}", event["time"])
        for kind, hashes in kinds.items() for name, digest in hashes.items() if name != "config.json"
    ]  # fmt: skip


def _rows_of(event: dict[str, Any]) -> dict[str, str]:
    """The hash of each source of rows."""
    data = event.get("data", {}).values()
    return {one["file"]: one["sha256"] for of in data for one in (of if isinstance(of, list) else [of])}


def _is_file_name(source: str) -> bool:
    """False for a folder, FOLDER:SPLIT and a name of the hub."""
    return Path(source).is_absolute() and not Path(source).is_dir() and not Path(source.partition(":")[0]).is_dir()


def _state(path: Path, digest: str) -> str:
    if not path.is_file():
        return MISSING
    return SAME if files.sha256(path) == digest else CHANGED
