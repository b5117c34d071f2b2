"""Which rows and prompts two splits share: a figure on rows that were trained on says nothing."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..support.errors import DataError
from .conversation import ASSISTANT, VARIABLES, conversation_of
from .formats import USES, format_of
from .notices import Notices
from .rows import Row


@dataclass(frozen=True)
class Overlap:
    """How many rows of the split `second`, of `total`, stand in `first` too, and how many have a prompt that does.

    The first two places, in `first` and in `second`, are an example of each.
    """

    first: str
    second: str
    rows: int
    prompts: int
    total: int
    same_row: tuple[str, str] | None
    same_prompt: tuple[str, str] | None

    def __bool__(self) -> bool:
        return bool(self.rows or self.prompts)

    def __str__(self) -> str:
        counts = (
            f"of {self.total:,} {self.second} rows, {self.rows:,} are {self.first} rows too, and {self.prompts:,} have the "
            "prompt of one"
        )
        example = self.same_row or self.same_prompt
        what = "row" if self.same_row else "prompt"
        return f"{example[1]}: the same {what} as {example[0]}; {counts}" if example else counts


def overlaps(splits: Mapping[str, Sequence[Row]]) -> list[Overlap]:
    """Compare each two splits, the first with the later ones. Only the columns that are learned from count.

    Hashes of 64 bits are compared, and those of the later split kept: about 100 bytes for each of its rows.

        overlaps({"train": rows, "test": others})[0].rows
    """
    found = []
    for (first, ours), (second, theirs) in itertools.combinations(splits.items(), 2):
        rows, same_row = _shared(ours, theirs, lambda row: [_row(row)], _row)
        prompts, same_prompt = _shared(ours, theirs, prompts_of, prompt_of)
        found.append(Overlap(first, second, rows, prompts, len(theirs), same_row, same_prompt))
    return found


def _shared(
    ours: Sequence[Row],
    theirs: Sequence[Row],
    keys: Callable[[dict[str, Any]], Sequence[Hashable]],
    key: Callable[[dict[str, Any]], Hashable],
) -> tuple[int, tuple[str, str] | None]:
    """How many of their rows have a key that is one of the keys of a row of ours, and the first places of both."""
    counts = Counter(hash(value) for _, row in theirs if (value := key(row)) is not None)
    count, first = 0, None
    for where, row in ours:
        for code in counts.keys() & {hash(value) for value in keys(row)}:
            count += counts.pop(code)  # each of their rows counts once
            first = first or (where, next(place for place, other in theirs if hash(key(other)) == code))
    return count, first


def _row(row: dict[str, Any]) -> Hashable:
    kind = format_of(row)
    if kind in ("pair", "text"):
        return tuple(row[name] for name in sorted(USES[kind]))
    messages = _messages(row, kind)
    return None if not messages else _text([messages, {name: row[name] for name in VARIABLES if row.get(name)}])


def prompt_of(row: dict[str, Any]) -> Hashable:
    """What the model is given before the last answer, as something to compare. None where there is nothing, as in text."""
    return next(iter(prompts_of(row)[-1:]), None)


def prompts_of(row: dict[str, Any]) -> list[Hashable]:
    """What the model is given before each answer, as something to compare."""
    kind = format_of(row)
    if kind in ("pair", "text"):
        return [row["prompt"]] if kind == "pair" and row["prompt"] else []
    messages = _messages(row, kind)
    answers = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    return [_text(messages[:n]) for n in answers if any(message.get("content") for message in messages[:n])]


def _messages(row: dict[str, Any], kind: str | None) -> list[dict[str, Any]]:
    """A row's messages, whatever form they have; none of a row that is refused as it is tokenised."""
    try:
        return conversation_of("", row, kind, Notices()).messages if kind else []
    except DataError:
        return []


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
