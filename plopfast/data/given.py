"""Rows that a program hands over: lists, data sets of Hugging Face, or whatever else gives dicts one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..support.errors import DataError, shown
from ..support.strict_json import StrictJSON
from .arrow import without_nulls
from .formats import NAMES, is_messages, recognise
from .rows import Row, Rows, drawn, read_rows

PROMPTS = "prompts alone"
_OTHERS = {  # columns of rows that are made for something else -> what to do with them
    "input_ids": "they are tokens already: give the rows from before they were tokenised, or batches to pf.score",
    "chosen": "preferences have two answers: name the better one completion, as rows.rename_column('chosen', 'completion')",
}


@dataclass(frozen=True)
class Given:
    """Rows that were drawn: `total` is how many there were, None where that is not known; `kinds` says in words what they are.
    `prompts`: whether they are prompts alone, without an answer."""

    rows: list[Row]
    total: int | None
    kinds: str
    prompts: bool


def draw(source: Any, count: int, seed: int) -> Given:
    """Draw at most `count` rows, in random order: the same that a run draws from as many rows with this seed.

    `source`: rows as `read_rows` or `read_jsonl` returns them, a list or a data set of dicts, or the path of a file. Of what
    has no length (an IterableDataset, a generator) the first rows are taken. Rows are of the kinds that `read_rows` reads, or
    all of them a `prompt` alone, text or messages, as GRPO takes them. No row is changed.

    Raises DataError where there is no row, for a row of no kind, and for prompts alone among other rows.
    """
    if isinstance(source, str | Path):
        source = read_rows(source)
    if isinstance(source, Rows):
        source = source.rows
    if isinstance(source, Mapping):
        raise DataError(
            f"rows: expected a list or a data set of dicts, got a {type(source).__name__} with the keys "
            f"{', '.join(map(str, source))}; of a DatasetDict give one split, such as data['train']"
        )
    total = _length(source)
    if total is None:
        numbered = list(enumerate(islice(source, count), 1))
    elif isinstance(source, Sequence) or hasattr(source, "column_names"):  # no other row is read
        numbered = [(index + 1, source[index]) for index in drawn(range(total), count, seed)]
    else:
        numbered = drawn(list(enumerate(source, 1)), count, seed)
    if not numbered:
        raise DataError("rows: expected one at least, got none")
    return _recognised(numbered, total, nulls=hasattr(source, "column_names"))


def _length(source: Any) -> int | None:
    if not (hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise DataError(f"rows: expected a list or a data set of dicts, or the path of a file, got {shown(source)}")
    try:
        return len(source)
    except TypeError:
        return None


def _recognised(numbered: Sequence[tuple[int, Any]], total: int | None, nulls: bool) -> Given:
    """The rows, each with its place; with `nulls`, keys that are null are left out (Arrow gives all rows all keys)."""
    json, rows, kinds = StrictJSON(), [], dict[str, str]()
    for number, item in numbered:
        pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        where, row = item if pair else (f"row {number}", item)
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected a dict, got {shown(row)}")
        row = without_nulls(dict(row)) if nulls else dict(row)
        for name, remedy in _OTHERS.items():
            if name in row and "completion" not in row:
                raise DataError(f"{where}: has a column {name!r}; {remedy}")
        try:
            kind = PROMPTS if _is_prompt(row) else NAMES[recognise(row, json)]
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        kinds.setdefault(kind, where)
        rows.append((where, row))
    if PROMPTS in kinds and len(kinds) > 1:
        other = next(kind for kind in kinds if kind != PROMPTS)
        raise DataError(
            f"{kinds[PROMPTS]}: a prompt alone, where {kinds[other]} is {other}; give prompts alone, or rows that all have "
            "an answer"
        )
    return Given(rows, total, ", ".join(kinds), PROMPTS in kinds)


def _is_prompt(row: Mapping[str, Any]) -> bool:
    """Whether a row is a prompt without an answer; a reward's own columns do not count."""
    prompt = row.get("prompt")
    answered = any(
        row.get(name) is not None for name in ("completion", "messages", "conversations", "instruction", "text")
    )
    return not answered and (is_messages(prompt) or (isinstance(prompt, str) and bool(prompt)))
