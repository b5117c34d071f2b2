"""The kinds of rows: how each is recognised, the columns that it uses, and `--columns`, which renames others to these.

To add a kind, recognise it in `format_of` and add it to `USES`, `NAMES` and `FORMATS`.
"""

from typing import Any

from ..support.errors import ConfigError, nearest, shown
from ..support.strict_json import StrictJSON

_CHAT = ("tools", "documents", "chat_template_kwargs")
USES = {  # kind -> the columns that it uses, the optional ones too
    "pair": frozenset({"prompt", "completion"}),
    "chat": frozenset({"prompt", "completion", *_CHAT}),
    "messages": frozenset({"messages", *_CHAT}),
    "sharegpt": frozenset({"conversations", "system", "tools"}),
    "alpaca": frozenset({"instruction", "input", "output", "system", "history"}),
    "text": frozenset({"text"}),
}
OPTIONAL = frozenset({*_CHAT, "input", "system", "history"})  # a row can do without them
COLUMNS = tuple(sorted(frozenset().union(*USES.values())))
NAMES = {
    "pair": "prompt and completion as text",
    "chat": "prompt and completion as messages",
    "messages": "messages",
    "sharegpt": "conversations (ShareGPT)",
    "alpaca": "instruction and output (Alpaca)",
    "text": "plain text",
}
FORMATS = (
    '{"prompt": ..., "completion": ...} (both text or both messages), {"messages": [{"role": ..., "content": ...}]}, '
    '{"conversations": [{"from": ..., "value": ...}]}, {"instruction": ..., "input": ..., "output": ...} or {"text": ...}'
)
_AS_JSON = frozenset({*_CHAT, "history"})  # CSV and Arrow files often hold these as JSON text


def format_of(row: dict[str, Any]) -> str | None:
    """Return the row's kind, a key of `USES`. The first kind that fits wins, in that order. None means that no kind fits.

    "pair" and "chat" are a prompt and a completion, as strings or as messages; a message is a dict with a "role".
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None and completion is not None:
        if isinstance(prompt, str) and isinstance(completion, str):
            return "pair"
        if is_messages(prompt) and is_messages(completion):
            return "chat"
    if is_messages(row.get("messages")):
        return "messages"
    if _is_turns(row.get("conversations")):
        return "sharegpt"
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return "alpaca"
    return "text" if isinstance(row.get("text"), str) else None


def is_messages(value: Any) -> bool:
    """Return whether a value is messages: a list of dicts that each have a "role", at least one."""
    if not isinstance(value, list) or not value:
        return False
    for message in value:
        if isinstance(message, dict) and isinstance(message.get("role"), str):
            continue  # a loop, as a generator would take twice as long
        return False
    return True


def _is_turns(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(t, dict)
        and (isinstance(t.get("role"), str) or (isinstance(t.get("from"), str) and isinstance(t.get("value"), str)))
        for t in value  # some files have the names of messages under `conversations`
    )


def recognise(row: dict[str, Any], json: StrictJSON) -> str:
    """Return the row's kind. Columns that hold JSON as text, such as "tools", are turned into values in the row itself.

    Raises ValueError, whose message names no file, for a row of no kind and for a column whose JSON cannot be read.
    """
    kind = format_of(row)
    if kind == "pair" or (kind == "messages" and len(row) == 1):
        return kind
    if kind not in ("pair", "chat", "messages"):
        for name in ("messages", "conversations"):
            _parse(row, name, json)
        kind = format_of(row)
    if kind is None:
        raise ValueError(_why_no_kind(row))
    for name in _AS_JSON & USES[kind]:
        _parse(row, name, json)
    return kind


def _parse(row: dict[str, Any], name: str, json: StrictJSON) -> None:
    """Parse a column if it is a string; drop it if it is empty."""
    if not isinstance(row.get(name), str):
        return
    text = row.pop(name).strip()
    try:
        if text:
            row[name] = json.parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: expected a list or an object, or its JSON as text: {error}") from None


def _why_no_kind(row: dict[str, Any]) -> str:
    odd = [f"{name} is {_type(value)}" for name, value in row.items() if name in COLUMNS and not isinstance(value, str)]
    told = f" ({', '.join(odd)})" if odd else ""
    return (
        f"expected a row like {FORMATS}, got the keys {sorted(row)}{told}; where columns have other names, "
        "pass --columns such as prompt=question,completion=answer"
    )


def _type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | dict) and not value:
        return "empty"
    names = {list: "a list that is none of messages", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


class Renaming:
    """`--columns`: which source column is read as which of `COLUMNS`.

    >>> Renaming("prompt=question,completion=answer").apply({"question": "1+1?", "answer": "2", "id": 7})
    {'prompt': '1+1?', 'completion': '2', 'id': 7}

    Raises ConfigError for anything but TARGET=SOURCE pairs, for an unknown target, and for a doubled target or source.
    """

    def __init__(self, columns: str | None) -> None:
        self.sources: dict[str, str] = {}  # target -> source
        self._unseen: set[str] = set()  # sources that no row had so far
        if not isinstance(columns, str | None):
            raise ConfigError(f"columns: expected text such as prompt=question,completion=answer, got {shown(columns)}")
        for part in () if columns is None else columns.split(","):
            target, equals, source = (piece.strip() for piece in part.partition("="))
            if not (target and equals and source):
                raise ConfigError(
                    f"columns: expected pairs such as prompt=question,completion=answer, got {part!r} in {columns!r}"
                )
            if target not in COLUMNS:
                raise ConfigError(
                    f"columns: expected one of {', '.join(COLUMNS)} before the '=', got {target!r}{nearest(target, COLUMNS)}"
                )
            if target in self.sources or source in self.sources.values():
                raise ConfigError(
                    f"columns: {target if target in self.sources else source!r} comes twice in {columns!r}"
                )
            self.sources[target] = source
            self._unseen.add(source)

    def apply(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with its columns renamed. Raises ValueError for a row that lacks one that it needs."""
        if not self.sources:
            return row
        self._unseen -= row.keys()
        if missing := [s for target, s in self.sources.items() if s not in row and target not in OPTIONAL]:
            raise ValueError(f"no column {missing[0]!r}, which --columns names; the row has {sorted(row)}")
        taken = {*self.sources, *self.sources.values()}
        renamed = {target: row[source] for target, source in self.sources.items() if source in row}
        return renamed | {name: value for name, value in row.items() if name not in taken}

    def check_seen(self) -> None:
        """Raise ConfigError for a source column that no row had."""
        if self._unseen:
            raise ConfigError(f"columns: no row has a column {min(self._unseen)!r}; leave it out, or correct its name")

    def check(self, kind: str) -> None:
        """Raise ValueError where rows of this kind do not use a column that was asked for."""
        for target in self.sources:
            if target not in USES[kind]:
                others = ", ".join(sorted(USES[kind]))
                raise ValueError(
                    f"--columns names {target}, but the row is read as {NAMES[kind]}, which uses only {others}: leave "
                    f"{target} out, or rename the others"
                )
