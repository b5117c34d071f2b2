"""Whether work that goes on has the inputs that it began with."""

import re
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError, PlopfastError


def differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for each input that changed, in alphabetical order; none if all are the same.

    Both map an input's name to a JSON value. A plain value is shown, a list, a dict or the hash of a file is only named:

    >>> differences({"lr": 0.1, "the weights": [3.0]}, {"lr": 0.2, "the weights": [4.0]})
    ['lr was 0.1, is 0.2', 'the weights']
    """
    changed = sorted(name for name in {*kept, *now} if kept.get(name) != now.get(name))
    return [_phrase(name, kept.get(name), now.get(name)) for name in changed]


def check_same(
    kept: Mapping[str, Any], now: Mapping[str, Any], where: object, error: type[PlopfastError] = ConfigError
) -> None:
    """Raises `error`, naming what changed, unless `now` is what was `kept` in `where` (a file or folder) at the start."""
    if changed := differences(kept, now):
        raise error(
            f"{where}: cannot go on, because it began with other inputs: {'; '.join(changed)}. Leave the "
            "options out, or give the same inputs as then; or start anew with --overwrite or another --out"
        )


def _phrase(name: str, old: Any, new: Any) -> str:
    return f"{name} was {old}, is {new}" if _is_plain(old) and _is_plain(new) else name


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return not re.fullmatch("[0-9a-f]{64}", value)  # SHA-256 says nothing to a reader
    return value is None or isinstance(value, bool | int | float)
