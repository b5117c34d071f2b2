"""Types of arguments that are no settings: paths and numbers within bounds."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..support.errors import shown
from ..support.options import problem_of_choice, problem_of_text


def path(text: str) -> Path:
    """A path. Raises ArgumentTypeError for an empty one, as an unset shell variable gives, and for odd characters."""
    if problem := problem_of_text(text):
        raise argparse.ArgumentTypeError(problem)
    return Path(text)


def text(text: str) -> str:
    """Any text. Raises ArgumentTypeError for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, got {shown(text, ascii)}") from None
    return text


def number(kind: type[int] | type[float], most: float) -> Callable[[str], float]:
    """The type of a number above 0 and at most `most`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value <= most:  # so NaN is refused too
            raise argparse.ArgumentTypeError(f"expected a number above 0 and at most {most:g}, got {shown(text)}")
        return value

    return parse


def one_of(choices: Sequence[str]) -> dict[str, Any]:
    """argparse's type and metavar of a choice. Its own check of choices would not say which one was meant."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(problem_of_choice(text, choices))
        return text

    return {"type": parse, "metavar": f"{{{','.join(choices)}}}"}
