"""The report's pictures. Each is drawn from the rows that its CSV file holds, so the two cannot differ.

Colour never speaks alone: what matters also differs by marker, hatch or line, and the lightness of the one colour map,
cividis, rises throughout. The pictures are as wide as a phone shows without shrinking the text.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..support.tables import Column, Table

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # a module's name may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}
WIDTH = 4.8  # inches
INK, GREY = "#222222", "#777777"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind text, so that no line crosses it


@dataclass
class Picture:
    """A PNG, what it shows in words (`alt`), and its rows under `head`; None is an empty cell."""

    name: str
    alt: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    png: bytes = field(repr=False)

    def save(self, folder: Path) -> None:
        """Write NAME.png and NAME.csv into `folder`."""
        (folder / f"{self.name}.png").write_bytes(self.png)
        Table(self.name, [Column(name) for name in self.head], self.rows).write_csv(folder / f"{self.name}.csv")


@rc_context(STYLE)
def by_type(rows: Sequence[Sequence[Any]]) -> bytes:
    """Draw a dot and its interval for each (type, NFN, low, high, chosen). Without an interval, low and high are None."""
    axes = _axes(0.33 * len(rows) + 1.0)
    axes.axvline(1.0, color=GREY, linestyle=":", zorder=0)
    for at, (_, value, low, high, chosen) in enumerate(rows):
        _mark(axes, at, value, low, high, chosen, cap=13)
        text = f"{value:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")
        _write(axes, text, (value if low is None else high, at), (7, 0), va="center", bbox=PAPER)
    axes.plot([], [], "s", color=INK, label="chosen")
    axes.plot([], [], "o", color=INK, markerfacecolor="white", label="not chosen")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0)
    _rows_of(axes, [row[0] for row in rows])
    axes.set_xmargin(0.05)
    axes.autoscale_view()
    left, right = axes.get_xlim()
    axes.set_xlim(right=right + 0.35 * (right - left))  # for the numbers
    axes.set_xlabel("NFN, mean over layers (dotted: 1, a random input)")
    return _png(axes)


@rc_context(STYLE)
def heat_map(rows: Sequence[Sequence[Any]]) -> bytes:
    """Draw a cell for each (module, type, layer, NFN, z, outlier), with a cross on outliers."""
    types = list(dict.fromkeys(row[1] for row in rows))
    layers = sorted({row[2] for row in rows})
    cells: dict[tuple[str, int], list[float]] = {}
    for _, type_, layer, value, *_ in rows:
        cells.setdefault((type_, layer), []).append(value)
    grid = [[fmean(cells.get((type_, layer), [nan])) for layer in layers] for type_ in types]
    height = 0.33 * len(types) + 1.5
    axes = _axes(height)
    picture = axes.imshow(grid, aspect="auto", cmap="cividis")
    crosses = [(layers.index(row[2]), types.index(row[1])) for row in rows if row[5]]
    if crosses:
        for color, width in (("white", 3.2), ("black", 1.4)):
            axes.plot(*zip(*crosses, strict=True), "x", color=color, markersize=5, markeredgewidth=width)
    axes.set_yticks(range(len(types)), [_short(name) for name in types])
    every = max(1, -(-len(layers) // 10))
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_xlabel("layer" + (" (cross: outlier within its type)" if crosses else ""))
    axes.figure.colorbar(picture, label="NFN", orientation="horizontal", pad=0.9 / height, aspect=40)
    return _png(axes)


@rc_context(STYLE)
def memory(rows: Sequence[Sequence[Any]]) -> bytes:
    """Draw a bar for each (name, MiB, ...), hatched for full fine-tuning."""
    axes = _axes(0.33 * len(rows) + 0.7)
    for at, (name, total, *_) in enumerate(rows):
        full = name == "full"
        axes.barh(at, total, 0.6, color="white" if full else GREY, edgecolor=INK, hatch="////" if full else "")
        _write(axes, f"{total:,.0f}", (total, at), (4, 0), va="center")
    _rows_of(axes, [row[0] for row in rows])
    axes.margins(x=0.12)
    axes.set_xlabel("MiB")
    return _png(axes)


@rc_context(STYLE)
def lengths(rows: Sequence[Sequence[Any]]) -> bytes:
    """Draw a panel of bars for each split of (split, tokens at least, rows)."""
    splits = list(dict.fromkeys(row[0] for row in rows))
    figure = Figure(figsize=(WIDTH, 1.0 + 0.9 * len(splits)))
    panels = figure.subplots(len(splits), 1, sharex=True, squeeze=False)[:, 0]
    for axes, split in zip(panels, splits, strict=True):
        begins, counts = zip(*((row[1], row[2]) for row in rows if row[0] == split), strict=True)
        width = begins[1] if len(begins) > 1 else 1
        axes.bar(begins, counts, width, align="edge", color=GREY, edgecolor=INK)
        axes.set_ylabel(f"{split}\nrows")
        axes.locator_params(axis="y", nbins=4, integer=True)
    panels[-1].set_xlabel("tokens in a row")
    figure.tight_layout()
    return _png(panels[0])


@rc_context(STYLE)
def curve(rows: Sequence[Sequence[Any]]) -> bytes:
    """Draw lines through (step, training loss, validation loss). A None leaves its point out."""
    axes = _axes(2.6)
    for column, style, color, label in ((1, "-", GREY, "training"), (2, "o--", INK, "validation")):
        points = [(row[0], row[column]) for row in rows if row[column] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, markersize=4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per label token")
    if axes.lines:
        axes.legend(frameon=False)
    return _png(axes)


@rc_context(STYLE)
def rewards(rows: Sequence[Sequence[Any]]) -> bytes:
    """Draw a line through (step, reward, ...). A None leaves its point out."""
    axes = _axes(2.6)
    points = [row[:2] for row in rows if row[1] is not None]
    axes.plot(*zip(*points, strict=True), "o-", color=INK, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward of a step")
    return _png(axes)


@rc_context(STYLE)
def before_after(rows: Sequence[Sequence[Any]]) -> bytes:
    """Draw two panels of bars for (model, accuracy, low, high, loss, rows). Without an interval, low and high are None."""
    panels = _axes(2.3, columns=2)
    names, accuracies, lows, highs, losses, _ = zip(*rows, strict=True)
    for axes, title, values in zip(panels, ("accuracy", "loss"), (accuracies, losses), strict=True):
        bars = axes.bar(names, values, 0.6, color=["white", "#999999"], edgecolor=INK, hatch=["", "////"])
        if title == "accuracy" and None not in lows:
            for at, (low, high) in enumerate(zip(lows, highs, strict=True)):
                axes.plot([at, at], [low, high], color=INK, linewidth=1.8, marker="_", markersize=9)
                _write(axes, f"{values[at]:.3f}", (at, high), (0, 3), ha="center")
        else:
            axes.bar_label(bars, fmt="%.3f", padding=2)
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.15)
    axes.figure.tight_layout()
    return _png(axes)


@rc_context(STYLE)
def forest(rows: Sequence[Sequence[Any]], words: Sequence[str], filled: Sequence[bool], label: str) -> bytes:
    """Draw a mark and its interval for each (name, value, low, high, ...), with one of the `words` above it.

    The mark is a square where `filled`, otherwise an open circle. The dotted line is at 0; `label` names the axis.
    """
    axes = _axes(0.4 * len(rows) + 0.8)
    axes.axvline(0.0, color=GREY, linestyle=":", zorder=0)
    for at, ((_, value, low, high, *_), word, full) in enumerate(zip(rows, words, filled, strict=True)):
        _mark(axes, at, value, low, high, full, cap=9)
        _write(axes, word, (value, at), (0, 6), ha="center", bbox=PAPER)
    _rows_of(axes, [row[0] for row in rows])
    axes.margins(x=0.2)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(label)
    return _png(axes)


def _mark(axes: Any, at: int, value: float, low: float | None, high: float | None, filled: bool, cap: float) -> None:
    """Draw a value, as a square where `filled`, else an open circle, and its interval, if any, with ends of size `cap`."""
    if low is not None:
        axes.plot([low, high], [at, at], color=INK, linewidth=1.8, marker="|", markersize=cap)
    axes.plot(value, at, "s" if filled else "o", color=INK, markerfacecolor=INK if filled else "white", markersize=7)


def _write(axes: Any, text: str, at: tuple[float, float], moved: tuple[int, int], **how: Any) -> None:
    """Write a small text beside a point of the picture, `moved` by so many typographic points."""
    axes.annotate(text, at, moved, textcoords="offset points", fontsize=8, **how)


def _rows_of(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.tick_params(axis="y", length=0)


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _axes(height: float, columns: int = 1) -> Any:
    """Return the axes of a new figure `height` inches high: one, or an array of `columns`."""
    return Figure(figsize=(WIDTH, height)).subplots(1, columns)


def _png(axes: Any) -> bytes:
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()
