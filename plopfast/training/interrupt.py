"""Signals during a training: they are noted, so that no step is torn."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Noted:
    """The signal that has come; 0 for none."""

    number: int = 0


@contextlib.contextmanager
def interruptible() -> Iterator[Noted]:
    """Notes the first SIGINT or SIGTERM in the value that it yields; a second one raises KeyboardInterrupt at once.

    The earlier handlers come back at the end. Outside the main thread, where Python allows no handlers, nothing is noted.
    """
    noted = Noted()

    def note(number: int, _frame: Any) -> None:
        if noted.number:
            raise KeyboardInterrupt
        noted.number = number

    with contextlib.ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                undo.callback(signal.signal, number, signal.signal(number, note))
        yield noted
