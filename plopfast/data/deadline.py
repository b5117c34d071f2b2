"""A limit on the time and size of chat templates: they are programs of the model's authors, in a sandbox without one.

Two checks. Source text that asks for huge numbers (`**`, or an integer above a million) is refused unread. And a timer of
the system ends a template that takes longer than `LIMIT_S` for a row. The timer works in the main thread only, not on
Windows, not while another program's alarm is set, and not within a single operation of Python, such as one that makes a
very long text: memory as such is not limited. Rejected: a process for each template (seconds to start, and a template can
behave for the first row), and a trace of each line (three times the time).
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from ..support.errors import ModelError

LIMIT_S = 10.0
LARGEST = 1_000_000


@contextlib.contextmanager
def deadline(what: str, seconds: float = LIMIT_S) -> Iterator[None]:
    """Raises ModelError, which names `what`, where the block takes longer than `seconds`."""
    main = threading.current_thread() is threading.main_thread()
    if not (main and hasattr(signal, "setitimer")) or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise ModelError(f"{what} took longer than {seconds:g} s for one row: take another, or mend it")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_template(source: str, what: str) -> None:
    """Raises ModelError for a chat template that asks for huge numbers."""
    import jinja2

    with contextlib.suppress(jinja2.TemplateSyntaxError):  # it is told when a row is rendered
        for line, kind, text in jinja2.Environment().lex(source):
            huge = kind == "integer" and (len(text) > 12 or int(text.replace("_", ""), 0) > LARGEST)
            if huge or (kind == "operator" and text == "**"):
                raise ModelError(f"{what}, line {line}: {text[:20]!r} can fill the memory: take another, or mend it")
