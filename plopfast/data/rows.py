"""Reads JSONL files into rows, and says which kind each row is.

Rows follow TRL's conventions: {"prompt", "completion"} as strings or message lists, {"messages"}, or {"text"}.
To add a kind of row, recognise it in `format_of` and turn it into tokens in `labels.py`.
"""

import json
from pathlib import Path
from typing import Any

from ..support import files
from ..support.errors import DataError

_DEMO = Path(__file__).parents[1] / "demo"
DEMO = {split: _DEMO / f"wordnet_categories.{split}.jsonl" for split in ("train", "valid", "test")}
MISSING = "no such data file"
IGNORE = -100  # the label of a token that no loss counts; transformers uses the same
FORMATS = '{"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}'


def read_jsonl(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a JSONL file (UTF-8, one object a line) into a list of (file:line, row). Empty lines are skipped.

    Raises DataError with the file and line for a missing file, invalid JSON, or a row of an unknown kind.
    """
    path = Path(path)
    lines = files.read_text(path, MISSING, DataError).split(
        "\n"
    )  # splitlines() would also split at U+2028 inside a string
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
        if format_of(row) is None:
            raise DataError(f"{where}: expected a row like {FORMATS}, got the keys {sorted(row)}")
        rows.append((where, row))
    if not rows:
        raise DataError(f"{path}: no rows; expected one JSON object a line: {FORMATS}")
    return rows


def format_of(row: dict[str, Any]) -> str | None:
    """Return the row's kind: "pair" (prompt and completion as strings), "chat" (both as message lists), "messages" or "text".

    The first kind that fits wins, in this order. None means that no kind fits.
    """

    def is_chat(key: str) -> bool:
        value = row.get(key)
        if not isinstance(value, list) or not value:
            return False
        return all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)

    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return "pair"
    if is_chat("prompt") and is_chat("completion"):
        return "chat"
    if is_chat("messages"):
        return "messages"
    turns = row.get("conversations")
    if (
        isinstance(turns, list)
        and turns
        and all(isinstance(t, dict) and ({"from", "value"} <= t.keys() or "role" in t) for t in turns)
    ):
        return "sharegpt"
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return "alpaca"
    return "text" if isinstance(row.get("text"), str) else None
