"""Readers: from a file to (where, row) pairs, one after the other. `where` is "file:line" or "file, row N".

A reader gets a path, a JSON parser, and `bad`, which it calls with (where, why) for a row that cannot be read; if `bad`
returns, the reader goes on with the next row. It raises DataError where nothing after that place can be read.
To add a format of files, write a reader and name its suffix in `READERS`.
"""

import csv
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..support import files
from ..support.errors import DataError
from ..support.strict_json import StrictJSON
from .arrow import read_dataset, read_parquet

MISSING = "no such data file"
Bad = Callable[[str, object], None]
Pairs = Iterator[tuple[str, dict[str, Any]]]
_BLANK = re.compile(r"[ \t\r\n]*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_lines(path: Path, json: StrictJSON, bad: Bad) -> Pairs:
    """JSON lines: one object a line. Blank lines are skipped."""
    name = str(path)
    for number, line in enumerate(_lines(path), 1):
        line = line.strip(b" \t\r\n")
        if not line:
            continue
        where = f"{name}:{number}"
        try:
            row = json.parse(line.decode())
        except UnicodeDecodeError as error:
            bad(where, _not_utf8(error))
        except ValueError as error:
            bad(where, f"{error}; expected one object a line")
        else:
            if isinstance(row, dict):
                yield where, row
            elif isinstance(row, list):
                bad(where, "expected a JSON object, got list; a file that is one array is named .json")
            else:
                bad(where, f"expected a JSON object, got {type(row).__name__}")


def read_array(path: Path, json: StrictJSON, bad: Bad) -> Pairs:
    """A JSON file that is one array of objects."""
    text = files.read_text(path, MISSING, DataError)
    at = _after_blanks(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        raise DataError(
            f"{path}: expected an array of objects, [{{...}}, ...]; a file of one object a line is named .jsonl"
        )
    at, number = _after_blanks(text, at + 1), 0
    closed = text[at : at + 1] == "]"
    while not closed:
        number += 1
        where = f"{path}, row {number}"
        try:
            row, at, problem = json.parse_at(text, at)
        except ValueError as error:
            raise DataError(f"{where}: {error}; expected an array of objects") from None
        if problem or not isinstance(row, dict):
            bad(where, problem or f"expected a JSON object, got {type(row).__name__}")
        else:
            yield where, row
        at = _after_blanks(text, at)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            raise DataError(f"{where}: expected a comma or the array's end after it: {_place(text, at)}")
        at = at if closed else _after_blanks(text, at + 1)
    if _after_blanks(text, at + 1) != len(text):
        raise DataError(f"{path}: expected nothing after the array's end: {_place(text, at + 1)}")


def _after_blanks(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    assert found  # it matches nothing, too
    return found.end()


def _place(text: str, at: int) -> str:
    line = text.count("\n", 0, at) + 1
    return f"line {line}, column {at - text.rfind(chr(10), 0, at)}" + (
        " (the end of the file)" if at >= len(text) else ""
    )


def read_table(path: Path, json: StrictJSON, bad: Bad, delimiter: str = ",") -> Pairs:
    """CSV, or TSV: a header that names the columns, then one row of text a line. Quoted cells may hold line breaks."""
    limit = csv.field_size_limit((1 << 31) - 1)  # the default, 131,072 characters, is less than a long document
    broken: dict[int, str] = {}
    rows = csv.reader(_text_lines(path, broken), delimiter=delimiter, strict=True)
    header: list[str] = []
    begin = 1
    try:
        for cells in rows:
            where, begin = f"{path}:{begin}", rows.line_num + 1
            if broken:  # lines of this row
                number, why = next(iter(broken.items()))
                broken.clear()
                if not header:
                    raise DataError(f"{path}:{number}: {why}")
                bad(f"{path}:{number}", why)
                continue
            if not cells:
                continue
            if not header:
                header = [sys.intern(cell.strip()) for cell in cells]
                if len(header) == 1 and (other := set(header[0]) & {*",;\t|"} - {delimiter}):
                    raise DataError(
                        f"{where}: the header is one column, {header[0]!r}: cells are separated by "
                        f"{'tabs' if delimiter == chr(9) else 'commas'} in a {path.suffix} file, not by {other.pop()!r}"
                    )
                if twice := [name for name in header if header.count(name) > 1]:
                    raise DataError(f"{where}: the header names {twice[0]!r} twice; it has {header}")
            elif len(cells) != len(header):
                bad(where, f"expected {len(header)} cells, as in the header {header}, got {len(cells)}")
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        why = f'not valid CSV ({error}); a cell that holds quotes is "quoted ""so"""'
        if str(error).startswith("new-line character"):
            why = "a carriage return without a line feed outside of quotes; save the file with usual line ends"
        raise DataError(f"{path}:{begin}: {why}") from None
    finally:
        csv.field_size_limit(limit)


def _read_tabs(path: Path, json: StrictJSON, bad: Bad) -> Pairs:
    return read_table(path, json, bad, "\t")


def _read_parquet(path: Path, json: StrictJSON, bad: Bad) -> Pairs:
    files.check_regular(path, DataError)
    if not path.is_file():
        raise DataError(f"{path}: {MISSING}")
    return read_parquet(path)


READERS: dict[str, Callable[[Path, StrictJSON, Bad], Pairs]] = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_array,
    ".csv": read_table,
    ".tsv": _read_tabs,
    ".parquet": _read_parquet,
}
KNOWN = (
    f"{', '.join(READERS)}, a folder, or a data set of the Hugging Face hub (owner/name, owner/name:split or "
    "owner/name:config:split)"
)


def read_source(source: str, split: str, json: StrictJSON, bad: Bad) -> Pairs:
    """The rows of a file, of a folder, or of a data set of the hub. `split` is the part of a data set that is read where
    the source names none: "train", "valid" or "test".

    What exists on disk is read from there; the network is used only for a name of the hub. Raises DataError.
    """
    path = Path(source)
    folder, _, inner = source.partition(":")
    if path.is_dir():
        return read_dataset(source, source, [], split)
    if reader := READERS.get(path.suffix.lower()):
        return reader(path, json, bad)
    if path.is_file() and not path.suffix:
        return read_lines(path, json, bad)
    if path.exists():
        text = "; plain text goes to --unlabeled" if path.suffix == ".txt" else ""
        raise DataError(f"{source}: unknown kind of data file {path.suffix!r}; known are {KNOWN}{text}")
    if Path(folder).is_dir() or _is_hub_id(source):
        return read_dataset(source, folder, inner.split(":") if inner else [], split)
    raise DataError(f"{source}: no such file or folder; known are {KNOWN}")


def _is_hub_id(source: str) -> bool:
    name, *parts = source.split(":")
    return bool(_HUB_ID.fullmatch(name)) and len(parts) <= 2 and all(parts)


def absolute(source: str) -> str:
    """Return a source that means the same in every working folder: the path made absolute, a name of the hub as it is."""
    folder, colon, inner = source.partition(":")
    if not Path(source).exists() and Path(folder).is_dir():
        return f"{files.real(folder)}{colon}{inner}"
    on_hub = not Path(source).exists() and Path(source).suffix.lower() not in READERS and _is_hub_id(source)
    return source if on_hub else str(files.real(source))


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, split at line feeds alone (not at U+2028, which may stand in a string), without a BOM."""
    files.check_regular(path, DataError)
    try:
        with path.open("rb") as file:
            yield file.readline().removeprefix(b"\xef\xbb\xbf")
            yield from file
    except FileNotFoundError:
        raise DataError(f"{path}: {MISSING}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _text_lines(path: Path, broken: dict[int, str]) -> Iterator[str]:
    """The lines as text; `broken` gets the number of each that is not UTF-8, and why."""
    for number, line in enumerate(_lines(path), 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            broken[number] = _not_utf8(error)
            yield line.decode(errors="replace")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"not UTF-8 (byte 0x{error.object[error.start]:02x}, the line's byte {error.start + 1}); save the file as UTF-8"
    )
