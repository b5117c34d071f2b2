"""The splits of a run: where their rows come from, how they are read, and what they may not share."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..data.overlap import overlaps
from ..data.readers import absolute
from ..data.rows import DEMO, Row, Rows, read_rows
from ..support import files
from ..support.config import RunConfig
from ..support.errors import DataError

HOLD_OUT = 20  # without validation rows, every 20th training row is one
One = TypeVar("One")


def held_out(rows: Sequence[One]) -> tuple[list[One], list[One]]:
    """The rows that are left to train on, and every 20th, which is not trained on."""
    return [row for i, row in enumerate(rows) if i % HOLD_OUT], list(rows[::HOLD_OUT])


def sources_of(config: RunConfig) -> dict[str, list[str]]:
    """The files, folders and hub ids of each split that has some of its own, and of "unlabeled"."""
    given = {split: getattr(config, split) for split in (*DEMO, "unlabeled")}
    demo = {split: [str(path)] for split, path in DEMO.items()} if not any(given[split] for split in DEMO) else {}
    return demo | {split: [value] if isinstance(value, str) else list(value) for split, value in given.items() if value}


def resolved(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Sources that mean the same in every working folder. A single one is a string, so that settings compare."""
    names = tuple(absolute(name) for name in ([value] if isinstance(value, str) else value))
    return names[0] if len(names) == 1 else names


def read_splits(config: RunConfig, say: Callable[[str], None]) -> tuple[dict[str, Rows], list[str]]:
    """The rows of "train", "valid" and "test", as the settings ask for them, and what they share, in a line each.

    Without rows of its own, the validation split is every 20th training row (held out from training), and the test split
    is the validation split; without training rows, only what is given is there. `say` is told what was read, before rows are held out. Raises DataError for rows that cannot
    be read, and where test rows are training rows too unless `allow_overlap`.
    """
    splits = {}
    for split, sources in sources_of(config).items():
        if split != "unlabeled":
            splits[split] = read_rows(sources, columns=config.columns, bad_rows=config.bad_rows, split=split)
            for line in splits[split].lines():
                say(f"{split}: {line}")
    if "valid" not in splits and "train" in splits:
        whole = splits["train"]
        kept, held = held_out(whole.rows)
        splits |= {"valid": whole.part(held), "train": whole.part(kept or whole.rows)}
        splits["train"].bad = whole.bad
    shared = _overlap(splits, config.allow_overlap)
    if "valid" in splits:
        splits.setdefault("test", splits["valid"])
    return {split: splits[split] for split in DEMO if split in splits}, shared


def _overlap(splits: dict[str, Rows], allowed: bool) -> list[str]:
    in_order = {split: splits[split].rows for split in DEMO if split in splits}
    found = [overlap for overlap in overlaps(in_order) if overlap]
    for overlap in found:
        if (overlap.first, overlap.second) == ("train", "test") and not allowed:
            raise DataError(
                f"{overlap}: figures on them would not show what the model does on new rows; take them out of one of the "
                "files, or pass --allow-overlap"
            )
    return [str(overlap) for overlap in found]


def sha256_of(source: str, rows: Callable[[], list[Row]]) -> str | None:
    """The SHA-256 of a file, or of those of the rows that come from a folder or hub id. None for a file that is gone."""
    path = Path(source)
    if path.is_file():
        return files.sha256(path)
    on_disk = path.is_dir() or Path(source.partition(":")[0]).is_dir()  # a folder, or FOLDER:SPLIT
    if source != absolute(source) or (path.is_absolute() and not on_disk):
        return None
    placed = ((where.rpartition(", row "), row) for where, row in rows())
    own = {int(number): row for (name, _, number), row in placed if name == source}
    digest = hashlib.sha256()
    for number in sorted(own):
        digest.update(json.dumps(own[number], sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
