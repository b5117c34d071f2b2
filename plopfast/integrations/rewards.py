"""Rewards of completions: the right text, the right number, a pattern, JSON that fits a schema; or a function of yours.

A reward is called as TRL calls it, with lists of one entry a completion, and returns a list of numbers:

    reward(completions=..., prompts=..., answer=..., **other_columns) -> [1.0, 0.0, ...]

A completion is a text, or, where prompts are messages, a list of messages. Those here give 1.0 or 0.0 and can be handed to
TRL's own trainer: `GRPOTrainer(reward_funcs=rewards.Number(0.01), ...)`.
"""

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..support import files
from ..support.errors import ConfigError, first_line, nearest, shown
from ..support.grpo_settings import BUILT_IN, names_code
from ..support.strict_json import StrictJSON

Reward = Callable[..., Sequence[float | None]]
FORMS = "exact, number, number:TOLERANCE, regex:PATTERN, json:SCHEMA.json, FILE.py:FUNCTION or MODULE:FUNCTION"
_NUMBER = re.compile(  # a sign directly after a letter or digit joins words or ranges: the last number of 3-4 is 4
    r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n\s*```", re.DOTALL)


def text_of(completion: Any) -> str:
    """The text of a completion, which is a text or a list of messages: that of its last message."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"] or "")


def answer_of(row: Mapping[str, Any]) -> Any:
    """What a row says is right: its "answer", else its "completion" (the rows of supervised training)."""
    return row["answer"] if row.get("answer") is not None else row.get("completion")


class BuiltIn:
    """Base of the rewards here: `right(text, row)` judges one completion."""

    name = ""

    @property
    def needs_answer(self) -> bool:
        """Whether a row must have an answer."""
        return True

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        kept = {name: columns[name] for name in ("answer", "completion") if columns.get(name) is not None}
        rows = [{name: values[i] for name, values in kept.items()} for i in range(len(completions))]
        return [float(self.right(text_of(one), row)) for one, row in zip(completions, rows, strict=True)]

    def right(self, text: str, row: Mapping[str, Any]) -> bool:
        """Whether a completion of this row is right."""
        raise NotImplementedError

    def check(self, row: Mapping[str, Any]) -> None:
        """Raises ValueError where a row lacks what is compared, or holds what cannot be."""
        if self.needs_answer:
            value = answer_of(row)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError(
                    f'the reward {self.name} compares with the row\'s "answer" (or "completion"), a text or a number; got '
                    f"{'none' if value is None else shown(value)}, and the row has {sorted(row)}"
                )


@dataclass(frozen=True)
class Exact(BuiltIn):
    """1 where the completion is the answer, but for spaces around them.

    >>> Exact()(["animal", "an animal"], answer=["animal", "animal"])
    [1.0, 0.0]
    """

    name = "exact"

    def right(self, text: str, row: Mapping[str, Any]) -> bool:
        return text.strip() == str(answer_of(row)).strip()


@dataclass(frozen=True)
class Number(BuiltIn):
    """1 where the last number of the completion is the answer's last one, or at most `tolerance` away from it.

    Thousands may be parted by commas: 1,024 is one number.

    >>> Number(0.01)(["so it is 3.14", "12 or 13"], answer=["3.1416", "12"])
    [1.0, 0.0]
    """

    tolerance: float = 0.0
    name = "number"

    def right(self, text: str, row: Mapping[str, Any]) -> bool:
        found, wanted = last_number(text), last_number(str(answer_of(row)))
        return found is not None and wanted is not None and abs(found - wanted) <= self.tolerance

    def check(self, row: Mapping[str, Any]) -> None:
        super().check(row)
        if last_number(str(answer_of(row))) is None:
            raise ValueError(
                f"the reward number compares with the answer's last number, and {shown(answer_of(row))} has none"
            )


@dataclass(frozen=True)
class Matches(BuiltIn):
    """1 where the pattern is found in the completion. "{answer}" in it stands for the row's answer.

    >>> Matches(r"<b>{answer}</b>$")(["it is <b>4</b>", "4"], answer=["4", "4"])
    [1.0, 0.0]
    """

    pattern: str
    name = "regex"

    @property
    def needs_answer(self) -> bool:
        return "{answer}" in self.pattern

    def right(self, text: str, row: Mapping[str, Any]) -> bool:
        pattern = self.pattern
        if self.needs_answer:
            pattern = pattern.replace("{answer}", re.escape(str(answer_of(row)).strip()))
        return re.search(pattern, text) is not None


@dataclass(frozen=True)
class FitsSchema(BuiltIn):
    """1 where the completion is JSON (alone, or in one ```json block) that fits a JSON schema, checked by `jsonschema`.

    A schema that refers to others elsewhere (`$ref` to a URL or file) is not followed: nothing is fetched.
    """

    schema: Any
    validator: Any = field(init=False, compare=False, repr=False)
    name = "json"

    @property
    def needs_answer(self) -> bool:
        return False

    def __post_init__(self) -> None:
        try:
            import jsonschema
            import referencing
        except ImportError as error:
            raise ConfigError(
                f"the reward json needs jsonschema ({error}): pip install jsonschema, or pip install 'plopfast[rl]'"
            ) from None
        kind = jsonschema.validators.validator_for(self.schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(self.schema)
        except jsonschema.SchemaError as error:
            raise ConfigError(f"not a JSON schema: {error.message}") from None
        object.__setattr__(self, "validator", kind(self.schema, registry=referencing.Registry()))

    def right(self, text: str, row: Mapping[str, Any]) -> bool:
        text = text.strip()
        if fenced := _FENCED.fullmatch(text):
            text = fenced[1]
        try:
            value = StrictJSON().parse(text)
        except ValueError:
            return False
        try:
            return bool(self.validator.is_valid(value))
        except Exception as error:  # referencing's errors have no common public base that jsonschema keeps
            raise ConfigError(f"the JSON schema cannot be applied: {first_line(error)}") from error


def last_number(text: str) -> float | None:
    """The last number in a text; None where there is none, or where it is too large for a float.

    >>> last_number("1,024 of 3.5e3"), last_number("none")
    (3500.0, None)
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    value = float(found[-1].replace(",", ""))
    return value if math.isfinite(value) else None


def built_in(reward: str) -> BuiltIn:
    """The reward that a text names: exact, number, number:TOLERANCE, regex:PATTERN or json:SCHEMA.json.

    Raises ConfigError for an unknown name, a missing or impossible part, and without `jsonschema` where it is needed.
    """
    name, colon, rest = reward.partition(":")
    if name not in BUILT_IN:
        raise ConfigError(f"reward: expected {FORMS}, got {reward!r}{nearest(name, BUILT_IN)}")
    if name == "exact":
        if colon:
            raise ConfigError(f"reward: exact takes nothing after it, got {reward!r}")
        return Exact()
    if name == "number":
        return Number(_tolerance(rest, reward) if colon else 0.0)
    if not rest:
        raise ConfigError(
            f"reward: expected {'regex:PATTERN' if name == 'regex' else 'json:SCHEMA.json'}, got {reward!r}"
        )
    if name == "json":
        path = Path(rest)
        try:
            return FitsSchema(files.read_json(path, "you: a JSON schema"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}" if "JSON schema" in str(error) else str(error)) from None
    try:
        re.compile(rest.replace("{answer}", "answer"))
    except re.error as error:
        raise ConfigError(f"reward: {rest!r} is not a regular expression of Python's re: {error}") from None
    return Matches(rest)


def _tolerance(text: str, reward: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"reward: expected number:TOLERANCE with a number of at least 0, got {reward!r}")
    return value


def load_function(reward: str) -> Reward:
    """Imports the function that FILE.py:FUNCTION or MODULE:FUNCTION names. This runs code: only for names that were given
    on the command line.

    Raises ConfigError for a file, module or function that is not there, and for a name that is none.
    """
    assert names_code(reward)
    where, colon, name = reward.rpartition(":")
    if not colon or not name.isidentifier():
        raise ConfigError(f"reward: expected {FORMS}, got {reward!r}{nearest(reward.partition(':')[0], BUILT_IN)}")
    if where.endswith(".py"):
        module = _module_of(Path(where))
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"reward: no module {error.name!r} for {reward!r}; a file is named FILE.py:FUNCTION"
            ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"reward: {where} has no function {name!r}{nearest(name, [n for n in vars(module) if n[0] != '_'])}"
        )
    return function


def _module_of(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"reward: {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"plopfast_reward_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as dataclasses and typing look their module up there
    spec.loader.exec_module(module)
    return module


def absolute(reward: str | None) -> str | None:
    """A reward whose file has the same name from every folder.

    >>> absolute("number:0.01")
    'number:0.01'
    """
    if reward is None:
        return None
    name, _, rest = reward.partition(":")
    if name == "json" and rest:
        return f"json:{files.real(rest)}"
    where, _, function = reward.rpartition(":")
    return f"{files.real(where)}:{function}" if names_code(reward) and where.endswith(".py") else reward
