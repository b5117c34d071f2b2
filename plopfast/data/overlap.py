"""Which rows and prompts two splits share: a figure on rows that were trained on says nothing."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .formats import USES, format_of
from .rows import Row

_ANSWERS = {
    "messages": ("messages", "role", ("assistant",)),
    "sharegpt": ("conversations", "from", ("gpt", "assistant")),
}


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
        rows, same_row = _shared(ours, theirs, _row)
        prompts, same_prompt = _shared(ours, theirs, prompt_of)
        found.append(Overlap(first, second, rows, prompts, len(theirs), same_row, same_prompt))
    return found


def _shared(
    ours: Sequence[Row], theirs: Sequence[Row], key: Callable[[dict[str, Any]], Hashable]
) -> tuple[int, tuple[str, str] | None]:
    """How many of their rows have a key that one of ours has too, and the first places of both."""
    counts = Counter(hash(value) for _, row in theirs if (value := key(row)) is not None)
    count, first = 0, None
    for where, row in ours:
        code = hash(key(row))
        if code not in counts:
            continue
        count += counts.pop(code)  # each of their rows counts once
        first = first or (where, next(place for place, other in theirs if hash(key(other)) == code))
    return count, first


def _row(row: dict[str, Any]) -> Hashable:
    kind = format_of(row)
    if kind is None:  # a row that was not read from a file, and is refused as it is tokenised
        return None
    if kind in ("pair", "text"):
        return tuple(row[name] for name in sorted(USES[kind]))
    return _text({name: row[name] for name in USES[kind] & row.keys()})


def prompt_of(row: dict[str, Any]) -> Hashable:
    """What the model is given before the last answer, as something to compare. None where there is nothing, as in text."""
    kind = format_of(row)
    if kind == "pair":
        return row["prompt"] or None
    if kind == "chat":
        return _text(row["prompt"])
    if kind == "alpaca":
        parts = [row.get(name) for name in ("system", "history", "instruction", "input")]
        return _text(parts) if any(parts) else None
    if kind not in _ANSWERS:
        return None
    column, key, roles = _ANSWERS[kind]
    answers = [index for index, message in enumerate(row[column]) if message.get(key, message.get("role")) in roles]
    before = row[column][: answers[-1]] if answers else []
    return _text([row.get("system"), before] if kind == "sharegpt" else before) if before else None


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
