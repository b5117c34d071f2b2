"""Options: what one setting may be, and the base class that checks a group of them."""

import dataclasses
import inspect
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar, get_args

from .errors import ConfigError, nearest, shown

_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    *,
    positive: bool = False,
    below: float = 1e9,
    most: float | None = None,
    empty: bool = False,
    free: bool = False,
    file: bool = False,
) -> Any:
    """A field of a group of settings.

    A number must be at least 0 (above 0 with `positive`) and less than `below`, by default a billion, or at most `most`. A text is not empty,
    unless `empty`. A `free` option may change when a run is resumed: what is learned does not depend on it (single bits
    may). A `file` option is the path of a file, or a list of them.
    """
    rules = {
        "help": help,
        "choices": choices,
        "positive": positive,
        "below": below if most is None else math.nextafter(most, math.inf),
        "most": most,
        "empty": empty,
        "free": free,
        "file": file,
    }
    return dataclasses.field(default=default, metadata=rules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the groups. Raises ConfigError for a value that its option does not allow."""

    title: ClassVar[str] = ""  # heading of the group's own options in a command's help; inherited from the first base

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            name, value, rules = item.name, getattr(self, item.name), item.metadata
            if not fits(item.type, value):
                raise ConfigError(f"{name}: expected {words_of(item.type)}, got {shown(value)}")
            if rules["choices"] and value is not None and value not in rules["choices"]:
                raise ConfigError(f"{name}: {problem_of_choice(value, rules['choices'])}")
            if rules["file"] and value is not None and not (value and all(value)):
                raise ConfigError(f"{name}: expected the name of a file, got {value!r}")
            for text in value if isinstance(value, list | tuple) else [value] if isinstance(value, str) else []:
                if problem := problem_of_text(text) if text or not rules["empty"] else "":
                    raise ConfigError(f"{name}: {problem}")
            if isinstance(value, int | float):
                low = "above" if rules["positive"] else "of at least"
                enough = value > 0 if rules["positive"] else value >= 0
                if not (enough and value < rules["below"]):  # so NaN is refused too
                    high = f"below {rules['below']:g}" if rules["most"] is None else f"at most {rules['most']:g}"
                    raise ConfigError(f"{name}: expected a number {low} 0 and {high}, got {shown(value, str)}")


def fits(kind: Any, value: Any) -> bool:
    """Whether a value has the type of an option: a class, or several in a union."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, list | tuple):
        return tuple[str, ...] in kinds and all(isinstance(item, str) for item in value)
    plain = {one for one in kinds if one != tuple[str, ...]} | ({int} if float in kinds else set())
    return isinstance(value, tuple(plain)) and (bool in plain or not isinstance(value, bool))


def words_of(kind: Any) -> str:
    """Names the type of an option for a message, such as "int | None"."""
    return "a string or a list of strings" if tuple[str, ...] in get_args(kind) else inspect.formatannotation(kind)


SHORT = {  # what people write for a choice, and what no similarity of letters finds
    "4bit": "nf4", "int4": "nf4", "fp4": "nf4", "q4": "nf4", "8bit": "int8", "q8": "int8", "bf16": "bfloat16", "fp16": "float16",
    "half": "float16", "fp32": "float32", "float": "float32", "gpu": "cuda",
}  # fmt: skip


def problem_of_choice(value: str, choices: Sequence[str]) -> str:
    """Says which values there are instead of this one, and which of them may have been meant."""
    short = SHORT.get(value.lower())
    meant = f"; did you mean {short!r}?" if short in choices else nearest(value, choices)
    return f"expected one of {', '.join(choices)}, got {shown(value)}{meant}"


def problem_of_text(text: str) -> str:
    """Says what no name or setting may hold: nothing, control characters, bytes of a name that are not UTF-8; or "".

    Such names would steer the terminal, and UTF-8 files cannot hold the latter.
    """
    if not text:
        return "expected a name or value, got ''; leave the option out for its default"
    if _ODD.search(text):
        return f"expected UTF-8 text without control characters, got {shown(text, ascii)}; rename it"
    return ""
