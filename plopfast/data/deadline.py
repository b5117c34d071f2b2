"""A limit on the time and size of chat templates: they are programs of the model's authors, in a sandbox without one.

Two checks. Source text that asks for huge numbers (`**`, or an integer above a million) is refused unread. And a timer of
the system ends a template that takes longer than `LIMIT_S` for a row. The timer works in the main thread only, not on
Windows, not while another program's alarm is set, and not within a single operation of Python, such as one that makes a
very long text: memory as such is not limited. Rejected: a process for each template (seconds to start, and a template can
behave for the first row), and a trace of each line (three times the time).
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from ..support.errors import ModelError

T = TypeVar("T")
LIMIT_S, TICK_S = 10.0, 0.2
LARGEST = 1_000_000


class Watch:
    """Ends what takes too long. Within the context, a block of `timed` raises ModelError, which names `what`, where it takes
    longer than `seconds` (or `TICK_S` more)."""

    def __init__(self, what: str, seconds: float = LIMIT_S) -> None:
        self.what, self.seconds = what, seconds
        self._ends = math.inf
        self._before: Any = None

    def __enter__(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        if main and hasattr(signal, "setitimer") and not signal.getitimer(signal.ITIMER_REAL)[0]:
            self._before = signal.signal(signal.SIGALRM, self._look)
            signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)
            self._before = None

    def _look(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() > self._ends:
            raise ModelError(f"{self.what} took longer than {self.seconds:g} s for one row: take another, or mend it")

    def timed(self, call: Callable[..., T], *arguments: Any, **more: Any) -> T:
        """Returns what `call` returns."""
        self._ends = time.monotonic() + self.seconds  # a timer for each call would take a tenth of a row's time
        try:
            return call(*arguments, **more)
        finally:
            self._ends = math.inf


def check_template(source: str, what: str) -> None:
    """Raises ModelError for a chat template that asks for huge numbers."""
    import jinja2

    with contextlib.suppress(jinja2.TemplateSyntaxError):  # it is told when a row is rendered
        for line, kind, text in jinja2.Environment().lex(source):
            huge = kind == "integer" and (len(text) > 12 or int(text.replace("_", ""), 0) > LARGEST)
            if huge or (kind == "operator" and text == "**"):
                raise ModelError(f"{what}, line {line}: {text[:20]!r} can fill the memory: take another, or mend it")
