"""Rows of reinforcement learning: a prompt, and whatever its reward wants to know. Nothing in them is learned by heart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support.errors import DataError, shown
from ..support.strict_json import StrictJSON
from .prompts import Prompts
from .readers import read_source

EXPECTED = (
    '{"prompt": "text"} or {"prompt": [{"role": "user", "content": "text"}]}, with further columns for the reward'
)


@dataclass(frozen=True)
class Prompt:
    """A row: where it stands, its prompt (a text, or messages), its other columns, and the prompt's tokens."""

    where: str
    prompt: Any
    columns: dict[str, Any]
    tokens: tuple[int, ...]

    @property
    def text(self) -> str:
        """The prompt for people: its text, or its messages with their roles."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)


def read_prompts(
    sources: str | Path | Sequence[str | Path], bad_rows: str = "error", split: str = "train"
) -> list[Any]:
    """Reads files, folders and hub ids (as `read_rows` does) into (where, row) pairs; `prompts_of` checks the rows.

    Raises DataError with the file and line for a file without rows, and for a row that is no object unless `bad_rows` is
    "skip".
    """
    found: list[Any] = []

    def bad(where: str, why: object) -> None:
        if bad_rows != "skip":
            raise DataError(f"{where}: {why}")

    for source in [sources] if isinstance(sources, str | Path) else sources:
        rows = list(read_source(str(source), split, StrictJSON(), bad))
        if not rows:
            raise DataError(f"{source}: no rows; expected rows like {EXPECTED}")
        found += rows
    return found


def prompts_of(
    rows: Sequence[Any], tokenizer: Any, longest: int | None = None, check: Callable[[Mapping[str, Any]], None] | None = None,
    skipped: list[str] | None = None,
) -> list[Prompt]:  # fmt: skip
    """Tokenises prompts: a text as it is, messages through the tokenizer's chat template, up to the assistant's turn.

    `rows`: dicts, (where, dict) pairs, or what this function gave for them. `longest`: most tokens of a prompt. `check` raises ValueError for a row that its
    reward cannot judge. `skipped` gets what is wrong with each bad row; without it, the first one raises DataError with its
    place. All prompts are texts, or all are messages: a trainer takes no mixture.
    """
    found: list[Prompt] = []
    prompts = Prompts(tokenizer)
    with prompts.watch:
        for number, given in enumerate(rows, 1):
            if isinstance(given, Prompt):
                where, row = given.where, {"prompt": given.prompt, **given.columns}
            else:
                where, row = given if isinstance(given, tuple) else (f"row {number}", given)
            try:
                prompt = given if isinstance(given, Prompt) else _prompt(where, row, prompts, longest)
                if found and type(prompt.prompt) is not type(found[0].prompt):
                    raise ValueError(
                        f"its prompt is {_kind(prompt)}, and that of {found[0].where} is {_kind(found[0])}; use one kind"
                    )
                if check:
                    check(row)
            except ValueError as error:
                if skipped is None:
                    raise DataError(f"{where}: {error}") from None
                skipped.append(f"{where}: {error}")
            else:
                found.append(prompt)
    return found


def _kind(prompt: Prompt) -> str:
    return "a text" if isinstance(prompt.prompt, str) else "a list of messages"


def _prompt(where: str, row: Any, prompts: Prompts, longest: int | None) -> Prompt:
    if not isinstance(row, dict):
        raise ValueError(f"expected a row like {EXPECTED}, got {shown(row)}")
    value: Any = row.get("prompt")
    if not (_is_chat(value) or (isinstance(value, str) and value.strip())):
        got = "no prompt" if value is None else f"the prompt {shown(value)}"
        raise ValueError(f"expected a row like {EXPECTED}, got {got} among the keys {sorted(row)}")
    tokens = prompts.tokens(value)
    if not tokens:
        raise ValueError(f"the prompt {shown(value)} has no tokens")
    if longest is not None and len(tokens) > longest:
        raise ValueError(
            f"the prompt has {len(tokens):,} tokens, and the model's context leaves {max(0, longest):,} beside the completion: "
            "shorten it, or lower --completion-length"
        )
    columns = {name: item for name, item in row.items() if name != "prompt"}
    return Prompt(where, value, columns, tuple(tokens))


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and {*m} == {"role", "content"} and all(isinstance(v, str) for v in m.values())
            for m in value
        )
    )
