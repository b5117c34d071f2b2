"""Changes JSON text: keys and values that are missing, twice there, renamed, of another type, out of range or huge.

The randomness is random.Random alone, with a seed for each case: a case is one number, and Hypothesis's shrinking would be
worth little where a case changes one place of one file.
"""

import json
import random
from typing import Any

NUMBERS = (
    "0",
    "-1",
    "4.7",
    "1e400",
    "-1e400",
    "1e-320",
    "-0.0",
    "NaN",
    "Infinity",
    "-Infinity",
    "9" * 5000,
    "1e18",
    str(2**63),
)
OTHERS = ("true", "false", "null", "[]", "{}", "[[]]", '{"": null}', "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000)  # fmt: skip
TEXTS = ('""', '"4"', '"x"', '"' + "x" * 100_000 + '"', r'"a\u0000b\u001b[31m\n"', r'"\ud83d"', '"../../x"', '"{{ 1 }}"', '"(a+)+$"')  # fmt: skip
RAW = (*NUMBERS, *OTHERS, *TEXTS)

Path = tuple[Any, ...]


class Raw:
    """JSON text that takes the place of a value; it may be what no Python value becomes."""

    def __init__(self, text: str) -> None:
        self.text = text


def dump(value: Any) -> str:
    """Writes JSON, with `Raw` text as it is; an object may be a list of pairs in `Pairs`."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {dump(v)}" for k, v in value) + "}"
    if isinstance(value, dict):
        return dump(Pairs(value.items()))
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


class Pairs(list):
    """An object's pairs, where a key may come twice."""


def paths(value: Any, at: Path = ()) -> list[Path]:
    """Lists where values are; of a long array, the first, the second and the last."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if not (isinstance(value, list) and 2 <= key < len(value) - 1):
            found += paths(inner, (*at, key))
    return found


def change(rng: random.Random, value: Any, wanted: Path | None = None) -> tuple[str, str, Path, str]:
    """Makes one change. Returns the JSON text, what was done in words, where, and the raw text of a replaced value."""
    where = wanted or rng.choice(paths(value) or [()])
    if not where:
        raw = rng.choice(RAW)
        return raw, f"the whole is {raw[:40]}", (), raw
    kind = rng.choices(("replace", "drop", "twice", "rename", "swap", "add"), (12, 3, 1, 2, 1, 1))[0]
    if wanted:
        kind = "replace"
    raw = rng.choice(RAW)
    text = dump(_edit(rng, value, where, kind, raw))
    name = "/".join(map(str, where))
    return (
        text,
        f"{name}: {kind} {raw[:40] if kind == 'replace' else ''}".strip(),
        where,
        raw if kind == "replace" else "",
    )


def _edit(rng: random.Random, value: Any, where: Path, kind: str, raw: str) -> Any:
    key, rest = where[0], where[1:]
    if isinstance(value, list):
        copy: Any = list(value)
        if rest:
            copy[key] = _edit(rng, copy[key], rest, kind, raw)
        elif kind == "drop":
            del copy[key]
        elif kind in ("twice", "add"):
            copy.insert(key, copy[key])
        else:
            copy[key] = Raw(raw)
        return copy
    pairs = Pairs(value.items())
    at = [name for name, _ in pairs].index(key)
    if rest:
        pairs[at] = (key, _edit(rng, pairs[at][1], rest, kind, raw))
    elif kind == "replace":
        pairs[at] = (key, Raw(raw))
    elif kind == "drop":
        del pairs[at]
    elif kind == "twice":
        pairs.append((key, Raw(raw)))
    elif kind == "rename":
        pairs[at] = (rng.choice((key + "x", key.upper(), "", "\ud83d", "é" * 300, key[:-1])), pairs[at][1])
    elif kind == "swap":
        pairs[at] = (key, rng.choice(pairs)[1])
    else:
        pairs.append((rng.choice(("unknown", "", "__class__", "self")), Raw(raw)))
    return pairs
