"""A tokenised row: its tokens, and which of them the model learns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

Span = tuple[int, int]  # tokens [begin, end) of a row


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row.

    The model learns the tokens of the `learned` spans, which are ascending and apart. `answer` is the part that accuracy is
    measured on: the last learned turn without its closing markup (an end-of-turn token); None for plain text.

    >>> row = Example.after_prompt((5, 6, 7, 2), 2, " animal", "train.jsonl:1", closing=1)
    >>> row.learned, row.answer, row.label_tokens
    (((2, 4),), (2, 3), 2)
    """

    tokens: tuple[int, ...]
    learned: tuple[Span, ...]
    answer: Span | None
    completion: str | None  # the text of the answer
    where: str  # file:line, for errors
    roles: tuple[str, ...] | None = None  # of each token, where the row is messages and the caller asked for roles

    @classmethod
    def after_prompt(
        cls,
        tokens: Sequence[int],
        start: int,
        completion: str | None = None,
        where: str = "",
        roles: tuple[str, ...] | None = None,
        closing: int = 0,
    ) -> "Example":
        """Returns a row of which everything from `start` on is learned. Its last `closing` tokens are closing markup."""
        learned = ((start, len(tokens)),) if start < len(tokens) else ()
        answer = None if completion is None else (start, len(tokens) - closing)
        return cls(tuple(tokens), learned, answer, completion, where, roles)

    @property
    def start(self) -> int:
        """Where the answer begins, or of plain text the last learned part."""
        if self.answer:
            return self.answer[0]
        return self.learned[-1][0] if self.learned else len(self.tokens)

    @property
    def label_tokens(self) -> int:
        """How many tokens are learned."""
        return sum(end - begin for begin, end in self.learned)

    @property
    def has_prompt(self) -> bool:
        """Whether the row has a prompt. Plain text has none: all but its first token is learned."""
        return self.answer is not None or self.label_tokens < len(self.tokens) - 1

    def is_learned(self) -> list[bool]:
        """Whether each token is learned."""
        marks = [False] * len(self.tokens)
        for begin, end in self.learned:
            marks[begin:end] = [True] * (end - begin)
        return marks

    def truncated(self, length: int) -> "Example":
        """Returns the row's first `length` tokens."""
        learned = tuple((begin, min(end, length)) for begin, end in self.learned if begin < length)
        answer = self.answer and (min(self.answer[0], length), min(self.answer[1], length))
        roles = self.roles and self.roles[:length]
        return Example(self.tokens[:length], learned, answer, self.completion, self.where, roles)


def digest(examples: Iterable[Example]) -> str:
    """Returns the SHA-256 of the rows' tokens and of what is learned of them, in order."""
    data = sha256()
    for example in examples:
        data.update(repr((example.tokens, example.learned)).encode())
    return data.hexdigest()
