"""Finds the assistant's turns in the text of a conversation: which characters the model learns.

A turn is learned from where the prompt ends, as at inference, to its end-of-turn token. The template's own
`{% generation %}` marks say where that is. Without them, texts do: the messages before the turn, rendered for generation,
must be the beginning of the row's text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

from ..support.errors import DataError
from .conversation import ASSISTANT, KWARGS, Conversation, names_of_calls

if TYPE_CHECKING:
    from .template import Template

MARKER = "\ue000\ue001\ue002"  # private characters that stand for a message's text
ORDER = "the model's chat template does not show the messages in their order"
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass(slots=True)
class Turn:
    """A learned turn, in characters of the text: learned [begin, end), of which [begin, closing) is the answer."""

    begin: int
    closing: int
    end: int


class Turns:
    """The turns of one conversation, whose `text` the template gave. Raises DataError for what cannot be told."""

    def __init__(self, template: "Template", where: str, talk: Conversation, text: str) -> None:
        self.template, self.where, self.messages, self.variables, self.text = (
            template, where, talk.messages, talk.variables, text
        )  # fmt: skip
        self.assistants = [number for number, m in enumerate(talk.messages) if m["role"] == ASSISTANT]

    def of(self, numbers: Sequence[int]) -> list[Turn]:
        """Return the turns of the messages of these numbers."""
        spans = self.template.marked(self.messages, self.variables)
        if len(spans) != len(self.assistants):
            spans = _joined(spans)  # some templates mark a turn and the token that ends it apart
        if spans:
            if len(spans) != len(self.assistants):
                raise DataError(
                    f"{self.where}: the chat template marks {len(spans)} generated parts in {len(self.assistants)} assistant "
                    "messages: it does not say which is which"
                )
            found = [self._after_prompt(number, *spans[self.assistants.index(number)]) for number in numbers]
        else:
            found = [(begin, self._end(number, begin)) for number in numbers for begin in [self._begin(number)]]
        if any(begin < end for (_, end), (begin, _) in pairwise(found)):
            raise DataError(f"{self.where}: {ORDER}")
        for number, span in zip(numbers, found, strict=True):
            self._check_whole(number, *span)
        return [Turn(begin, self._closing(begin, end), end) for begin, end in found]

    def _after_prompt(self, number: int, begin: int, end: int) -> tuple[int, int]:
        """A marked part without what the prompt at inference holds: some templates mark the turn's header, too."""
        prompt = self._try(self.messages[:number], generate=True)
        given = len(prompt) if prompt and self.text.startswith(prompt) else 0
        return (max(begin, given), end) if given < end else (begin, end)

    def _check_whole(self, number: int, begin: int, end: int) -> None:
        """Raises DataError for a turn without its content or its tool calls, or with the next message in it."""
        message, said = self.messages[number], self.text[begin:end]
        content = message.get("content", "").rpartition("</think>")[2].strip()
        place = f"{self.where}: message {number + 1}: the model's chat template does not show"
        if content not in said:  # a template can change it, but must show it
            if content in self.text[end:] and message.get("tool_calls"):
                raise DataError(f"{self.where}: {ORDER}: the content of message {number + 1} is behind its turn")
            if MARKER not in (self._try(replaced(self.messages, number, MARKER)) or MARKER):
                raise DataError(f"{place} its content{' beside tool_calls' if message.get('tool_calls') else ''}")
        if any(name not in said for name in names_of_calls(message)):
            raise DataError(f"{place} its tool_calls within its turn")
        if message.get("tool_calls") and content and number + 1 < len(self.messages) and self._own(number + 1)[0] < end:
            raise DataError(f"{self.where}: {ORDER}: message {number + 2} is within the turn of message {number + 1}")

    def _begin(self, number: int) -> int:
        """Where a turn's learned part begins: where the prompt at inference ends.

        Before the row's last turn, the text must be the prompt's. Templates change earlier turns (they drop thoughts, move
        tools), so these begin as far before the message's own text as they would if they were the last.
        """
        text, before = self.text, self.messages[:number]
        prompt = self._try(before, generate=True)
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        if prompt is not None and number + 1 == len(self.messages):
            at = common_length(prompt, text)
            raise DataError(
                f"{self.where}: the prompt at inference is not the beginning of this row's text: after {at} characters, "
                f"{text[max(0, at - 20) : at]!r}, the prompt has {prompt[at : at + 30]!r}, the row {text[at : at + 30]!r}"
                + self._remedy(before)
            )
        own = self._own(number)[0]
        names = names_of_calls(self.messages[number])
        calls = bool(names) and text.startswith(names[0], own)  # markup of the turn is before it
        if prompt is None and not calls:
            return own
        upto = None if prompt is None else self._try(self.messages[: number + 1])
        if prompt is not None and upto is not None and (calls or upto.startswith(prompt)):
            between = upto[
                self._common_marks(prompt, upto) : self._own_in(self.messages[: number + 1], number, upto)[0]
            ]
            if text.endswith(between, 0, own):
                return own - len(between)
        opening = (prompt or "").removeprefix(self._try(before) or "")
        at = text.rfind(opening, self._own(number - 1)[1], own) if opening else -1
        if at < 0 and calls:
            raise DataError(f"{self.where}: message {number + 1}: the chat template does not say where its turn begins")
        return own if at < 0 else at + len(opening)

    def _remedy(self, before: Sequence[dict[str, Any]]) -> str:
        """What makes the prompt the beginning of the row's text, where turning thoughts off does."""
        off = {**self.variables.get(KWARGS, {}), "enable_thinking": False}
        prompt, text = (
            self.template.text_or_none(messages, {**self.variables, KWARGS: off}, generate)
            for messages, generate in ((before, True), (self.messages, False))
        )
        return f'; give the row "{KWARGS}": {json.dumps(off)}' if prompt and text and text.startswith(prompt) else ""

    def _end(self, number: int, begin: int) -> int:
        """Where a turn's learned part ends: after its end-of-turn token, else where the next message's part begins."""
        text = self.text
        upto = text if number + 1 == len(self.messages) else self._try(self.messages[: number + 1])
        if upto is not None and text.startswith(upto) and len(upto) >= begin:
            end = len(upto)
        else:  # this turn is another one once messages follow it: take what closes it when it is the last
            own = max(begin, self._own(number)[1])
            if upto is not None:
                closing = upto[self._own_in(self.messages[: number + 1], number, upto)[1] :]
                end = own + self._common_marks(closing, text[own:])
                if self.template.first_special(closing) < len(closing) or self.template.ending(closing):
                    end = self._other_mark(number, own, end)
            else:
                mark, rest = self._mark_of_last(number), text[own:]
                end = (
                    own + len(rest) - len(rest.lstrip()) + len(mark) if mark and rest.lstrip().startswith(mark) else own
                )
        stripped = text[begin:end].rstrip()
        if not (mark := self.template.ending(stripped)):
            return end
        end = begin + len(stripped)
        if self.template.ending(stripped.removesuffix(mark)):
            if names := names_of_calls(self.messages[number]):
                at = self.text.rfind(names[-1], begin, end)
                return self._after_eos(at, end) if at >= 0 else end
            return self._several_marks(number, max(begin, self._own(number)[1]), end)
        return end

    def _other_mark(self, number: int, own: int, end: int) -> int:
        """Where a turn ends that another token closes once messages follow it; `end`, where none does."""
        text = self.text
        if self.template.ending(text[own:end]):
            return end
        after = own + self.template.first_special(text[own:])
        (mark,) = self.template.split(text[own:after])[-1:] or [""]
        if self.messages[number].get("tool_calls"):  # what follows a call's name can differ, too
            return after if after <= self._own(number + 1)[0] else end
        return after if mark in self.template.specials and not text[end : after - len(mark)].strip() else end

    def _several_marks(self, number: int, own: int, end: int) -> int:
        """Where a turn ends that several special tokens follow: after those that stay when a question comes next."""
        first = own + self.template.first_special(self.text[own:end])
        talk = [*self.messages[: number + 1], {"role": "user", "content": MARKER}]
        if (followed := self._try(talk)) is None:
            return first
        closing = followed[self._own_in(talk, number, followed)[1] :]
        kept = self.text[own : own + self._common_marks(self.text[own:end], closing)]
        end = max(first, own + len(kept.rstrip())) if self.template.ending(kept) else first
        return self._after_eos(own, end)

    def _after_eos(self, begin: int, end: int) -> int:
        """Where the end-of-text token in a part of the text ends, else `end`: some templates go on with the next header."""
        eos = self.template.eos
        at = self.text.find(eos, begin, end) if eos else -1
        return end if at < 0 else at + len(eos)

    def _mark_of_last(self, number: int) -> str:
        """The token that ends the last turn; for the last turn itself, the end-of-text token."""
        last = self.assistants[-1]
        if number == last:
            return self.template.eos
        begin = self._own(last)[0]
        return self.template.ending(self.text[begin : self._end(last, begin)])

    def _closing(self, begin: int, end: int) -> int:
        """Where the end-of-turn tokens of a turn begin; its end, where it has none."""
        while mark := self.template.ending(self.text[begin:end]):
            end = begin + len(self.text[begin:end].rstrip()) - len(mark)
        return end

    def _own(self, number: int) -> tuple[int, int]:
        return self._own_in(self.messages, number, self.text)

    def _own_in(self, messages: Sequence[dict[str, Any]], number: int, text: str) -> tuple[int, int]:
        """Where a message's own text is in the text of `messages`, found by another text in its place."""
        before, marker, after = (self._try(replaced(messages, number, MARKER)) or "").partition(MARKER)
        if names := names_of_calls(messages[number]):
            first, called, _ = (self._try(_renamed(messages, number, 0)) or "").partition(MARKER)
            if called and not (marker and self._common_marks(before, text) <= self._common_marks(first, text)):
                before = first  # the template shows the calls alone, or before the content
                _, marker, after = (self._try(_renamed(messages, number, len(names) - 1)) or "").partition(MARKER)
                after = after.replace(MARKER, names[-1])  # results can name the call again
        if not marker:
            raise DataError(f"{self.where}: message {number + 1}: the model's chat template does not show it")
        begin = self._common_marks(before, text)
        return begin, max(begin, len(text) - common_length(after[::-1], text[::-1]))

    def _common_marks(self, one: str, other: str) -> int:
        """How much two texts have in common at their beginning, without a part of a special token."""
        length = 0
        for ours, theirs in zip(self.template.split(one), self.template.split(other), strict=False):
            if ours != theirs:
                both_plain = ours not in self.template.specials and theirs not in self.template.specials
                return length + (common_length(ours, theirs) if both_plain else 0)
            length += len(ours)
        return length

    def _try(self, messages: Sequence[dict[str, Any]], generate: bool = False) -> str | None:
        return self.template.text_or_none(messages, self.variables, generate)


def replaced(messages: Sequence[dict[str, Any]], number: int, content: str) -> list[dict[str, Any]]:
    """Return the messages, with another content in one of them, and no thoughts beside it."""
    changed = {key: value for key, value in messages[number].items() if key not in THOUGHTS}
    return [*messages[:number], {**changed, "content": content}, *messages[number + 1 :]]


def _renamed(messages: Sequence[dict[str, Any]], number: int, index: int) -> list[dict[str, Any]]:
    """The messages, with another name in one of the tool calls of one of them, and no thoughts beside it."""
    changed = {key: value for key, value in messages[number].items() if key not in THOUGHTS}
    calls = list(changed["tool_calls"])
    call = calls[index]
    calls[index] = (
        {**call, "function": {**call["function"], "name": MARKER}} if "function" in call else {**call, "name": MARKER}
    )
    return [*messages[:number], {**changed, "tool_calls": calls}, *messages[number + 1 :]]


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            begin, _ = joined.pop()
        joined.append((begin, end))
    return joined


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many characters or tokens two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
