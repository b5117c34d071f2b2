"""Errors that users see. A message says what was expected, what was found, where, and how to mend it."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any


class PlopfastError(Exception):
    """Base of all errors about plopfast's inputs; the command line prints it and exits with 2.

    >>> try:
    ...     pf.read_rows("none.jsonl")
    ... except pf.PlopfastError as error:
    ...     print(error)
    none.jsonl: ...
    """


class ConfigError(PlopfastError):
    """Options that contradict each other or have impossible values."""


class DataError(PlopfastError):
    """A data file that is missing, broken, empty or does not fit the model."""


class ModelError(PlopfastError):
    """A model that cannot be found, loaded or scored."""


class PlacementError(PlopfastError):
    """A placement that does not fit the model or the scores."""


class AdapterError(PlopfastError):
    """An adapter that is broken or belongs to another base model."""


class BackendError(PlopfastError, RuntimeError):
    """A backend that cannot run on this device; the message says why.

    >>> pf.lora_linear(x, weight, lora_A, lora_B, scaling=2.0, backend="fused")
    Traceback (most recent call last):
    plopfast.support.errors.BackendError: ...
    """


class TrainingError(PlopfastError):
    """Training that cannot go on."""


class RankError(PlopfastError):
    """Another rank has failed; its own message says why."""


class FileError(PlopfastError):
    """A file or folder that cannot be read or written, or must not be overwritten."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work, after its state was saved; the command line exits with 128 + its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns the end of an error about an unknown name: the most similar known one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; "" where it has none."""
    return next(iter(str(error).strip().splitlines()), "")


def for_terminal(text: str) -> str:
    """The text without characters that would steer a terminal, such as ESC in the name of a file."""
    return re.sub(r"[^\n\t -~\xa0-\ud7ff\ue000-\U0010ffff]", lambda odd: ascii(odd[0])[1:-1], text)


def shown(value: Any, form: Callable[[Any], str] = repr, limit: int = 60) -> str:
    """The value for a message, cut where it is long."""
    try:
        text = form(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[:limit]}..."
