"""Options: what one setting may be, and the base class that checks a group of them."""

import dataclasses
import math
from typing import Any, ClassVar

from .errors import ConfigError


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    *,
    positive: bool = False,
    below: float = math.inf,
    free: bool = False,
    file: bool = False,
) -> Any:
    """A field of a group of settings.

    A number must be at least 0 (above 0 with `positive`) and less than `below`. A `free` option may change when a run is
    resumed: what is learned does not depend on it (single bits may). A `file` option is the path of a file, or a list of
    them, and not empty.
    """
    rules = {"help": help, "choices": choices, "positive": positive, "below": below, "free": free, "file": file}
    return dataclasses.field(default=default, metadata=rules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the groups. Raises ConfigError for a value that its option does not allow."""

    title: ClassVar[str] = ""  # heading of the group's own options in a command's help; inherited from the first base

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            name, value, rules = item.name, getattr(self, item.name), item.metadata
            if rules["choices"] and value is not None and value not in rules["choices"]:
                raise ConfigError(f"{name}: expected one of {', '.join(rules['choices'])}, got {value!r}")
            if rules["file"] and value is not None and not (value and all(value)):
                raise ConfigError(f"{name}: expected the name of a file, got {value!r}")
            if isinstance(value, int | float):
                low = "above" if rules["positive"] else "of at least"
                enough = value > 0 if rules["positive"] else value >= 0
                if not (enough and value < rules["below"]):  # so NaN is refused too
                    raise ConfigError(f"{name}: expected a number {low} 0 and below {rules['below']}, got {value}")
