"""Turns rows into tokens, and marks the tokens that the model learns.

The prompt's text is tokenised as it is at inference, and each learned part apart from it. So no token crosses the border
between what is given and what is learned, even where an answer begins with a line break that would join the prompt's.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..support.errors import ConfigError, DataError
from .conversation import alpaca_prompt, conversation_of
from .encoding import Encoder
from .example import Example, Span
from .lengths import LONG, Limit, merged
from .notices import Notices
from .rows import FORMATS, Row, Rows, format_of
from .template import Rendered, Template
from .turns import common_length

ROWS = 1024  # tokenised at once
LEARN = ("assistant", "last", "all")
AS_WRITTEN = (
    "a prompt and completion of plain text are learned as they are written, although the model has a chat template; to use "
    'it, give them as messages: {"prompt": [{"role": "user", "content": ...}], "completion": [{"role": "assistant", ...}]}'
)


@dataclass(slots=True)
class Piece:
    """A part of a row's text that is tokenised by itself."""

    text: str
    learned: bool
    answer: bool = False


@dataclass(slots=True)
class Draft:
    """A row as pieces of text; `templated` where a chat template put the special tokens in."""

    where: str
    pieces: list[Piece]
    completion: str | None = None
    templated: bool = False
    roles: list[tuple[int, str]] | None = None
    tokens: list[list[int] | None] = field(default_factory=list)  # of each piece; None where it cannot be split off


def tokenize(
    rows: Rows | Sequence[Row],
    tokenizer: Any,
    max_length: int | None = None,
    roles: bool = False,
    *,
    learn: str = "assistant",
    long: str = "error",
    skipped: list[str] | None = None,
    notices: Notices | None = None,
) -> list[Example]:
    """Turn rows, as `read_rows` or `read_jsonl` returns them, into one Example each.

    The model learns the assistant's messages with their end-of-turn tokens (`learn` "assistant"), only the last of them
    ("last"), or everything ("all"); of a prompt with a completion the completion, and all of a plain text. A row that is
    not messages is closed by an end-of-text token. With `roles`, the tokens of messages also carry their role.

    `long` says what becomes of a row of more than `max_length` tokens: "error", "skip", or "cut", from the left of its
    prompt. `skipped` takes the messages of rows that cannot be used, which are left out then. `notices` takes what is to
    be said of rows that can; without it, each line is a warning.

    Raises DataError, with file and line: for a row that is too long, has no token to learn or no message to learn, or
    that the tokenizer's chat template refuses.

        examples = tokenize(read_jsonl("train.jsonl"), tokenizer, max_length=model.config.max_position_embeddings)

    >>> example = pf.tokenize(rows, tokenizer)[0]
    >>> tokenizer.decode(example.tokens[example.start :])
    ' animal</s>'
    """
    for name, value, known in ("learn", learn, LEARN), ("long", long, LONG):
        if value not in known:
            raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    rows = rows.rows if isinstance(rows, Rows) else rows
    limit = Limit(max_length, long, tokenizer.bos_token_id, learn == "all")
    found = Notices() if notices is None else notices
    maker = _Maker(tokenizer, limit, roles, learn, skipped, found)
    examples = [e for begin in range(0, len(rows), ROWS) for e in maker.examples(rows[begin : begin + ROWS])]
    for line in found.lines() if notices is None else ():
        warnings.warn(line, stacklevel=2)
    return examples


@dataclass(slots=True)
class _Maker:
    """Makes examples of rows, a batch at a time; the options are `tokenize`'s."""

    tokenizer: Any
    limit: Limit
    with_roles: bool
    learn: str
    skipped: list[str] | None
    notices: Notices
    encoder: Encoder = field(init=False)
    template: Template | None = field(init=False)

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.tokenizer)
        self.template = Template(self.tokenizer) if getattr(self.tokenizer, "chat_template", None) else None

    def examples(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Example]:
        """The examples of some rows; rows that are refused are so in their order."""
        with self.template.watch if self.template else contextlib.nullcontext():
            drafts = [_tried(self._draft, where, row) for where, row in rows]
        self._encode([draft for draft in drafts if isinstance(draft, Draft)])
        for draft in drafts:
            made = _tried(self._example, draft) if isinstance(draft, Draft) else draft
            if isinstance(made, Example):
                yield made
            elif made is not None:
                if self.skipped is None:
                    raise made
                self.skipped.append(str(made))

    def _draft(self, where: str, row: dict[str, Any]) -> Draft:
        draft = self._pieces_of(where, row)
        try:
            "".join(piece.text for piece in draft.pieces).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: half of a surrogate pair, {error.object[error.start]!r}, is no text") from None
        return draft

    def _pieces_of(self, where: str, row: dict[str, Any]) -> Draft:
        kind = format_of(row)
        if kind is None:
            raise DataError(f"{where}: expected a row like {FORMATS}, got the keys {sorted(row)}")
        if kind == "text":
            return Draft(where, [Piece(self._ended(row["text"]), True)])
        if kind == "pair" or (kind == "alpaca" and self.template is None):
            if self.template:
                self.notices.add(AS_WRITTEN, where, once=True)
            prompt = row["prompt"] if kind == "pair" else alpaca_prompt(where, row)
            completion = self._ended(row["completion"] if kind == "pair" else row["output"])
            pieces = [Piece(prompt, self.learn == "all"), Piece(completion, True, answer=True)]
            return Draft(where, pieces, completion.removesuffix(self.tokenizer.eos_token or ""))
        if self.template is None:
            raise DataError(f"{where}: messages need a tokenizer with a chat template; use prompt/completion text")
        talk = conversation_of(where, row, kind, self.notices)
        found = self.template.rendered(where, talk, self.learn, self.with_roles, self.notices)
        answer = found.text[found.answer.begin : found.answer.closing]
        return Draft(where, _pieces(found), answer, templated=True, roles=found.roles)

    def _ended(self, text: str) -> str:
        """A text without white space after the end-of-text token, where it ends with one."""
        end = self.tokenizer.eos_token
        return text.rstrip() if end and text.rstrip().endswith(end) else text

    def _encode(self, drafts: list[Draft]) -> None:
        """Gives drafts the tokens of their pieces."""
        firsts = self.encoder.encode([draft.pieces[0].text for draft in drafts])
        rest = [(draft, piece.text) for draft in drafts for piece in draft.pieces[1:]]
        inside = self.encoder.encode_inside([text for _, text in rest])
        for draft, tokens in zip(drafts, firsts, strict=True):
            draft.tokens.append(tokens)
        for (draft, _), found in zip(rest, inside, strict=True):
            draft.tokens.append(found)

    def _example(self, draft: Draft) -> Example | None:
        example = self._whole(draft)
        if len(example.tokens) < 2:
            raise DataError(f"{draft.where}: only {len(example.tokens)} token; there is nothing to learn from it")
        if not example.label_tokens:
            raise DataError(f"{draft.where}: no token of this row is learned")
        self._note(draft, example)
        return self.limit.apply(example, self.notices)

    def _note(self, draft: Draft, example: Example) -> None:
        """Notes what a user may not expect of a row that can be learned."""
        if example.answer and example.answer[0] == example.answer[1]:
            self.notices.add("the answer is empty: only its end is learned", draft.where)
        if not (draft.templated or self.encoder.end):
            self.notices.add(
                "the tokenizer has no end-of-text token, so the model does not learn to stop", draft.where, once=True
            )
        if not (draft.templated or draft.pieces[0].text or self.encoder.front):
            self.notices.add(
                "the prompt is empty, and nothing comes before the answer: its first token is not learned", draft.where
            )
        if self.encoder.lossy:
            text = "".join(piece.text for piece in draft.pieces)
            if not self.encoder.keeps(text, [token for added in draft.tokens for token in added or ()]):
                self.notices.add("the tokenizer does not hold all of the row's characters", draft.where)

    def _whole(self, draft: Draft) -> Example:
        """The example of a draft, however long it is."""
        tokens: list[int] = []
        front, end = ([], []) if draft.templated else (self.encoder.front, self.encoder.end)
        if (draft.tokens[0] or [])[: len(front)] != front:
            tokens += front
        spans: list[Span] = []
        answer: Span | None = None
        for piece, added in zip(draft.pieces, draft.tokens, strict=True):
            if added is None:
                raise DataError(
                    f"{draft.where}: the tokenizer joins {piece.text[:30]!r} to any text before it, so it cannot be learned "
                    "apart from it"
                )
            begin = len(tokens)
            tokens += added
            if piece.answer:
                answer = max(begin, 1), max(len(tokens), 1)
            if piece.learned:
                spans.append((begin, len(tokens)))
        if end and tokens[-len(end) :] == end:  # the text held it already
            answer = answer and (answer[0], max(answer[0], len(tokens) - len(end)))
        elif end:
            tokens += end
            spans.append((len(tokens) - len(end), len(tokens)))
        roles = self._roles(draft) if draft.roles else None
        same = self.encoder.same
        return Example(
            self.encoder.shared(tokens), same(merged(spans)), same(answer), same(draft.completion), draft.where, roles
        )

    def _roles(self, draft: Draft) -> tuple[str, ...]:
        """The role of each token. A message's tokens are those that the chat template adds for it, with its marks."""
        roles: list[str] = []
        begin, tokens = 0, 0
        borders = iter([*(draft.roles or ()), (math.inf, "")])
        border, role = next(borders)
        for number, (piece, added) in enumerate(zip(draft.pieces, draft.tokens, strict=True)):
            end = begin + len(piece.text)
            while border < end:
                inside = piece.text[: int(border) - begin]
                (head,) = (self.encoder.encode_inside if number else self.encoder.encode)([inside])
                roles += [role] * (tokens + common_length(head or (), added or ()) - len(roles))
                border, role = next(borders)
            begin, tokens = end, tokens + len(added or ())
            roles += [role] * (tokens - len(roles))
            if border == end:
                border, role = next(borders)
        return tuple(roles)


def _tried(make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` returns, or the error with which it refuses a row."""
    try:
        return make(*arguments)
    except DataError as error:
        return error


def _pieces(found: Rendered) -> list[Piece]:
    """A rendered row's text in pieces: what is given, each learned answer, and what closes it."""
    pieces: list[Piece] = []
    at = 0
    for turn in found.turns:
        last = turn is found.answer
        parts = [(turn.begin, False, False), (turn.closing, True, last), (turn.end, True, False)]
        for end, learned, answer in parts:
            if end > at or answer or not pieces:
                pieces.append(Piece(found.text[at:end], learned, answer))
            at = end
    if at < len(found.text):
        pieces.append(Piece(found.text[at:], False))
    return pieces
