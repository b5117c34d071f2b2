"""Parses JSON, and refuses what Python's parser lets through: doubled keys, NaN, lone surrogates, very deep nesting."""

import json
import math
import re
from sys import intern
from typing import Any

DEEPEST = 100  # lists and objects within each other; deeper values break programs that walk them
DEEP = f"lists and objects more than {DEEPEST} deep within each other"
LONGEST_INTEGER = 1000  # digits, in rows; Python itself refuses 4,300
SHORT = 16  # characters of a text that is kept once: roles and labels come in every row
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictJSON:
    """A parser of JSON texts, whose integers have at most `digits` digits.

    It keeps one copy of each key and of each short text, so that many rows take little memory.

    >>> StrictJSON().parse('{"a": 1, "a": 2}')
    ValueError: the key 'a' comes twice in one object
    """

    def __init__(self, digits: int = LONGEST_INTEGER) -> None:
        self._problem, self._digits = "", digits
        self._decode = json.JSONDecoder(
            object_pairs_hook=self._object, parse_int=self._int, parse_float=self._float, parse_constant=self._constant
        ).raw_decode

    def parse(self, text: str) -> Any:
        """Returns the value of a whole text, which is stripped. Raises ValueError, whose message names no file."""
        value, end, problem = self.parse_at(text, 0)
        if problem or end != len(text):
            raise ValueError(problem or f"not valid JSON (Extra data, column {end + 1})")
        return value

    def parse_at(self, text: str, begin: int) -> tuple[Any, int, str]:
        """Returns the value that begins at a place, the place after it, and what is wrong with it ("" if nothing).

        Raises ValueError where its end cannot be found.
        """
        self._problem = ""
        try:
            value, end = self._decode(text, begin)
        except json.JSONDecodeError as error:
            at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
            raise ValueError(f"not valid JSON ({error.msg}, {at})") from None
        except RecursionError:
            raise ValueError(DEEP) from None
        if not self._problem and text.find("\\u", begin, end) >= 0 and _SURROGATE.search(text, begin, end):
            self._problem = _surrogate(value)
        if end - begin > 2 * DEEPEST and text.count("[", begin, end) + text.count("{", begin, end) > DEEPEST:
            self._problem = DEEP if _is_deep(value) else self._problem
        return value, end, self._problem

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = {intern(key): intern(item) if type(item) is str and len(item) <= SHORT else item for key, item in pairs}
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            self._problem = f"the key {max(keys, key=keys.count)!r} comes twice in one object"
        return value

    def _int(self, digits: str) -> int:
        if len(digits) > self._digits:
            self._problem = f"an integer of {len(digits):,} digits; write it as a string"
            return 0
        return int(digits)

    def _float(self, digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            self._problem = f"the number {digits[:20]} is too large"
        return value

    def _constant(self, name: str) -> None:
        self._problem = f"{name} is not JSON; write null or leave the key out"


def dumps(value: Any, indent: int | None = None) -> str:
    """Returns a JSON text that `StrictJSON` reads: numbers that are not finite are null, halves of characters are "?"."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=indent, ensure_ascii=False)
    return text.encode(errors="replace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _surrogate(value: Any) -> str:
    """Names a lone surrogate in the value, if it holds one."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"the lone surrogate \\u{ord(error.object[error.start]):04x}: half a character, which UTF-8 cannot hold"
    except RecursionError:
        return DEEP
    return ""


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        items = [item.values() if isinstance(item, dict) else item for item in level]
        level = [child for children in items for child in children if isinstance(child, dict | list)]
    return bool(level)
