"""Finds the assistant's turns in the text of a conversation: which characters the model learns.

A turn is learned from where the prompt ends, as at inference, to its end-of-turn token. The template's own
`{% generation %}` marks say where that is. Without them, texts do: the messages before the turn, rendered for generation,
must be the beginning of the row's text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

from ..support.errors import DataError
from .conversation import ASSISTANT, Conversation

if TYPE_CHECKING:
    from .template import Template

MARKER = "\ue000\ue001\ue002"  # private characters that stand for a message's text
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
        if spans:
            if len(spans) != len(self.assistants):
                raise DataError(
                    f"{self.where}: the chat template marks {len(spans)} generated parts in {len(self.assistants)} assistant "
                    "messages: it does not say which is which"
                )
            found = [spans[self.assistants.index(number)] for number in numbers]
        else:
            found = [(begin, self._end(number, begin)) for number in numbers for begin in [self._begin(number)]]
        if any(begin < end for (_, end), (begin, _) in pairwise(found)):
            raise DataError(f"{self.where}: the model's chat template does not show the messages in their order")
        return [Turn(begin, self._closing(begin, end), end) for begin, end in found]

    def _begin(self, number: int) -> int:
        """Where a turn's learned part begins: where the prompt at inference ends.

        Only the text before the last turn must be the prompt's: templates change earlier turns (they drop thoughts, move
        tools). Those begin as far before the message's own text as they would if they were the last.
        """
        text, before = self.text, self.messages[:number]
        prompt = self._try(before, generate=True)
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        if prompt is not None and number == self.assistants[-1]:
            at = common_length(prompt, text)
            raise DataError(
                f"{self.where}: the prompt at inference is not the beginning of this row's text: after {at} characters, "
                f"{text[max(0, at - 20) : at]!r}, the prompt has {prompt[at : at + 30]!r}, the row {text[at : at + 30]!r}"
            )
        own = self._own(number)[0]
        upto = None if prompt is None else self._try(self.messages[: number + 1])
        if prompt is None:
            return own
        if upto is not None and upto.startswith(prompt):
            between = upto[len(prompt) : self._own_in(self.messages[: number + 1], number, upto)[0]]
            if text.endswith(between, 0, own):
                return own - len(between)
        opening = prompt.removeprefix(self._try(before) or "")
        at = text.rfind(opening, self._own(number - 1)[1], own) if opening else -1
        return own if at < 0 else at + len(opening)

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
            else:
                mark, rest = self._mark_of_last(number), text[own:]
                end = (
                    own + len(rest) - len(rest.lstrip()) + len(mark) if mark and rest.lstrip().startswith(mark) else own
                )
        stripped = text[begin:end].rstrip()
        if not (mark := self.template.ending(stripped)):
            return end
        end = begin + len(stripped)
        if self.template.ending(stripped.removesuffix(mark)) and not self.messages[number].get("tool_calls"):
            own = max(begin, self._own(number)[1])  # of several marks, the first one ends the turn
            return own + self.template.first_special(text[own:end])
        return end

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
        other = self._try(replaced(messages, number, MARKER)) or ""
        before, marker, after = other.partition(MARKER)
        if not marker:
            raise DataError(f"{self.where}: message {number + 1}: the model's chat template does not show it")
        begin = common_length(before, text)
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


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many characters or tokens two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
