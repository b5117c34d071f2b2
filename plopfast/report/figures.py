"""The page's figures, in raw values: figures.j2 draws them, report/NAME.csv holds their numbers.

Every figure has a title that is a finding, or a plain noun where no rule holds; `alt` is the finding with its numbers for
those who listen. Colour never speaks alone: what is chosen is filled, what is not is open, and a number stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..support.tables import Column, Table
from .scales import Scale

Text = str  # a plain text is escaped; words.rich makes Markup
SAME = 1.5  # per cent of an axis: a reference nearer to a tick has the tick's label
FITS = 92  # characters of a table as wide as the column of evidence


@dataclass(frozen=True)
class Csv:
    """The numbers of a figure, for report/NAME.csv: None is an empty cell."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def table(self) -> Table:
        return Table(self.name, [Column(name) for name in self.head], self.rows)


@dataclass(kw_only=True)
class Figure:
    """What every figure has: a title, a line below it, a note, and its numbers."""

    kind: ClassVar[str] = ""
    title: str
    sub: Text = ""
    alt: str = ""
    note: Text = ""
    csv: Csv | None = None


@dataclass(kw_only=True)
class Bar:
    """A row of a chart: a name, what is drawn, and the number in words.

    `span`: an interval, or the way from one dot to another (`joined`). `box`: an interval drawn as a box. `bar`: from 0.
    `dots`: (value, filled). `strip`: single values as faint dots. `tick`: a short line. `cut`: a line of text below the row.
    """

    name: str
    small: str = ""
    text: str
    more: str = ""
    on: bool = False
    mark: bool = False
    dots: Sequence[tuple[float, bool]] = ()
    span: tuple[float, float] | None = None
    joined: bool = False
    box: tuple[float, float] | None = None
    bar: float | None = None
    hatched: bool = False
    strip: Sequence[float] = ()
    tick: float | None = None
    cut: str = ""


@dataclass(kw_only=True)
class Chart(Figure):
    """A table with a drawn cell in each row, on one axis. `look` is the CSS class: how high and wide the cells are."""

    kind: ClassVar[str] = "chart"
    rows: Sequence[Bar]
    scale: Scale
    axis: str = ""
    reference: tuple[float, str] | None = None
    look: str = "plain"
    height: int = 38

    @property
    def name_px(self) -> int:
        """How wide the column of names is."""
        longest = max((max(len(row.name) * 8.3, len(row.small) * 6.9) for row in self.rows), default=0)
        return int(min(230, max(60, longest + 22 + 16 * any(row.mark for row in self.rows))))

    @property
    def text_px(self) -> int:
        """How wide the column of numbers is."""
        both = sum if self.look == "dumb" else max  # beside each other, or one below the other
        longest = max((both((len(row.text) * 9, len(row.more) * 7.2)) for row in self.rows), default=0)
        return int(min(190, max(56, longest + 26)))

    def percent(self, value: float) -> str:
        return f"{100 * self.scale.at(value):.4g}%"

    def width(self, low: float, high: float) -> str:
        return f"{max(0.35, 100 * (self.scale.at(high) - self.scale.at(low))):.4g}%"

    def dust(self, row: Bar) -> str:
        """The path of the faint dots that are on the scale: a zero-length line each, in columns of three heights."""
        values = [value for value in row.strip if not self.scale.beyond(value)]
        return "".join(
            f"M{1000 * self.scale.at(value):.0f} {(38, 50, 62)[at % 3]}h.01" for at, value in enumerate(values)
        )

    def from_reference(self, value: float) -> float:
        """How far a value is from the reference, in per cent of the axis; 100 without one."""
        return abs(100 * (self.scale.at(value) - self.scale.at(self.reference[0]))) if self.reference else 100.0

    def reference_is_free(self) -> bool:
        """Whether the reference's name has room between the ticks' labels."""
        return self.reference is not None and all(self.from_reference(value) >= SAME for value, _ in self.scale.ticks)

    def over(self, row: Bar) -> int:
        """How many of the faint dots lie beyond the scale."""
        return sum(self.scale.beyond(value) for value in row.strip)


@dataclass(kw_only=True)
class Plot(Figure):
    """A line plot: `dots` for single values, a `line`, `marks` (x, y, label) as open circles, and `bars` (from, to, height)."""

    kind: ClassVar[str] = "plot"
    x: Scale
    y: Scale
    dots: Sequence[tuple[float, float]] = ()
    line: Sequence[tuple[float, float]] = ()
    marks: Sequence[tuple[float, float, str]] = ()
    bars: Sequence[tuple[float, float, float]] = ()
    key: Sequence[tuple[str, str]] = ()  # (what is drawn: dot, line, mark; words)
    height: int = 230
    axis: str = ""

    def _xy(self, x: float, y: float) -> str:
        return f"{1000 * self.x.at(x):.0f} {1000 - 1000 * self.y.at(y):.0f}"

    def line_path(self) -> str:
        return "M" + "L".join(self._xy(x, y) for x, y in self.line) if self.line else ""

    def dots_path(self) -> str:
        return "".join(f"M{self._xy(x, y)}h.01" for x, y in self.dots)

    def bars_path(self) -> str:
        """Bars from 0, with a gap as wide as a hair between them."""
        found = []
        for low, high, y in self.bars:
            left, right = 1000 * self.x.at(low) + 1, 1000 * self.x.at(high) - 1
            if y:
                found.append(f"M{left:.0f} 1000V{1000 - 1000 * self.y.at(y):.0f}H{right:.0f}V1000Z")
        return "".join(found)


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: its class from 0 to 6, what it says, and whether one of its modules is an outlier."""

    shade: int | None
    title: str
    outlier: bool = False


@dataclass(kw_only=True)
class Heat(Figure):
    """A heat map: a row of cells for each name, under `columns`. The lowest class stands out in both colour modes."""

    kind: ClassVar[str] = "heat"
    rows: Sequence[tuple[str, bool, Sequence[Cell]]]  # name, chosen, cells
    columns: Sequence[str]  # labels; empty ones are not written
    legend: Sequence[tuple[int, str]]


@dataclass(kw_only=True)
class Stack(Figure):
    """Stacked bars on one axis from 0: (name, total, parts), a part being (class, value, label); `key`: (class, words)."""

    kind: ClassVar[str] = "stack"
    bars: Sequence[tuple[str, str, Sequence[tuple[str, float, str]]]]
    key: Sequence[tuple[str, str, str]] = ()  # class, words, number
    tall: bool = False

    def parts(self, bar: int) -> list[tuple[str, float, float, str]]:
        """(class, left, width, label) of a bar's parts, in per cent; a label is left out where it does not fit."""
        most = max((sum(max(0.0, value) for _, value, _ in parts) for *_, parts in self.bars), default=0.0) or 1.0
        at, found = 0.0, []
        for shade, value, label in self.bars[bar][2]:
            width = 100 * max(0.0, value) / most
            found.append((shade, at, width, label if width >= 1.1 * len(label) + 1.5 else ""))
            at += width
        return found


@dataclass(kw_only=True)
class Tables(Figure):
    """A table of text and numbers. One that is too wide is shown in parts, each with the first column; `marked`: rows that
    begin with "* " stand out."""

    kind: ClassVar[str] = "tables"
    table: Table
    wide: bool = False  # cells of several lines: the first column takes the room

    def parts(self) -> list[Table]:
        """The table, or parts of it that fit the page's column."""
        columns, cells = list(self.table.columns), [list(row) for row in self.table.cells()]
        if self.wide or not columns:
            return [self.table]
        widths = [
            min(30, max([len(column.heading) // (2 if " " in column.heading else 1), *(len(row[at]) for row in cells)]))
            + 2
            for at, column in enumerate(columns)
        ]
        groups: list[list[int]] = [[]]
        room = FITS - widths[0]
        for at in range(1, len(columns)):
            if groups[-1] and room < widths[at]:
                groups.append([])
                room = FITS - widths[0]
            groups[-1].append(at)
            room -= widths[at]
        if len(groups) == 1:
            return [self.table]
        parts = []
        for group in groups:
            rows = [[row[0], *(row[at] for at in group)] for row in self.table.rows]
            parts.append(Table(self.table.caption, [columns[0], *(columns[at] for at in group)], rows))
        return parts


@dataclass(kw_only=True)
class Matrix(Figure):
    """A confusion matrix: a row for each expected answer, a column for each that was given."""

    kind: ClassVar[str] = "matrix"
    names: Sequence[str]
    counts: Sequence[Sequence[int]]

    def shade(self, row: int, column: int) -> str:
        """The CSS class of a cell: right answers, none, or how much of the row's mistakes it has."""
        count = self.counts[row][column]
        if row == column:
            return "d"
        most = max((n for i, line in enumerate(self.counts) for j, n in enumerate(line) if i != j), default=0)
        return f"e{0 if not count else 3 if count > 0.6 * most else 2 if count > 0.3 * most else 1}"


@dataclass(kw_only=True)
class Samples(Figure):
    """Answers side by side: (prompt, before, after, what is said of the first, of the second)."""

    kind: ClassVar[str] = "samples"
    samples: Sequence[tuple[str, str, str, str, str]]


@dataclass(kw_only=True)
class Layer(Figure):
    """A layer of the model as named blocks of modules: (block, [(module, whether it has an adapter)])."""

    kind: ClassVar[str] = "layer"
    blocks: Sequence[tuple[str, Sequence[tuple[str, bool]]]]
    times: str = ""


@dataclass(kw_only=True)
class Row(Figure):
    """A row of the data, in parts (text, whether it is learned)."""

    kind: ClassVar[str] = "row"
    parts: Sequence[tuple[str, bool]]
    key: tuple[str, str] = ("read, not learned", "learned")


@dataclass(kw_only=True)
class Code(Figure):
    """Lines to paste."""

    kind: ClassVar[str] = "code"
    code: str


@dataclass(frozen=True)
class Side:
    """Two or three figures side by side; one below the other on a phone."""

    figures: Sequence[Figure]
    kind: ClassVar[str] = "side"


@dataclass(frozen=True)
class Notes:
    """Sentences, one below the other."""

    lines: Sequence[Text]
    kind: ClassVar[str] = "notes"


@dataclass(frozen=True)
class Fold:
    """What opens on a click, and is open in print."""

    title: str
    blocks: Sequence[Any]
    kind: ClassVar[str] = "fold"


@dataclass(frozen=True)
class Words:
    """Terms and what they mean."""

    terms: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "words"


@dataclass(kw_only=True)
class Section:
    """A section of the page: the answer in the left column, the evidence (`body`) in the right one.

    One that lacks its file has no body, and `lacks` is the line that says which command makes it. `command` is the one that
    made its file.
    """

    id: str
    title: str
    nav: str = ""
    answer: Sequence[Text] = ()
    warnings: Sequence[Text] = ()
    caveats: Sequence[Text] = ()
    body: list[Any] = field(default_factory=list)
    lacks: tuple[str, str] | None = None  # words, command
    command: str = ""

    def figures(self) -> list[Figure]:
        """Every figure in it, those side by side and folded included."""
        found, open_ = [], list(self.body)
        while open_:
            block = open_.pop(0)
            if isinstance(block, Figure):
                found.append(block)
            open_[:0] = (
                getattr(block, "figures", None) or getattr(block, "blocks", None) or []
                if not isinstance(block, Layer)
                else []
            )
        return found
