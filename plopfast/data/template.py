"""Renders conversations with the tokenizer's chat template, and refuses what it would lose."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..support.errors import DataError, ModelError
from .conversation import ASSISTANT, KWARGS, VARIABLES, Conversation, names_of_calls
from .deadline import Watch, check_template
from .notices import Notices
from .turns import MARKER, THOUGHTS, Turn, Turns, replaced

REFUSED = "the model's chat template refuses this row"
SHOWN = {"role", "content", "tool_calls", *THOUGHTS}  # keys of messages that are looked after, not only named


@dataclass(slots=True)
class Rendered:
    """A row's text, its learned turns, the one that holds the answer, and where each message ends, with its role.

    `roles` is None where that was not asked for or cannot be told.
    """

    text: str
    turns: list[Turn]
    answer: Turn
    roles: list[tuple[int, str]] | None


class Template:
    """The chat template of `tokenizer`. Raises DataError, which begins with `where`, for what it refuses."""

    def __init__(self, tokenizer: Any) -> None:
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.specials = tuple(sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True))
        self.bos, self.eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        self._pattern = re.compile(f"({'|'.join(map(re.escape, self.specials))})") if self.specials else None
        self._tokenizer = tokenizer
        source = tokenizer.chat_template
        self._source = source if isinstance(source, str) else "".join((source or {}).values())
        self.watch = Watch(f"{tokenizer.name_or_path}: the chat template")
        check_template(self._source, self.watch.what)
        self._has_marks = bool(re.search(r"{%[-+]?\s*generation\s*[-+]?%}", self._source))

    def rendered(self, where: str, talk: Conversation, learn: str, with_roles: bool, notices: Notices) -> Rendered:
        """Return the text of a conversation and what is learned of it: the turns of `learn` (assistant, last or all)."""
        text, talk = self._whole(where, self._without_doubled(where, talk, notices))
        self._check_nothing_lost(where, talk, text, notices)
        numbers = [number for number, may_learn in enumerate(talk.may_learn) if may_learn]
        if not numbers:
            found = ", ".join(dict.fromkeys(message["role"] for message in talk.messages))
            raise DataError(f"{where}: no assistant message to learn; the row's roles are {found}")
        numbers = numbers[-1:] if learn == "last" else numbers
        finder = Turns(self, where, talk, text)
        turns = finder.of(numbers)
        learned = [(talk.messages[n], text[turn.begin : turn.end]) for n, turn in zip(numbers, turns, strict=True)]
        if any(_lost_thought(message, part) for message, part in learned):
            notices.add("the model's chat template drops thoughts of the assistant, so they are not learned", where)
        roles = self._roles(talk, text) if with_roles else None
        answer = turns[-1]
        if answer.closing == answer.end:
            notices.add("no special token ends the last answer, so the model does not learn where to stop", where)
        if learn == "all":
            if any(muted and m["role"] != ASSISTANT for muted, m in zip(talk.muted, talk.messages, strict=True)):
                raise DataError(
                    f"{where}: --learn all leaves out only the assistant's messages of weight 0, not others'"
                )
            turns = _all_but(finder.of([n for n in finder.assistants if talk.muted[n]]), answer, len(text))
        return Rendered(text, turns, answer, roles)

    def ending(self, text: str) -> str:
        """Return the special token that a text ends with, or nothing; white space after it does not count."""
        text = text.rstrip()
        return next(mark for mark in self.specials if text.endswith(mark)) if text.endswith(self.specials) else ""

    def first_special(self, text: str) -> int:
        """Return where the first special token of a text, which has one, ends."""
        found = self._pattern.search(text) if self._pattern else None
        return found.end() if found else len(text)

    def split(self, text: str) -> list[str]:
        """Return a text in parts: special tokens, and what is between them."""
        return [part for part in self._pattern.split(text) if part] if self._pattern else [text]

    def marked(self, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> list[tuple[int, int]]:
        """Return the characters within the template's `{% generation %}` marks; none where it has no such marks."""
        if not self._has_marks:
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {name: value for name, value in variables.items() if name != KWARGS}
        template = self._tokenizer.get_chat_template(None, given.get("tools"))
        more = {**self._tokenizer.special_tokens_map, **variables.get(KWARGS, {})}
        rendered: Any = self.watch.timed(
            render_jinja_template,
            [list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **given,
            **more,
        )
        return [(begin, end) for begin, end in rendered[1][0] if end > begin]

    def text_or_none(
        self, messages: Sequence[dict[str, Any]], variables: dict[str, Any], generate: bool = False
    ) -> str | None:
        """Return the text of a part of a conversation; None where the template refuses it, or there is no message."""
        try:
            return self._render(messages, variables, generate) if messages else None
        except ModelError:  # it took too long
            raise
        except Exception:  # many templates refuse parts: a system message alone, a conversation without a user
            return None

    def opened(self, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> str:
        """Return the text up to where the assistant begins. Raises ValueError for messages that the template refuses."""
        try:
            return self._render(messages, variables, generate=True)
        except ModelError:
            raise
        except Exception as error:  # a template is the model authors' program and can raise anything
            raise ValueError(f"{REFUSED} ({type(error).__name__}: {error})") from None

    def _render(self, messages: Sequence[dict[str, Any]], variables: dict[str, Any], generate: bool = False) -> str:
        given = {name: value for name, value in variables.items() if name != KWARGS}
        return self.watch.timed(
            self._tokenizer.apply_chat_template, list(messages), tokenize=False, add_generation_prompt=generate, **given,
            **variables.get(KWARGS, {}),
        )  # fmt: skip

    def _whole(self, where: str, talk: Conversation) -> tuple[str, Conversation]:
        """The row's text. Templates differ on tool calls: some want an empty content beside them, some arguments as text."""
        try:
            return self._render(talk.messages, talk.variables), talk
        except ModelError:
            raise
        except Exception as error:  # a template is the model authors' program and can raise anything
            messages = talk.messages
            for change in _with_content, _with_text_arguments:
                messages = [change(message) for message in messages]
                if messages != talk.messages and (text := self.text_or_none(messages, talk.variables)) is not None:
                    return text, replace(talk, messages=messages)
            raise DataError(f"{where}: {REFUSED} ({type(error).__name__}: {error})") from error

    def _without_doubled(self, where: str, talk: Conversation, notices: Notices) -> Conversation:
        """Takes special tokens that the template adds by itself out of the messages that hold them already."""
        messages = list(talk.messages)
        for number, message in enumerate(messages):
            content = message.get("content", "")
            mark = self.ending(content) if message["role"] == ASSISTANT else ""
            first = self.bos if number == 0 and self.bos and content.startswith(self.bos) else ""
            if not (mark or first):
                continue
            shown = self.text_or_none(replaced(messages, number, MARKER), talk.variables) or ""
            before, _, after = shown.partition(MARKER)
            if mark and after.lstrip().startswith(mark):
                content = content.rstrip().removesuffix(mark)
            if first and before.startswith(first):
                content = content.removeprefix(first)
            if content != message["content"]:
                messages[number] = {**message, "content": content}
                notices.add("a message held a special token that the chat template adds: the row has it once", where)
        return replace(talk, messages=messages)

    def _names(self, variable: str) -> bool:
        """Whether the template's source holds this name, as a word."""
        return bool(re.search(rf"(?<!\w){re.escape(variable)}(?!\w)", self._source))

    def _roles(self, talk: Conversation, text: str) -> list[tuple[int, str]] | None:
        """Where each message's part of the text ends: what the template adds for it, with its marks."""
        ends = []
        for number, message in enumerate(talk.messages, 1):
            whole = number == len(talk.messages)
            upto = text if whole else self.text_or_none(talk.messages[:number], talk.variables)
            if upto is None or not text.startswith(upto):
                return None
            ends.append((len(upto), message["role"]))
        return ends

    def _check_nothing_lost(self, where: str, talk: Conversation, text: str, notices: Notices) -> None:
        """Raises DataError for tools, documents and tool calls that the template does not show."""
        called = {name for message in talk.messages for name in names_of_calls(message)}
        offered = {tool.get("function", tool)["name"] for tool in talk.variables.get("tools", ())}
        given = talk.variables
        unseen = [
            what
            for what in VARIABLES
            if what in given and self.text_or_none(talk.messages, {k: v for k, v in given.items() if k != what}) == text
        ]
        for what, names in ("tool_calls", called), ("tools", offered):
            if lost := sorted(name for name in names if what in unseen or name not in text):
                raise DataError(
                    f"{where}: the model's chat template does not show {what} ({', '.join(lost)}); leave them out"
                )
        if "documents" in unseen:
            raise DataError(f"{where}: the model's chat template does not show the {len(given['documents'])} documents")
        if any(_said(message) not in text for message in talk.messages):
            notices.add(
                "the model's chat template changes or drops a text of the system, the user, the assistant or a tool",
                where,
            )
        for name in talk.variables.get(KWARGS, ()):
            if not self._names(name):
                notices.add(f"chat_template_kwargs: the model's chat template does not use {name!r}", where)
        for name in {key for message in talk.messages for key in message} - SHOWN:
            if not self._names(name):
                notices.add(f"the key {name!r} of messages is not used by the model's chat template", where)


def _said(message: dict[str, Any]) -> str:
    """What a message says, without the assistant's thoughts, which have a notice of their own."""
    content = message.get("content", "")
    return (content.rpartition("</think>")[2] if message["role"] == ASSISTANT else content).strip()


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    return {"content": "", **message}


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its tool calls' arguments as JSON text."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        calls.append(
            {**call, "function": {**function, "arguments": arguments}}
            if "function" in call
            else {**call, "arguments": arguments}
        )
    return {**message, "tool_calls": calls} if calls else message


def _lost_thought(message: dict[str, Any], shown: str) -> bool:
    """Whether a message has a thought that its turn does not show."""
    content = message.get("content", "")
    thoughts = [message[key] for key in THOUGHTS if isinstance(message.get(key), str)]
    if "</think>" in content:
        thoughts.append(content.partition("</think>")[0].replace("<think>", ""))
    return any(thought.strip() and thought.strip() not in shown for thought in thoughts)


def _all_but(left_out: Sequence[Turn], answer: Turn, length: int) -> list[Turn]:
    """The whole text as learned turns, `answer` among them, without the turns that are left out."""
    turns, at = [], 0
    for turn in sorted([*left_out, answer], key=lambda turn: turn.begin):
        turns += [Turn(at, turn.begin, turn.begin), *([turn] if turn is answer else [])]
        at = turn.end
    return [*turns, Turn(at, length, length)]
