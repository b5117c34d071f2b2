"""What a training will learn, shown before it begins: rows, lengths, learned tokens, what is left out, and one whole row."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import quantiles
from typing import Any

from ..support.errors import ConfigError, DataError
from ..support.tables import Column, Table
from .example import Example
from .labels import tokenize
from .notices import Notices
from .overlap import overlaps
from .rows import SHOWN, Row, Rows

PERCENTILES = (50, 95)
BINS = 20  # of the picture of lengths
BARS = " ▁▂▃▄▅▆▇█"
SHOWN_CHARACTERS = 2000  # of the row that is shown
SHOWN_PARTS = 8  # at its beginning, and at its end
# control characters but tabs and line breaks, and those that turn the direction of writing
_STEERS = re.compile(r"[^\t\n -~\u00a0-\u200d\u2010-\u2027\u202f-\u2065\u206a-\U0010ffff]")
ON, OFF = "\033[1;32m", "\033[0m"  # green, for what is learned


@dataclass
class SplitFacts:
    """What there is to know of a split. Lengths are in tokens; `row` is its first row, in parts that are learned or not."""

    split: str
    rows: int
    tokens: int
    learned: int
    shortest: int
    percentiles: dict[str, int]
    longest: int
    histogram: list[tuple[int, int]]  # (tokens at least, rows) of bins of equal width
    notes: list[str] = field(default_factory=list)
    where: str = ""
    row: list[tuple[str, bool]] = field(default_factory=list)


@dataclass
class DataFacts:
    """What there is to know of the splits of a run, and what they share. `str` gives all of it as text."""

    splits: list[SplitFacts]
    overlap: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """Return a table with a row for each split."""
        return lengths_table(self.as_dict()["splits"])

    def picture(self) -> str:
        """Return a line of bars for each split: how many rows there are of each length, from 0 tokens to the longest row."""
        width = max(len(split.split) for split in self.splits)
        lines = []
        for split in self.splits:
            most = max(count for _, count in split.histogram)
            bars = "".join(BARS[-(-count * (len(BARS) - 1) // most)] for _, count in split.histogram)
            lines.append(f"{split.split:<{width}}  0 {bars} {split.longest:,} tokens")
        return "\n".join(lines)

    def shown_row(self, color: bool = False) -> str:
        """Return the first row of the first split as text, what is learned in green, or in double brackets."""
        first = self.splits[0]
        how = "green is learned" if color else "[[...]] is learned"
        return f"{first.where} ({how}):\n{marked(first.row, color)}"

    def lines(self) -> list[str]:
        """Return what was noticed, in a line each."""
        notes = [f"{split.split}: {note}" for split in self.splits for note in split.notes]
        return notes + self.overlap

    def text(self, color: bool = False) -> str:
        """Return everything as text, in colour for a terminal that shows it."""
        return "\n\n".join(
            filter(None, (str(self.table()), self.picture(), "\n".join(self.lines()), self.shown_row(color)))
        )

    def __str__(self) -> str:
        return self.text()


def describe_data(
    splits: Mapping[str, Rows | Sequence[Row]],
    tokenizer: Any,
    max_length: int | None = None,
    *,
    learn: str = "assistant",
    long: str = "error",
    bad_rows: str = "error",
) -> DataFacts:
    """Describe what a model with this tokenizer would learn of the rows: nothing is trained, and no model is needed.

    `splits` maps the name of a split to what `read_rows` or `read_jsonl` returned; the other options are those of
    `tokenize`. Raises DataError as `tokenize` does, unless `bad_rows` is "skip"; ConfigError for impossible arguments.

        print(pf.describe_data({"train": pf.read_rows("train.jsonl")}, tokenizer))

    >>> print(pf.describe_data({"train": rows}, tokenizer))
    Rows and their lengths in tokens
    split  rows  tokens  learned  shortest  50%  95%  longest
    train    20 ...
    """
    if not isinstance(splits, Mapping) or not splits or any(isinstance(rows, str) for rows in splits.values()):
        raise ConfigError(f'splits: expected rows by their split, {{"train": pf.read_rows(...)}}, got {splits!r:.60}')
    if bad_rows not in ("error", "skip"):
        raise ConfigError(f"bad_rows: expected error or skip, got {bad_rows!r}")
    facts, told = [], set[str]()
    for name, given in splits.items():
        rows = given.rows if isinstance(given, Rows) else given
        notices = Notices()
        skipped: list[str] | None = None if bad_rows == "error" else []
        examples = tokenize(rows, tokenizer, max_length, learn=learn, long=long, skipped=skipped, notices=notices)
        notes = [
            *(given.lines() if isinstance(given, Rows) else ()),
            *left_out(skipped, len(rows)),
            *notices.lines(told),
        ]
        facts.append(facts_of(name, examples, tokenizer, notes))
    named = {name: given.rows if isinstance(given, Rows) else given for name, given in splits.items()}
    return DataFacts(facts, [str(overlap) for overlap in overlaps(named) if overlap])


def lengths_table(splits: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of splits, as `DataFacts.as_dict` describes them."""
    columns = [
        Column("split"), Column("rows", ",d"), Column("tokens", ",d"), Column("learned", ".1%"), Column("shortest", ",d"),
        *(Column(f"{p}%", ",d") for p in PERCENTILES), Column("longest", ",d"),
    ]  # fmt: skip
    rows = [
        (s["split"], s["rows"], s["tokens"], s["learned"] / s["tokens"], s["shortest"], *s["percentiles"].values(), s["longest"])
        for s in splits
    ]  # fmt: skip
    return Table("Rows and their lengths in tokens", columns, rows)


def left_out(skipped: Sequence[str] | None, rows: int) -> list[str]:
    """Say in a line how many rows could not be used, and why the first three could not; nothing where all could."""
    return (
        [f"{len(skipped):,} of {rows:,} rows cannot be used and are left out: {'; '.join(skipped[:SHOWN])}"]
        if skipped
        else []
    )


def facts_of(split: str, examples: Sequence[Example], tokenizer: Any, notes: Sequence[str] = ()) -> SplitFacts:
    """Describe the examples of a split. Raises DataError where there are none."""
    if not examples:
        raise DataError(f"{split}: no row can be used{'; ' if notes else ''}{'; '.join(notes)}")
    lengths = sorted(len(example.tokens) for example in examples)
    cuts = quantiles(lengths, n=100, method="inclusive") if len(lengths) > 1 else lengths * 99
    width = max(1, -(-(lengths[-1] + 1) // BINS))
    counts = [0] * (lengths[-1] // width + 1)
    for length in lengths:
        counts[length // width] += 1
    first = examples[0]
    return SplitFacts(
        split=split, rows=len(examples), tokens=sum(lengths), learned=sum(e.label_tokens for e in examples),
        shortest=lengths[0], percentiles={f"{p}%": round(cuts[p - 1]) for p in PERCENTILES}, longest=lengths[-1],
        histogram=[(at * width, count) for at, count in enumerate(counts)], notes=list(notes), where=first.where,
        row=parts_of(first, tokenizer),
    )  # fmt: skip


def parts_of(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return a row's text in parts, and whether each is learned."""
    parts, at = [], 0
    for begin, end in (*example.learned, (len(example.tokens),) * 2):
        for stop, learned in ((begin, False), (end, True)):
            if stop > at:
                # as it follows the rest: a tokenizer may take a blank from the beginning of a text
                head = tokenizer.decode(example.tokens[:at], clean_up_tokenization_spaces=False)
                text = tokenizer.decode(example.tokens[:stop], clean_up_tokenization_spaces=False)
                parts.append((text[len(head) :], learned))
                at = stop
    return parts


def marked(parts: Sequence[tuple[str, bool]], color: bool = False) -> str:
    """Return a row's parts as text, with marks around what is learned. The middle of a long text is left out.

    Characters that would steer the terminal are shown as Python writes them, such as \\x1b.
    """
    on, off = (ON, OFF) if color else ("[[", "]]")
    if (more := len(parts) - 2 * SHOWN_PARTS) > 0:
        parts = [*parts[:SHOWN_PARTS], (f" ... {more:,} parts ... ", False), *parts[-SHOWN_PARTS:]]
    room = max(200, SHOWN_CHARACTERS // max(1, len(parts)))
    shown = []
    for text, learned in parts:
        if len(text) > room:
            text = f"{text[: room // 2]} ... {len(text) - room:,} characters ... {text[-room // 2 :]}"
        text = _STEERS.sub(lambda found: repr(found[0])[1:-1], text)
        shown.append(f"{on}{text}{off}" if learned else text)
    return "".join(shown)
