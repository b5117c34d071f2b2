"""Rows of messages, ShareGPT and Alpaca, as the messages that a chat template takes."""

from dataclasses import dataclass
from typing import Any

from ..support.errors import DataError
from ..support.strict_json import StrictJSON
from .notices import Notices

ASSISTANT = "assistant"
SPEAKERS = {  # ShareGPT's `from`
    "system": "system", "human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT,
    "bot": ASSISTANT, "assistant": ASSISTANT, "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": ASSISTANT,
}  # fmt: skip
VARIABLES = ("tools", "documents")  # columns that a chat template takes as they are
KWARGS = "chat_template_kwargs"
OURS = {  # arguments of apply_chat_template, which a row must not set
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:\n"
)  # the prompt of Stanford Alpaca, for models without a chat template


@dataclass(slots=True)
class Conversation:
    """The messages of a row and the template's variables.

    `may_learn` says of each message whether it is learned as an answer, `muted` whether its weight is 0.
    """

    messages: list[dict[str, Any]]
    may_learn: list[bool]
    muted: list[bool]
    variables: dict[str, Any]


def conversation_of(where: str, row: dict[str, Any], kind: str, notices: Notices) -> Conversation:
    """Return the conversation of a row of the kinds "chat", "messages", "sharegpt" and "alpaca".

    Only the assistant's messages can be learned, of a "chat" row only those of its completion; a message of weight 0 is
    left out (OpenAI's convention). Text parts of a content are joined. A tool call's arguments become values where they
    are JSON text, because templates write them as JSON themselves. Raises DataError for messages that are none of this.
    """
    if kind == "chat":
        given, asked = [*row["prompt"], *row["completion"]], len(row["prompt"])
    elif kind == "messages":
        given, asked = row["messages"], 0
    elif kind == "sharegpt":
        given, asked = _from_sharegpt(where, row), 0
    else:
        given, asked = _from_alpaca(where, row), 0
        asked = len(given) - 1
        notices.add(
            "Alpaca's instruction and input are a user's message in the model's chat template", where, once=True
        )
    messages, may_learn, muted = [], [], []
    for number, message in enumerate(given):
        place = f"{where}: message {number + 1} ({message['role']})"
        messages.append(_message(place, message))
        learned = message["role"] == ASSISTANT and number >= asked
        muted.append(_weight(place, message) == 0)
        may_learn.append(learned and not muted[-1])
    return Conversation(messages, may_learn, muted, _variables(where, row))


def alpaca_prompt(where: str, row: dict[str, Any]) -> str:
    """Return the prompt of an Alpaca row for a model without a chat template (Taori et al., Stanford Alpaca, 2023)."""
    if row.get("history") or row.get("system"):
        raise DataError(f"{where}: Alpaca's system and history need a tokenizer with a chat template")
    given = row.get("input") or ""
    return ALPACA.format(
        instruction=row["instruction"],
        input=f"\n\n### Input:\n{given}" if given else "",
        with_input=", paired with an input that provides further context" if given else "",
    )


def _from_alpaca(where: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    for key in ("input", "system"):
        if not isinstance(row.get(key) or "", str):
            raise DataError(f"{where}: {key}: expected text, got {type(row[key]).__name__}")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise DataError(f'{where}: history: expected pairs like ["question", "answer"], got {turn!r:.60}')
        messages += [{"role": "user", "content": turn[0]}, {"role": ASSISTANT, "content": turn[1]}]
    asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    return [*messages, {"role": "user", "content": asked}, {"role": ASSISTANT, "content": row["output"]}]


def _from_sharegpt(where: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for number, turn in enumerate(row["conversations"], 1):
        if "role" in turn:  # some files have these names under `conversations`
            messages.append(turn)
            continue
        speaker, value = turn["from"], turn["value"]
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise DataError(
                f"{where}: turn {number}: from {speaker!r} is unknown; expected one of {', '.join(SPEAKERS)}"
            )
        rest = {key: kept for key, kept in turn.items() if key not in ("from", "value")}
        message: dict[str, Any] = {"role": SPEAKERS[speaker], **rest}
        if speaker == "function_call":
            calls = _json(f"{where}: turn {number} (function_call)", value)
            message["tool_calls"] = [
                {"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])
            ]
        else:
            message["content"] = value
        messages.append(message)
    return messages


def _message(place: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message as a template takes it: without what is null and without `weight`, its content a text."""
    kept = {key: value for key, value in message.items() if value is not None and key != "weight"}
    if "content" in kept:
        kept["content"] = _text(place, kept["content"])
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = _tool_calls(place, calls)
    elif "content" not in kept and not any(kept.get(key) for key in ("reasoning_content", "thinking", "reasoning")):
        raise DataError(f"{place}: has no content and no tool_calls")
    return kept


def _text(place: str, content: Any) -> str:
    """The text of a content, which can be a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{place}: content: expected text or a list of text parts, got {type(content).__name__}")
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(
                f"{place}: a content part of type {kind!r}: only text parts can be learned; leave the row out"
            )
    return "".join(texts)


def _tool_calls(place: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise DataError(f"{place}: tool_calls: expected a list, got {type(calls).__name__}")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not (isinstance(function, dict) and _is_function(function)):
            raise DataError(
                f'{place}: tool_calls: expected {{"function": {{"name": ..., "arguments": ...}}}}, got {call!r:.60}'
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(f"{place}: the arguments of {function['name']}", arguments or "{}")
        function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def _is_function(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def names_of_calls(message: dict[str, Any]) -> list[str]:
    """Return the names of the functions that a message calls."""
    return [call.get("function", call)["name"] for call in message.get("tool_calls") or []]


def _json(place: str, text: Any) -> Any:
    try:
        return StrictJSON().parse(text.strip())
    except (AttributeError, ValueError) as error:
        raise DataError(f"{place}: expected JSON, got {text!r:.60} ({error})") from None


def _weight(place: str, message: dict[str, Any]) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise DataError(f"{place}: weight: expected 0 (not learned) or 1, got {weight!r}")
    return weight


def _variables(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """What a template is given beside the messages."""
    found: dict[str, Any] = {}
    for name in VARIABLES:
        if value := row.get(name):
            value = _json(f"{where}: {name}", value) if isinstance(value, str) else value
            if not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
                raise DataError(f"{where}: {name}: expected a list of objects, got {value!r:.60}")
            if name == "tools" and not all(_is_function(tool.get("function", tool)) for tool in value):
                raise DataError(f"{where}: tools: expected functions with a name, got {value!r:.60}")
            found[name] = value
    if more := row.get(KWARGS):
        more = _json(f"{where}: {KWARGS}", more) if isinstance(more, str) else more
        if not isinstance(more, dict):
            raise DataError(f"{where}: {KWARGS}: expected an object of the template's variables, got {more!r:.60}")
        if taken := sorted(OURS.intersection(more)):
            raise DataError(f"{where}: {KWARGS}: cannot set {', '.join(taken)}; leave it out")
        found[KWARGS] = more
    return found
