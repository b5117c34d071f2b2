"""One table for the terminal, a CSV file and the report page: all three show the same rows."""

import csv
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNKNOWN = "-"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of one
DIFFERS = "* "  # begins a cell that disagrees with the rest; the page highlights its row. ASCII, for any terminal


@dataclass(frozen=True)
class Column:
    """A column: its heading, and the format of its numbers as in `f"{value:.3f}"`. Formatted numbers align to the right."""

    heading: str
    form: str = ""

    def cell(self, value: Any) -> str:
        """The value as text: None is "-", a bool is yes or no, and a string stays as it is."""
        if value is None:
            return UNKNOWN
        if isinstance(value, bool):
            return "yes" if value else "no"
        return value if isinstance(value, str) else format(value, self.form)

    def aligned(self, cell: str, width: int) -> str:
        return cell.rjust(width) if self.form else cell.ljust(width)


@dataclass(frozen=True)
class Table:
    """Rows of plain values under `columns`, a caption above and a note below.

    Example: `print(Table("Loss", [Column("step"), Column("loss", ".3f")], [(1, 2.5), (2, None)]))`
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def cells(self) -> Iterator[list[str]]:
        """Yield the text of each row's cells. Raises ValueError for a row that is longer or shorter than the columns."""
        for row in self.rows:
            yield [column.cell(value) for column, value in zip(self.columns, row, strict=True)]

    def __str__(self) -> str:
        """Return aligned text for the terminal. Empty lines are left out, so a table without headings has no head."""
        lines = [[column.heading for column in self.columns], *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = ("  ".join(map(Column.aligned, self.columns, line, widths)).rstrip() for line in lines)
        return "\n".join(filter(None, (self.caption, *aligned, self.note)))

    def html(self) -> str:
        """Return a plain HTML table, as a notebook shows it; numbers are to the right."""
        heads = "".join(f"<th>{html.escape(column.heading)}</th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(map(_cell, self.columns, line))}</tr>" for line in self.cells())
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in self.note.splitlines())
        return f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def write_csv(self, path: Path) -> None:
        """Write the headings and the values in full precision; None is an empty cell.

        A text that a spreadsheet would take for a formula gets an apostrophe in front, as OWASP recommends.
        """
        lines = [[column.heading for column in self.columns], *self.rows]
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([_harmless(cell) for cell in line] for line in lines)


def _cell(column: Column, cell: str) -> str:
    style = ' style="text-align:right"' if column.form else ""
    return f"<td{style}>{html.escape(cell)}</td>"


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell
