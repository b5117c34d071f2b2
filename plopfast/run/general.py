"""Text that has nothing to do with the task: what its loss gains by training is forgetting."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.example import Example
from ..data.text import read_text, rows_of_text
from ..support import files
from ..support.errors import ConfigError
from .run import Run

DEFAULT, CHARACTERS = "pydoc_data.topics", 100_000  # Python's own help texts, which every Python has
ROW = 256  # tokens, at most
SHARED = 16  # tokens in a row; fewer can be a turn of phrase


@dataclass(frozen=True)
class GeneralText:
    """The rows of a general text, and what is told of it: file, sha256, tokens."""

    rows: list[Example]
    facts: dict[str, Any]


def general_text(run: Run, tokens: int) -> GeneralText:
    """Reads the first `tokens` tokens or so of the general text, in rows of at most 256; it needs the run's tokenizer alone.

    Raises ConfigError where this Python lacks the default text, and DataError for a file that is no text.
    """
    length = min(n for n in (ROW, run.config.max_length, run.context) if n and n > 0)
    if path := run.config.general:
        every, sha256 = read_text(path, run.tokenizer, length), files.sha256(Path(path))
    else:
        text = _default()
        every, sha256 = rows_of_text(text, DEFAULT, run.tokenizer, length), hashlib.sha256(text.encode()).hexdigest()
    rows: list[Example] = []
    for row in every:
        if sum(len(taken.tokens) for taken in rows) < tokens:
            rows.append(row)
    facts = {"file": path or DEFAULT, "sha256": sha256, "tokens": sum(len(row.tokens) for row in rows)}
    return GeneralText(rows, facts)


def why_not_held_out(run: Run, general: GeneralText) -> str:
    """Says which of the run's training rows holds a stretch of the text, if any: what is learned is not forgotten."""
    seen = {stretch for row in general.rows for stretch in _stretches(row)}
    for row in [*run.examples("train"), *run.examples("unlabeled")]:
        if not seen.isdisjoint(_stretches(row)):
            return (
                f"general: {general.facts['file']} shares {SHARED} tokens in a row or more with the training row {row.where}, so "
                "that its loss does not show what is forgotten: pass a --general FILE.txt of other text"
            )
    return ""


def _default() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigError(
            f"this Python lacks {DEFAULT}, whose texts are the default for --general: pass a FILE.txt"
        ) from None
    return "\n\n".join(topics.values())[:CHARACTERS]


def _stretches(row: Example) -> Iterator[tuple[int, ...]]:
    return (row.tokens[i : i + SHARED] for i in range(len(row.tokens) - SHARED + 1))
