"""Rows: what is read from data files, as (where, row) pairs, with what there is to say about them.

Rows follow TRL's conventions, Alpaca's or ShareGPT's; `formats.py` lists them. `labels.py` turns them into tokens.
"""

import contextlib
import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..support.errors import ConfigError, DataError
from ..support.options import problem_of_text
from ..support.strict_json import StrictJSON
from .formats import FORMATS, NAMES, USES, Renaming, format_of, recognise
from .readers import Bad, Pairs, absolute, read_lines, read_source

_DEMO = Path(__file__).parents[1] / "demo"
DEMO = {split: _DEMO / f"wordnet_categories.{split}.jsonl" for split in ("train", "valid", "test")}
IGNORE = -100  # the label of a token that no loss counts; transformers uses the same
SHOWN = 3  # examples in a message
Row = tuple[str, dict[str, Any]]  # where it stands ("file:line"), and its columns

Reader = tuple[str, Callable[[StrictJSON, Bad], Pairs]]  # a source's name, and what reads it


@dataclass
class Rows:
    """The rows of a split, and what was noticed while they were read.

    >>> rows = pf.read_rows("train.jsonl")
    >>> rows.formats, rows.unused
    (Counter({'messages': 100}), Counter({'id': 100}))
    """

    rows: list[Row] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # why rows were left out, each with its place
    read: int = 0  # rows that the sources hold, the bad ones too; a part has the number of the whole
    _shapes: Counter[tuple[str, ...]] = field(default_factory=Counter)  # rows by their kind and columns

    def add(self, row: Row, kind: str) -> None:
        """Add a row of a kind."""
        self.rows.append(row)
        shape = (kind, *row[1])
        self._shapes[shape] += 1

    @property
    def formats(self) -> Counter[str]:
        """How many rows there are of each kind, as `format_of` names them."""
        formats: Counter[str] = Counter()
        for (kind, *_), count in self._shapes.items():
            formats[kind] += count
        return formats

    @property
    def unused(self) -> Counter[str]:
        """How many rows have a column that their kind does not use."""
        unused: Counter[str] = Counter()
        for (kind, *columns), count in self._shapes.items():
            unused.update({name: count for name in columns if name not in USES[kind]})
        return unused

    def part(self, rows: Sequence[Row]) -> "Rows":
        """Return some of the rows, counted anew; the bad ones stay behind."""
        part = Rows(read=self.read)
        for row in rows:
            kind = format_of(row[1])
            assert kind  # they were read
            part.add(row, kind)
        return part

    def lines(self) -> list[str]:
        """What a user should know, in a line each: the formats, columns that are not used, rows that were left out."""
        kinds = [NAMES[kind] + (f" ({n:,})" if len(self.formats) > 1 else "") for kind, n in self.formats.most_common()]
        lines = [f"{len(self.rows):,} row{'s' * (len(self.rows) != 1)}: {', '.join(kinds)}"]
        if self.unused:
            counts = sorted(self.unused.items())
            names = ", ".join(f"{name!r} ({count:,} row{'s' * (count != 1)})" for name, count in counts)
            lines.append(f"columns that are not used: {names}")
        if self.bad:
            lines.append(f"{len(self.bad):,} of {self.read:,} rows are bad and left out: {'; '.join(self.bad[:SHOWN])}")
        return lines


def read_rows(
    sources: str | Path | Sequence[str | Path],
    *,
    columns: str | None = None,
    bad_rows: str = "error",
    split: str = "train",
) -> Rows:
    """Read files (.jsonl, .json, .csv, .tsv, .parquet), folders and hub ids, one after the other.

    `columns` renames columns: "prompt=question,completion=answer". With `bad_rows` "skip", rows that cannot be read are
    left out and listed in `bad`. `split` ("train", "valid" or "test") is read of data sets that are given without one.

        rows = pf.read_rows(["a.jsonl", "b.csv"], columns="prompt=question,completion=answer").rows

    Raises DataError with the file and line for a missing file, for one without a good row, for a bad row unless these are
    skipped, and for no source at all; ConfigError for impossible `columns`, `bad_rows` or `split`.

    >>> rows = pf.read_rows(["train.jsonl", "more.csv"])
    >>> print(rows.formats)
    Counter({'pair': ...})
    """
    for option, value, known in ("bad_rows", bad_rows, ("error", "skip")), ("split", split, tuple(DEMO)):
        if value not in known:
            raise ConfigError(f"{option}: expected {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
    names = [str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    if not names:
        raise DataError("sources: expected the name of a file or several, got none")
    if problem := next(filter(None, map(problem_of_text, names)), ""):
        raise DataError(f"sources: {problem}")
    own = [absolute(name) for name in names]
    if twice := [name for number, name in enumerate(own) if name in own[:number]]:
        raise DataError(f"{twice[0]}: given twice for {split}; leave one of them out")
    return _collect(
        [(name, partial(read_source, name, split)) for name in names], Renaming(columns), bad_rows == "skip"
    )


def drawn(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Return at most `count` of the rows, in random order: those that are scored."""
    return random.Random(seed).sample(rows, min(count, len(rows)))


def read_jsonl(path: str | Path) -> list[Row]:
    """Read a JSONL file (UTF-8, one object a line) into a list of (file:line, row). Empty lines are skipped.

    Raises DataError with the file and line for a missing file, invalid JSON, or a row of an unknown kind.

    >>> pf.read_jsonl("train.jsonl")[0]
    ('train.jsonl:1', {'prompt': ..., 'completion': ...})
    """
    return _collect([(str(path), partial(read_lines, Path(path)))], Renaming(None), skip=False).rows


def _collect(readers: list[Reader], renaming: Renaming, skip: bool) -> Rows:
    found, json = Rows(), StrictJSON()

    def bad(where: str, why: object) -> None:
        if not skip:
            raise DataError(f"{where}: {why}")
        found.bad.append(f"{where}: {why}")

    with _no_collection():
        _fill(found, readers, renaming, json, bad)
    renaming.check_seen()
    found.read = len(found.rows) + len(found.bad)
    return found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Pauses Python's search for cycles, which rows do not make: it would walk all of them time and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _fill(found: Rows, readers: list[Reader], renaming: Renaming, json: StrictJSON, bad: Bad) -> None:
    """Read all sources into `found`. Raises DataError where one has no good row."""
    for name, reader in readers:
        good, refused = len(found.rows), len(found.bad)
        for where, row in reader(json, bad):
            try:
                if renaming.sources:
                    row = renaming.apply(row)
                kind = recognise(row, json)
                if renaming.sources:
                    renaming.check(kind)
            except ValueError as error:
                bad(where, error)
            else:
                found.add((where, row), kind)
        if len(found.rows) == good:
            if not found.bad[refused:]:
                raise DataError(f"{name}: no rows; expected rows like {FORMATS}")
            raise DataError(f"{name}: all {len(found.bad) - refused:,} rows are bad; the first: {found.bad[refused]}")
