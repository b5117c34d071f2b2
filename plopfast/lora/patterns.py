"""PEFT's rank_pattern and alpha_pattern: regular expressions from a file, matched as PEFT does, in bounded time.

Python's matcher tries every way in which a pattern can match, so `(a+)+$` takes years. Here the number of ways is
bounded before anything is matched. Names, which nearly all patterns are, take no matcher at all.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..support.errors import AdapterError

LONGEST = 1000  # characters of one pattern
DEEPEST = 20  # groups within groups
MOST_STEPS = 10**9  # of the matcher, at most, for all patterns and names; measured: 0.3 s or less
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)
_NAME = re.compile(r"(?:[\w-]|\\[^\w\s])+")  # `re.escape` of a module's name
_REMEDY = "write the modules' names instead"


def matches(patterns: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, list[Any]]:
    """Returns name -> the values of the patterns that match it, in their order. PEFT takes the first.

    As in PEFT, a pattern has to match the whole name or the part after one of its dots. Raises AdapterError, with `where`
    and the pattern, for one that is no regular expression, and for one that could take too long.
    """
    by_name = {pattern: number for number, pattern in enumerate(patterns) if _NAME.fullmatch(pattern)}
    others = {pattern: number for number, pattern in enumerate(patterns) if pattern not in by_name}
    longest, steps = max(map(len, names), default=0), 0
    for pattern in others:
        steps += _ways(pattern, longest, where) * (len(pattern) + longest) * len(names)
        if steps > MOST_STEPS:
            raise AdapterError(f"{where}: {pattern!r:.80} could take too long to match; {_REMEDY}")
    compiled: list[tuple[int, re.Pattern[str]]] = []
    for pattern, number in others.items():
        try:
            compiled.append((number, re.compile(rf"(.*\.)?({pattern})$")))
        except (re.error, OverflowError) as error:
            raise AdapterError(f"{where}: {pattern!r:.80} is not a regular expression ({error}); {_REMEDY}") from None
    order: dict[str, int] = {}
    for pattern, number in by_name.items():
        order.setdefault(re.sub(r"\\(.)", r"\1", pattern), number)
    values, found = list(patterns.values()), {}
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        numbers = {order[end] for end in ends if end in order}
        numbers |= {number for number, pattern in compiled if pattern.match(name)}
        exact = [patterns[name]] if name in patterns else []  # what PEFT takes where nothing matches
        found[name] = [values[number] for number in sorted(numbers)] or exact
    return found


def _ways(pattern: str, longest: int, where: str) -> int:
    """At most how many ways there are to match a name of `longest` characters, PEFT's own prefix left out."""
    ways, alternatives, before = 1, [1], ""
    tokens = _TOKEN.findall(pattern[: LONGEST + 1])  # no more, as unclosed brackets take quadratic time
    for i, token in enumerate(tokens):
        if token == "(":
            alternatives.append(1)
        elif token == ")" and len(alternatives) > 1:
            ways *= alternatives.pop()
        elif token == "|":
            alternatives[-1] += 1
        elif token == "?" and before not in {*"*+?{("}:  # after those it only says lazy, or a kind of group
            ways *= 2
        elif token[0] in "*+{":
            ways *= longest + 1
        group = token == "(" and tokens[i + 1 : i + 3] not in (["?", ":"],) and tokens[i + 1 : i + 2] == ["?"]
        repeated = before == ")" and token[0] in "*+{"
        reference = token[0] == "\\" and token[1:].isdigit()
        if group or repeated or reference or len(alternatives) > DEEPEST or len(pattern) > LONGEST:
            raise AdapterError(f"{where}: {pattern!r:.80} is too complex to match safely; {_REMEDY}")
        before = token[0] if token[0] != "\\" else ""
    return ways * math.prod(alternatives)
