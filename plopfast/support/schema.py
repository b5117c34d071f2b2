"""Checks what a JSON file holds against a type: a dataclass or a TypedDict, whose fields say what they may be.

>>> checked(Decision, files.read_json(path, "plopfast score"), path, "score anew")
FileError: scores.json: decision.k: expected a number greater than or equal to 1, got 0; score anew
"""

import json
import re
from functools import cache
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le

from .errors import FileError, shown

T = TypeVar("T")
Count = Annotated[int, Ge(0), Le(2**63 - 1)]
Size = Annotated[int, Ge(1), Le(2**31 - 1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]


def checked(kind: type[T], value: Any, where: object, remedy: str, *, more: bool = False) -> T:
    """Returns `value`, as `StrictJSON` parsed it, as a `kind`. Nothing is converted, but lists to tuples and ints to floats.

    Keys that `kind` does not have are refused unless `more`. Raises FileError, which names the first field that does not
    fit, what it holds and what was expected, begins with `where` and ends with `remedy`.
    """
    from pydantic import ValidationError  # slow to load, and not needed for --help

    try:
        # from text, as only this mode takes lists for tuples and objects for dataclasses while it is strict
        return _adapter(kind).validate_json(json.dumps(value), strict=True, extra="ignore" if more else "forbid")  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
    said = re.sub("^Input should be (?=greater|less)", "expected a number ", first["msg"])
    said = said.replace("Input should be ", "expected ")
    unknown = dict.fromkeys(("extra_forbidden", "unexpected_keyword_argument"), "unknown field")
    said = {"missing": "is missing", **unknown}.get(first["type"], said[:1].lower() + said[1:])
    raise FileError(f"{where}: {_place(first['loc'])}{said}{got}; {remedy}")


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _place(steps: tuple[int | str, ...]) -> str:
    """The place of a value, such as modules["model.layers.0.mlp.up_proj"][0]."""
    parts = (
        f"[{json.dumps(step)}]" if isinstance(step, int) or not step.isidentifier() else f".{step}" for step in steps
    )
    place = shown("".join(parts).removeprefix("."), str, 200)
    return f"{place}: " if place else ""
