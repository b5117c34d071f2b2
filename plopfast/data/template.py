"""Renders conversations with the tokenizer's chat template, and finds the characters that the model learns.

A turn is learned from where the prompt ends, as at inference, to its end-of-turn mark. The template's own
`{% generation %}` marks say where that is. Without them, texts do: the messages before the turn, rendered for generation,
must be the beginning of the row's text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..support.errors import DataError
from .conversation import ASSISTANT, KWARGS, Conversation, names_of_calls
from .notices import Notices

MARKER = "\ue000\ue001\ue002"  # private characters that stand for a message's text
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
REFUSED = "the model's chat template refuses this row"


@dataclass(slots=True)
class Turn:
    """A learned turn, in characters of the text: learned [begin, end), of which [begin, closing) is the answer."""

    begin: int
    closing: int
    end: int


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
        self.specials = tuple({*tokenizer.all_special_tokens, *added} - {""})
        self.bos = tokenizer.bos_token
        self._tokenizer = tokenizer
        source = tokenizer.chat_template
        self._source = source if isinstance(source, str) else "".join((source or {}).values())
        self._marked = bool(re.search(r"{%-?\+?\s*generation\s*[-+]?%}", self._source))

    def rendered(self, where: str, talk: Conversation, learn: str, with_roles: bool, notices: Notices) -> Rendered:
        """Return the text of a conversation and what is learned of it: the turns of `learn` (assistant, last or all)."""
        text, talk = self._whole(where, self._without_doubled(where, talk, notices))
        self._check_nothing_lost(where, talk, text, notices)
        numbers = [number for number, may_learn in enumerate(talk.may_learn) if may_learn]
        if not numbers:
            raise DataError(f"{where}: no assistant message to learn")
        turns = self._turns(where, talk, text, numbers[-1:] if learn == "last" else numbers)
        self._note_lost_thoughts(where, talk, text, notices)
        roles = self._roles(talk, text) if with_roles else None
        answer = turns[-1]
        if learn == "all":
            turns = self._all_but_weight_0(where, talk, text, answer)
        return Rendered(text, turns, answer, roles)

    # -- rendering -----------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[dict[str, Any]], variables: dict[str, Any], generate: bool = False) -> str:
        given = {name: value for name, value in variables.items() if name != KWARGS}
        return self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generate, **given, **variables.get(KWARGS, {})
        )

    def _text(self, where: str, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> str:
        try:
            return self._render(messages, variables)
        except Exception as error:  # a template is the model authors' program and can raise anything
            raise DataError(f"{where}: {REFUSED} ({type(error).__name__}: {error})") from error

    def _try(self, messages: Sequence[dict[str, Any]], variables: dict[str, Any], generate: bool = False) -> str | None:
        """The text of a part of a conversation; None where the template refuses it, or there is no message."""
        try:
            return self._render(messages, variables, generate) if messages else None
        except Exception:  # many templates refuse parts: a system message alone, a conversation without a user
            return None

    def _whole(self, where: str, talk: Conversation) -> tuple[str, Conversation]:
        """The row's text. Templates differ on a message of tool calls alone: some want no content, some an empty one."""
        if all("content" in message for message in talk.messages):
            return self._text(where, talk.messages, talk.variables), talk
        if (text := self._try(talk.messages, talk.variables)) is not None:
            return text, talk
        talk = Conversation([{"content": "", **m} for m in talk.messages], talk.may_learn, talk.variables)
        return self._text(where, talk.messages, talk.variables), talk

    def _without_doubled(self, where: str, talk: Conversation, notices: Notices) -> Conversation:
        """Takes special tokens that the template adds by itself out of the messages that hold them already."""
        messages = list(talk.messages)
        for number, message in enumerate(messages):
            content = message.get("content", "")
            mark = self._ending(content) if message["role"] == ASSISTANT else ""
            first = self.bos if number == 0 and self.bos and content.startswith(self.bos) else ""
            if not (mark or first):
                continue
            shown = self._try(_replaced(messages, number, MARKER), talk.variables) or ""
            before, _, after = shown.partition(MARKER)
            if mark and after.lstrip().startswith(mark):
                content = content.rstrip().removesuffix(mark)
            if first and before.startswith(first):
                content = content.removeprefix(first)
            if content != message["content"]:
                messages = _replaced(messages, number, content)
                notices.add("a message held a special token that the chat template adds: the row has it once", where)
        return Conversation(messages, talk.may_learn, talk.variables)

    def _ending(self, text: str) -> str:
        """The special token that a text ends with, or nothing; white space after it does not count."""
        text = text.rstrip()
        return next((mark for mark in self.specials if text.endswith(mark)), "") if text.endswith(self.specials) else ""

    # -- what is learned -----------------------------------------------------------------------------------------------

    def _turns(self, where: str, talk: Conversation, text: str, numbers: Sequence[int]) -> list[Turn]:
        """The learned turns: the messages of these numbers."""
        if self._marked and (spans := self._marked_spans(where, talk)):
            assistants = [number for number, m in enumerate(talk.messages) if m["role"] == ASSISTANT]
            if len(spans) != len(assistants):
                raise DataError(
                    f"{where}: the chat template marks {len(spans)} generated parts in {len(assistants)} assistant messages: "
                    "it does not say which is which"
                )
            found = [spans[assistants.index(number)] for number in numbers]
        else:
            found, last = [], max(n for n, m in enumerate(talk.messages) if m["role"] == ASSISTANT)
            for number in numbers:
                begin = self._begin(where, talk, text, number, strict=number == last)
                found.append((begin, self._end(talk, text, number, begin)))
        return [Turn(begin, self._closing(text, begin, end), end) for begin, end in found]

    def _marked_spans(self, where: str, talk: Conversation) -> list[tuple[int, int]]:
        """The parts of the row's text within the template's `{% generation %}` marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {name: value for name, value in talk.variables.items() if name != KWARGS}
        template = self._tokenizer.get_chat_template(None, given.get("tools"))
        more = {**self._tokenizer.special_tokens_map, **talk.variables.get(KWARGS, {})}
        rendered: Any = render_jinja_template(
            [talk.messages], chat_template=template, return_assistant_tokens_mask=True, **given, **more
        )
        return [(begin, end) for begin, end in rendered[1][0] if end > begin]

    def _begin(self, where: str, talk: Conversation, text: str, number: int, strict: bool) -> int:
        """Where a turn's learned part begins: where the prompt at inference ends.

        Only the text before the last turn must be (`strict`) the prompt's: templates change earlier turns, and then the
        turn begins after the text that opens it for generation, or else with the message's own text.
        """
        before = talk.messages[:number]
        prompt = self._try(before, talk.variables, generate=True)
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        if prompt is not None and strict:
            at = common_length(prompt, text)
            raise DataError(
                f"{where}: the prompt at inference is not the beginning of this row's text: after {at} characters, "
                f"{text[max(0, at - 20) : at]!r}, the prompt has {prompt[at : at + 30]!r}, the row {text[at : at + 30]!r}"
            )
        begin = self._own_text(talk, text, number)[0]
        opening = (prompt or "").removeprefix(self._try(before, talk.variables) or "")
        at = text.rfind(opening, 0, begin) if opening else -1
        return begin if at < 0 else at + len(opening)

    def _end(self, talk: Conversation, text: str, number: int, begin: int) -> int:
        """Where a turn's learned part ends: after its end-of-turn token, else where the next message's text begins."""
        upto = text if number + 1 == len(talk.messages) else self._try(talk.messages[: number + 1], talk.variables)
        if upto is not None and text.startswith(upto) and len(upto) >= begin:
            end = len(upto)
        else:  # this turn is another one once messages follow it: take what closes it when it is the last
            end = max(begin, self._own_text(talk, text, number)[1])
            if upto is not None:
                closing = upto[
                    self._own_text(Conversation(talk.messages[: number + 1], [], talk.variables), upto, number)[1] :
                ]
                end += common_length(closing, text[end : end + len(closing)])
        stripped = text[begin:end].rstrip()
        return begin + len(stripped) if stripped.endswith(self.specials) else end

    def _closing(self, text: str, begin: int, end: int) -> int:
        """Where the end-of-turn tokens of a turn begin; its end, where it has none."""
        while mark := self._ending(text[begin:end]):
            end = begin + len(text[begin:end].rstrip()) - len(mark)
        return end

    def _own_text(self, talk: Conversation, text: str, number: int) -> tuple[int, int]:
        """Where a message's own text is in the row's, found by another text in its place."""
        other = self._try(_replaced(talk.messages, number, MARKER), talk.variables) or ""
        before, _, after = other.partition(MARKER)
        begin = common_length(before, text)
        return begin, max(begin, len(text) - common_length(after[::-1], text[::-1]))

    def _all_but_weight_0(self, where: str, talk: Conversation, text: str, answer: Turn) -> list[Turn]:
        """The whole text as learned turns, `answer` among them, without the assistant's messages of weight 0."""
        numbers = [n for n, m in enumerate(talk.messages) if m["role"] == ASSISTANT and not talk.may_learn[n]]
        left_out = self._turns(where, talk, text, numbers) if numbers else []
        turns, at = [], 0
        for turn in sorted([*left_out, answer], key=lambda turn: turn.begin):
            turns += [Turn(at, turn.begin, turn.begin), *([turn] if turn is answer else [])]
            at = turn.end
        return [*turns, Turn(at, len(text), len(text))]

    def _roles(self, talk: Conversation, text: str) -> list[tuple[int, str]] | None:
        """Where each message's part of the text ends: what the template adds for it, with its marks."""
        ends = []
        for number, message in enumerate(talk.messages, 1):
            upto = text if number == len(talk.messages) else self._try(talk.messages[:number], talk.variables)
            if upto is None or not text.startswith(upto):
                return None
            ends.append((len(upto), message["role"]))
        return ends

    # -- what the template leaves out ----------------------------------------------------------------------------------

    def _check_nothing_lost(self, where: str, talk: Conversation, text: str, notices: Notices) -> None:
        """Raises DataError for tools, documents and tool calls that the template does not show."""
        called = {name for message in talk.messages for name in names_of_calls(message)}
        offered = {tool.get("function", tool).get("name", "") for tool in talk.variables.get("tools", ())}
        for what, names in ("tool_calls", called), ("tools", offered):
            if lost := sorted(name for name in names if name not in text):
                raise DataError(
                    f"{where}: the model's chat template does not show {what} ({', '.join(lost)}); leave them out"
                )
        if documents := talk.variables.get("documents"):
            rest = {name: value for name, value in talk.variables.items() if name != "documents"}
            if self._try(talk.messages, rest) == text:
                raise DataError(f"{where}: the model's chat template does not show the {len(documents)} documents")
        for name in talk.variables.get(KWARGS, ()):
            if name not in self._source:
                notices.add(f"chat_template_kwargs: the model's chat template does not use {name!r}", where)
        for name in {key for message in talk.messages for key in message} - {
            "role",
            "content",
            *THOUGHTS,
            "tool_calls",
        }:
            if name not in self._source:
                notices.add(f"the key {name!r} of messages is not used by the model's chat template", where)

    def _note_lost_thoughts(self, where: str, talk: Conversation, text: str, notices: Notices) -> None:
        for message in talk.messages:
            content = message.get("content", "")
            thoughts = [message[key] for key in THOUGHTS if isinstance(message.get(key), str)]
            if "</think>" in content:
                thoughts.append(content.partition("</think>")[0].replace("<think>", ""))
            if any(thought.strip() and thought.strip() not in text for thought in thoughts):
                notices.add("the model's chat template drops thoughts of the assistant, so they are not learned", where)
                return


def _replaced(messages: Sequence[dict[str, Any]], number: int, content: str) -> list[dict[str, Any]]:
    """The messages, with another content in one of them, and no thoughts beside it."""
    changed = {key: value for key, value in messages[number].items() if key not in THOUGHTS}
    return [*messages[:number], {**changed, "content": content}, *messages[number + 1 :]]


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many characters or tokens two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
