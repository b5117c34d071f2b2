"""Progress of long work on stderr: bars with rate and time left, and lines that leave the bars whole."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Silent:
    initial, total = 0, 0

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, n: int = 1) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...


def bar(label: str, total: int | None, unit: str, show: bool, smoothing: float = 0.3) -> Any:
    """Returns a context manager with `update(n)` and `set_postfix_str(text)`, that shows nothing unless `show`.

    A bar within another one goes away at its end. `smoothing` is tqdm's: 0 for the mean rate, 1 for the last one.
    """
    if not show:
        return _Silent()
    from tqdm import tqdm

    more: dict[str, Any] = {"leave": None, "smoothing": smoothing, "mininterval": 0.5, "dynamic_ncols": True}
    return tqdm(desc=f"{label:<9}", total=total, unit=f" {unit}", **more)


class Work:
    """Long work in pieces, on one bar with the time left; bars of a piece come and go below it.

    with Work("trainings", 15, show=True) as work:
        work.skip()  # was done before an interruption
        with work.piece("mlp, learning rate 0.001, seed 0"):
            ...
    """

    def __init__(self, label: str, total: int, show: bool) -> None:
        self._bar = bar(label, total, "pieces", show, smoothing=0)

    def __enter__(self) -> "Work":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    @contextlib.contextmanager
    def piece(self, text: str) -> Iterator[None]:
        """Shows which piece is at work; it counts as done unless it raises."""
        self._bar.set_postfix_str(text)
        yield
        self._bar.update()

    def grow(self, pieces: int) -> None:
        """Counts pieces to come that were not known before, or, below 0, that will not come."""
        self._bar.total += pieces

    def skip(self) -> None:
        """Counts a piece that was done earlier; the rate and the time left ignore it."""
        self._bar.initial += 1
        self._bar.update()


def shows_color(stream: TextIO) -> bool:
    """Returns whether a stream is a terminal whose user has not asked for no colour (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def say(text: str) -> None:
    """Prints a line to stderr, above any bars."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(text, file=sys.stderr, flush=True)
