"""Parses YAML by the core rules of YAML 1.2, and refuses what `strict_json` refuses, and what makes objects or grows.

PyYAML only cuts the text into events; its own rules for plain words, those of YAML 1.1, are not used. By those, `no` is
False, 5e-4 a text, 12:30 a number and 010 eight.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml import events

from .strict_json import DEEP, DEEPEST, LONGEST_INTEGER

LARGEST = 1 << 20  # characters; PyYAML reads some 100,000 in a second
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_ODD_BREAK = re.compile("[\x85\u2028\u2029\ufeff]")  # line breaks in YAML 1.1, characters of the text in 1.2


def parse_yaml(text: str, digits: int = LONGEST_INTEGER) -> Any:
    """Returns the value of a YAML text of one document, whose integers have at most `digits` digits.

    Raises ValueError, whose message begins with the line and names no file.

    >>> parse_yaml("lr: 5e-4\\nstream: no")
    {'lr': 0.0005, 'stream': 'no'}
    """
    if len(text) > LARGEST:
        raise ValueError(f"line 1: {len(text):,} characters, and YAML may have {LARGEST:,}; write it as JSON")
    if odd := _ODD_BREAK.search(text):
        raise _error(
            text.count("\n", 0, odd.start()),
            f'the character U+{ord(odd[0]):04X}; write "\\u{ord(odd[0]):04x}" in a text',
        )
    try:
        return _Builder(text, digits).document()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise _error(line, f"the character {chr(error.character)!a}, which YAML does not allow") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = ", ".join(part for part in (error.context, error.problem) if part)
        raise _error(mark.line, f"not valid YAML ({why}, column {mark.column + 1})") from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, _YamlError):
            raise
        raise _error(
            0, f"not valid YAML ({error})"
        ) from None  # such as the escape \UFFFFFFFF, for which PyYAML has no check


class _YamlError(ValueError):
    """An error whose message begins with its line."""


def _error(line: int, why: str) -> _YamlError:
    return _YamlError(f"line {line + 1}: {why}")


class _Builder:
    """Makes a value of PyYAML's events."""

    def __init__(self, text: str, digits: int) -> None:
        self._events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self._digits = digits

    def document(self) -> Any:
        next(self._events)  # the stream begins
        start = next(self._events)
        if isinstance(start, events.StreamEndEvent):
            raise _error(0, "nothing in it but blanks and comments")
        if start.version == (1, 1):
            raise _error(
                start.start_mark.line, "%YAML 1.1 asks for other rules; plopfast reads YAML 1.2: leave the line out"
            )
        value = self._value(next(self._events), 0)
        next(self._events)  # the document ends
        if isinstance(more := next(self._events), events.DocumentStartEvent):
            raise _error(more.start_mark.line, "a second document begins; write one, without --- after it")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        line = event.start_mark.line
        if isinstance(event, events.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, events.AliasEvent) else "&"
            raise _error(
                line,
                f"{sign}{event.anchor[:40]}: anchors and aliases are not read; write the value out, or put quotes around it",
            )
        if event.tag is not None:
            raise _error(
                line, f"the tag {event.tag[:40]}: tags are not read; leave it out, or put quotes around the text"
            )
        if isinstance(event, events.ScalarEvent):
            return self._scalar(event)
        if depth == DEEPEST:
            raise _error(line, DEEP)
        return self._list(depth) if isinstance(event, events.SequenceStartEvent) else self._mapping(depth)

    def _list(self, depth: int) -> list[Any]:
        found = []
        while not isinstance(event := next(self._events), events.SequenceEndEvent):
            found.append(self._value(event, depth + 1))
        return found

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self._events), events.MappingEndEvent):
            line = event.start_mark.line
            key = self._value(event, depth + 1)
            if not isinstance(key, str):
                raise _error(line, f"the key {str(key)[:40]} is no text; put quotes around it")
            if key == "<<" and not event.style:
                raise _error(line, "the key <<: merge keys are not read; write the values out")
            if key in found:
                raise _error(line, f"the key {key[:40]!r} comes twice in one mapping")
            found[key] = self._value(next(self._events), depth + 1)
        return found

    def _scalar(self, event: Any) -> Any:
        text, line = event.value, event.start_mark.line
        if event.style:  # quoted, or a block
            return _whole(text, line)
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INTEGER.fullmatch(text):
            if len(text) > self._digits:
                raise _error(line, f"an integer of {len(text):,} digits; write it as a string")
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if _FLOAT.fullmatch(text):
            if not math.isfinite(value := float(text)):
                raise _error(line, f"the number {text[:20]} is too large")
            return value
        if _NOT_FINITE.fullmatch(text):
            raise _error(line, f"{text} is no number that plopfast reads; write null or leave the key out")
        return text


def _whole(text: str, line: int) -> str:
    r"""The text with pairs of surrogates, which escapes such as "\ud83d\ude00" make, as the characters that they are."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        odd = next(char for char in text if "\ud800" <= char <= "\udfff")
        raise _error(line, f"the lone surrogate \\u{ord(odd):04x}: half a character, which UTF-8 cannot hold") from None
