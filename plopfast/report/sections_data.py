"""Section 5: whether the data was read as it was meant."""

from typing import Any

from ..data.describe import lengths_table
from .facts import data_paths, rows_seen
from .figures import Csv, Notes, Plot, Row, Section, Side, Tables
from .folder import RunFolder
from .scales import Scale, linear
from .words import capital, number, place_of, rich, several, share, without_folders

PARTS = 8  # of a row, at its beginning and at its end
ROOM = 2000  # characters of a row


def data(run: RunFolder) -> Section:
    """data.json: the rows, how long they are, how much of them is learned, and what was left out."""
    section = Section(id="data", title="Your data", command=run.noted("data"))
    if not run.data:
        section.lacks = ("How the rows were read is not kept here.", run.command("data"))
        return section
    splits, overlap = run.data["splits"], run.data["overlap"]
    rows = sum(split["rows"] for split in splits)
    section.answer = [
        f"{several(rows, 'row')} in {number(len(splits))} split{'s' * (len(splits) != 1)} were used.",
        rich("<b>Rows are in several splits</b>: see below.")
        if overlap
        else rich("<b>No row or prompt is in two splits.</b>")
        if len(splits) > 1
        else "",
        f"{share(splits[0]['learned'] / splits[0]['tokens'])} of the {splits[0]['split']} tokens are learned.",
    ]
    section.answer = [text for text in section.answer if text]
    if overlap:
        section.warnings = [rich("<b>Overlap.</b> Rows that were trained on flatter the test.")]
    seen, counted = rows_seen(run)
    if seen:
        section.caveats = [f"The steps took {'' if counted else 'about '}{seen:,.0f} rows."]
    table = lengths_table(splits)
    section.body = [
        Tables(title="Splits", sub="Lengths in tokens; 50%: half of the rows are as long or shorter", table=table)
    ]
    section.body.append(
        Side([_lengths(splits, at) for at in range(len(splits))])
        if 1 < len(splits) <= 3
        else Side([_lengths(splits, 0)])
    )
    section.body.append(_row(splits[0]))
    paths = data_paths(run)
    notes = [f"{split['split']}: {note}." for split in splits for note in split["notes"]] + [
        f"{line}." for line in overlap
    ]
    section.body.append(
        Notes(
            [
                capital(without_folders(note, paths)) if note[0].isupper() else without_folders(note, paths)
                for note in notes
            ]
        )
    )
    return section


def _lengths(splits: list[dict[str, Any]], at: int) -> Plot:
    """A histogram; the first one holds the numbers of all splits."""
    split = splits[at]
    begins = [begin for begin, _ in split["histogram"]]
    width = begins[1] - begins[0] if len(begins) > 1 else max(1, split["longest"] - begins[0] + 1)
    bars = [(float(begin), float(begin + width), float(count)) for begin, count in split["histogram"]]
    first = next((begin for begin, _, count in bars if count), 0.0)
    last = bars[-1][1]
    low = first if first > 0.25 * last else 0.0
    ticks = [(value, label) for value, label in linear([low, last], most=4).ticks if low <= value <= last]
    spoken = (
        f"{split['split']} {split['shortest']} to {split['longest']}, half of them up to {split['percentiles']['50%']}"
    )
    rows = [(s["split"], begin, count) for s in splits for begin, count in s["histogram"]] if not at else []
    return Plot(
        title=f"{split['split'].capitalize()}: {split['shortest']} to {split['longest']} tokens", sub="Rows by length in tokens", alt=f"Rows by their length in tokens: {spoken}.",
        x=Scale(low, last, ticks), y=linear([count for *_, count in bars], zero=True, most=3), bars=[bar for bar in bars if bar[0] >= low], height=130,
        csv=Csv("row_lengths", ("split", "tokens_from", "rows"), rows) if not at else None,
    )  # fmt: skip


def _row(split: dict[str, Any]) -> Row:
    parts = [(text, learned) for text, learned in split["row"]]
    if (more := len(parts) - 2 * PARTS) > 0:
        parts = [*parts[:PARTS], (f" … {several(more, 'part')} … ", False), *parts[-PARTS:]]
    room = max(200, ROOM // max(1, len(parts)))
    parts = [
        (
            text
            if len(text) <= room
            else f"{text[: room // 2]} … {len(text) - room:,} characters … {text[-room // 2 :]}",
            learned,
        )
        for text, learned in parts
    ]
    return Row(
        title="One row, as the model sees it",
        sub=f"The first {split['split']} row ({place_of(split['where'])})",
        parts=parts,
    )
