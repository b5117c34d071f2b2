"""Task data: JSONL rows or plain text -> token sequences with a label range -> padded or packed batches.

Rows follow TRL's conventions: {"prompt", "completion"} as strings or message lists, {"messages"}, or {"text"}.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support.errors import DataError

DEMO = {
    split: Path(__file__).parents[1] / "demo" / f"wordnet_categories.{split}.jsonl"
    for split in ("train", "valid", "test")
}
IGNORE = -100  # the label of a token that counts in no loss, as in transformers
FORMATS = '{"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}'


@dataclass(frozen=True)
class Example:
    """One tokenised row: `tokens[start:]` carry labels. `completion` is the row's answer where it is plain text, `roles`
    the role of each token where the row is messages and roles were asked for."""

    tokens: tuple[int, ...]
    start: int
    completion: str | None
    where: str  # file:line, for errors
    roles: tuple[str, ...] | None = None


def read_jsonl(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, row) for each non-empty line. Raises DataError naming the file and line of what is wrong."""
    path = Path(path)
    lines = _read(path).split("\n")  # splitlines() would cut at U+2028 inside a string
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
        _check_row(where, row)
        rows.append((where, row))
    if not rows:
        raise DataError(f"{path}: no rows; expected one JSON object a line: {FORMATS}")
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _check_row(where: str, row: dict[str, Any]) -> None:
    if _format(row) is None:
        raise DataError(f"{where}: expected a row like {FORMATS}, got the keys {sorted(row)}")


def _format(row: dict[str, Any]) -> str | None:
    """How a row is read: "pair" (strings), "chat" (message lists), "messages" or "text", in this order."""

    def is_chat(key: str) -> bool:
        value = row.get(key)
        if not isinstance(value, list) or not value:
            return False
        return all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)

    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return "pair"
    if is_chat("prompt") and is_chat("completion"):
        return "chat"
    if is_chat("messages"):
        return "messages"
    return "text" if isinstance(row.get("text"), str) else None
