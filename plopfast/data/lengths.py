"""Rows that are too long: refused, left out, or cut."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..support.errors import DataError
from .example import Example, Span
from .notices import Notices

LONG = ("error", "skip", "cut")


@dataclass(frozen=True, slots=True)
class Limit:
    """What becomes of rows of more than `tokens` tokens (None: no limit): `long` is "error", "skip" or "cut".

    `bos` stays in front of a row that is cut. Where `all` is true, every token is learned, so answers may be cut too.
    """

    tokens: int | None
    long: str
    bos: int | None
    all: bool

    def apply(self, example: Example, notices: Notices) -> Example | None:
        """Return the row, or as much of it as fits; None for a row to leave out. Raises DataError for one that is refused."""
        count, limit = len(example.tokens), self.tokens
        if limit is None or count <= limit:
            return example
        if self.long == "skip":
            notices.add(f"longer than {limit} tokens, so left out (--long skip)", example.where)
            return None
        if self.long == "cut" and example.has_prompt:
            return self._without_its_left(example, limit, notices)
        if self.long == "cut":
            notices.add(f"cut to the first {limit} tokens (--long cut)", example.where)
            return example.truncated(limit)
        raise DataError(
            f"{example.where}: the row has {count} tokens, the limit is {limit}: shorten or split it, or choose "
            "--long skip or cut"
        )

    def _without_its_left(self, example: Example, limit: int, notices: Notices) -> Example:
        """The row without the first tokens of its prompt. Its last turn must stay whole, after one token at least."""
        less = len(example.tokens) - limit
        keep = int(example.tokens[0] == self.bos and example.tokens[1 + less : 2 + less] != (self.bos,))  # not twice
        last = len(example.tokens) - example.start
        if limit < keep + 1 + last and not self.all:
            raise DataError(
                f"{example.where}: the part to learn has {last} tokens, the limit is {limit}: it cannot be cut; raise "
                "--max-length, or leave such rows out with --bad-rows skip"
            )
        spans = [(begin - less, end - less) for begin, end in example.learned]
        if self.all:
            spans = [(max(begin, keep), end) for begin, end in spans]
        kept = [(begin, end) for begin, end in spans if max(keep, 1) <= begin or self.all]
        notices.add(f"cut to {limit} tokens, from the left of the prompt (--long cut)", example.where)
        if len(kept) < len(spans):
            notices.add("earlier turns were cut off, so they are not learned", example.where)
        tokens, roles, answer = example.tokens, example.roles, example.answer
        return Example(
            (*tokens[:keep], *tokens[keep + less :]),
            merged(kept),
            answer and (max(answer[0] - less, 1), max(answer[1] - less, 1)),
            example.completion,
            example.where,
            roles and (*roles[:keep], *roles[keep + less :]),
        )


def merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return spans without empty ones, those that touch joined.

    Nothing comes before the first token of a row, so it is never learned.
    """
    joined: list[Span] = []
    for begin, end in spans:
        begin = max(begin, 1)
        if joined and begin <= joined[-1][1]:
            begin = joined.pop()[0]
        if begin < end:
            joined.append((begin, end))
    return tuple(joined)
