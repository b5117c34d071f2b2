"""Task data: JSONL rows or plain text -> token sequences with a label range -> padded or packed batches.

Rows follow TRL's conventions: {"prompt", "completion"} as strings or message lists, {"messages"}, or {"text"}.
"""

import bisect
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .errors import DataError

DEMO = {
    split: Path(__file__).parent / "demo" / f"wordnet_categories.{split}.jsonl" for split in ("train", "valid", "test")
}
IGNORE = -100  # the label of a token that counts in no loss, as in transformers
FORMATS = '{"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}'


@dataclass(frozen=True)
class Example:
    """One tokenised row: `tokens[start:]` carry labels. `completion` is the row's answer where it is plain text, `roles`
    the role of each token where the row is messages and roles were asked for."""

    tokens: tuple[int, ...]
    start: int
    completion: str | None
    where: str  # file:line, for errors
    roles: tuple[str, ...] | None = None


def read_jsonl(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, row) for each non-empty line. Raises DataError naming the file and line of what is wrong."""
    path = Path(path)
    lines = _read(path).split("\n")  # splitlines() would cut at U+2028 inside a string
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
        _check_row(where, row)
        rows.append((where, row))
    if not rows:
        raise DataError(f"{path}: no rows; expected one JSON object a line: {FORMATS}")
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _check_row(where: str, row: dict[str, Any]) -> None:
    if _format(row) is None:
        raise DataError(f"{where}: expected a row like {FORMATS}, got the keys {sorted(row)}")


def _format(row: dict[str, Any]) -> str | None:
    """How a row is read: "pair" (strings), "chat" (message lists), "messages" or "text", in this order."""

    def is_chat(key: str) -> bool:
        value = row.get(key)
        if not isinstance(value, list) or not value:
            return False
        return all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)

    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return "pair"
    if is_chat("prompt") and is_chat("completion"):
        return "chat"
    if is_chat("messages"):
        return "messages"
    return "text" if isinstance(row.get("text"), str) else None


def tokenize(
    rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Any, max_length: int | None = None, roles: bool = False
) -> list[Example]:
    """Examples with an end-of-text token after each completion or text. With `roles`, the tokens of messages know theirs.

    Raises DataError for a row longer than `max_length` tokens (nothing is truncated silently).
    """
    examples = []
    for where, row in rows:
        tokens, start, completion = _tokens(where, row, tokenizer)
        if max_length is not None and len(tokens) > max_length:
            part = "prompt" if start >= max_length else "row"
            raise DataError(
                f"{where}: the {part} has {len(tokens)} tokens, the limit is {max_length}: shorten or split it"
            )
        if len(tokens) < 2:
            raise DataError(f"{where}: only {len(tokens)} token; there is nothing to learn from it")
        told = _roles(row, tokens, tokenizer) if roles else None
        examples.append(Example(tuple(tokens), max(start, 1), completion, where, told))
    return examples


def _roles(row: dict[str, Any], tokens: list[int], tokenizer: Any) -> tuple[str, ...] | None:
    """Each token's role: a message's tokens are those that the chat template adds for it, its markup included. None where
    the row is no messages, or the template rewrites earlier ones, so that they cannot be told apart."""
    if _format(row) not in ("chat", "messages"):
        return None
    messages = row["messages"] if _format(row) == "messages" else [*row["prompt"], *row["completion"]]
    roles: list[str] = []
    for number, message in enumerate(messages, 1):
        upto = _template(tokenizer, messages[:number], False)
        if upto != tokens[: len(upto)]:
            return None
        roles += [message["role"]] * (len(upto) - len(roles))
    return tuple(roles)


def _tokens(where: str, row: dict[str, Any], tokenizer: Any) -> tuple[list[int], int, str | None]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    kind = _format(row)
    if kind == "text":
        return [*tokenizer(row["text"])["input_ids"], *end], 0, None
    if kind == "pair":
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        answer = completion_tokens(tokenizer, row["prompt"], row["completion"])
        return [*prompt, *answer, *end], len(prompt), row["completion"]
    messages = row["messages"] if kind == "messages" else [*row["prompt"], *row["completion"]]
    asked = len(messages) - 1 if kind == "messages" else len(row["prompt"])
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: messages need a tokenizer with a chat template; use prompt/completion text")
    try:
        prompt = _template(tokenizer, messages[:asked], True) if asked else []
        whole = _template(tokenizer, messages, False)
    except Exception as error:  # templates are programs of the model's authors, and raise what they like
        raise DataError(f"{where}: the model's chat template refuses this row ({error})") from error
    if whole[: len(prompt)] != prompt:
        raise DataError(f"{where}: the chat template does not keep the prompt as a prefix; use prompt/completion text")
    return whole, len(prompt), None


def _template(tokenizer: Any, messages: list[dict[str, Any]], generate: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def completion_tokens(tokenizer: Any, prompt: str, completion: str) -> list[int]:
    """The completion's tokens as they follow the prompt: taken from the joint text where that keeps the prompt's
    tokens (sentencepiece would add a space to the completion alone), else tokenised on their own."""
    head = list(tokenizer(prompt)["input_ids"])
    whole = list(tokenizer(prompt + completion)["input_ids"])
    if len(whole) > len(head) and whole[: len(head)] == head:
        return whole[len(head) :]
    return list(tokenizer(completion, add_special_tokens=False)["input_ids"])


def read_text(path: str | Path, tokenizer: Any, length: int) -> list[Example]:
    """Plain text as consecutive rows of at most `length` tokens, all but the first of each with a label.

    Rows end where a paragraph (text up to a blank line) does, if that leaves them at least half full. Every token of the
    text is in exactly one row; an end-of-text token follows the last, and where the tokenizer puts a
    begin-of-text token before a text, each row has one. Raises DataError for a file that is missing, not UTF-8, empty
    or JSONL, and for a tokenizer that gives no offsets.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".json"):
        raise DataError(f"{path}: expected plain text (.txt); rows of JSON go to --train")
    text = _read(path)
    if not text.strip():
        raise DataError(f"{path}: no text in it")
    if not tokenizer.is_fast:
        raise DataError(f"{path}: {type(tokenizer).__name__} gives no offsets; plain text needs a fast tokenizer")
    front = [t for t in tokenizer("")["input_ids"][:1] if t == tokenizer.bos_token_id]
    tokens, begins, breaks = _tokens_of_text(text, tokenizer)
    if len(tokens) < 2:
        raise DataError(f"{path}: only {len(tokens)} token; there is nothing to learn from it")
    if tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
    room = length - len(front)
    if room < 3:
        raise DataError(f"{path}: rows of {length} tokens are too short for text; allow at least {3 + len(front)}")
    examples: list[Example] = []
    begin, line, at = 0, 1, 0
    while begin < len(tokens):
        end = begin + room
        if end < len(tokens):
            paragraph = breaks[bisect.bisect_right(breaks, end) - 1]
            end = paragraph if paragraph - begin >= room / 2 else end
            end -= end == len(tokens) - 1  # a row of one token would have no label
        line, at = line + text.count("\n", at, begins[begin]), begins[begin]
        examples.append(Example((*front, *tokens[begin:end]), 1, None, f"{path}:{line}"))
        begin = end
    return examples


def _tokens_of_text(text: str, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """(tokens, where in `text` each begins, numbers of tokens before each paragraph).

    Tokenised in pieces of whole paragraphs and at least 2^16 characters, as tokenizers take much memory for one long
    string; not in single paragraphs, since many tokenizers join a full stop and the line breaks after it, or split
    the line breaks before a word.
    """
    paragraphs = [0] + [match.end() for match in re.finditer(r"\n(?:[^\S\n]*\n)+", text)]
    cuts = [0]
    for end in paragraphs:
        if end - cuts[-1] >= 1 << 16:
            cuts.append(end)
    cuts.append(len(text))
    tokens: list[int] = []
    begins: list[int] = []
    ends: list[int] = []
    for begin, end in itertools.pairwise(cuts):
        piece = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens += piece["input_ids"]
        begins += [begin + first for first, _ in piece["offset_mapping"]]
        ends += [begin + last for _, last in piece["offset_mapping"]]
    return tokens, begins, [bisect.bisect_right(ends, end) for end in paragraphs]


def collate(sequences: Sequence[Sequence[int]], starts: Sequence[int], device: Any = "cpu") -> dict[str, torch.Tensor]:
    """Right-padded int64 `input_ids`, `attention_mask` and `labels`, each [rows, longest]; padding is token 0."""
    longest = max(map(len, sequences))
    batch = {
        "input_ids": torch.zeros(len(sequences), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(sequences), longest, dtype=torch.long),
        "labels": torch.full((len(sequences), longest), IGNORE),
    }
    for i, (tokens, start) in enumerate(zip(sequences, starts, strict=True)):
        row = torch.tensor(tokens)
        batch["input_ids"][i, : len(row)] = row
        batch["attention_mask"][i, : len(row)] = 1
        batch["labels"][i, start : len(row)] = row[start:]
    return {key: value.to(device) for key, value in batch.items()}


def collate_packed(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], device: Any = "cpu"
) -> dict[str, torch.Tensor]:
    """int64 `input_ids`, `position_ids` and `labels`, each [1, tokens]: the sequences end to end, without padding.

    Positions restart at 0 with each sequence, and its first token has no label, as the token before it is another
    sequence's. There is no attention mask on purpose: without one (and without a cache) transformers takes the
    sequences' borders from the positions, in every layer's mask (full or sliding; sdpa, eager) and as
    cu_seqlens of flash attention. `models.check_packing` tells whether a model does.
    """
    rows = [torch.tensor(tokens) for tokens in sequences]
    labels = [row.clone() for row in rows]
    for label, start in zip(labels, starts, strict=True):
        label[: max(start, 1)] = IGNORE
    batch = {
        "input_ids": torch.cat(rows),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows]),
        "labels": torch.cat(labels),
    }
    return {key: value.unsqueeze(0).to(device) for key, value in batch.items()}


def batches_of(
    examples: Sequence[Example], rows: int, tokens: str = "all", skip_first: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Batches of `rows` examples in the order they come, as a Hugging Face tokenizer would pad them; with `counted`
    [rows, tokens] where only some tokens are to be scored: the "prompt", the "completion", or those of a role. `skip_first`
    leaves out each row's first token, whose large norms are the attention sink's (Xiao et al., arXiv 2309.17453).

    Raises DataError where no token would be left, or a role is asked for and the examples have none.
    """
    chunks = [examples[i : i + rows] for i in range(0, len(examples), rows)]
    batches = [collate([e.tokens for e in chunk], [e.start for e in chunk]) for chunk in chunks]
    if tokens == "all" and not skip_first:
        return batches
    for batch, chunk in zip(batches, chunks, strict=True):
        batch["counted"] = pad_sequence([_counted(e, tokens, skip_first) for e in chunk], batch_first=True)
    if not any(batch["counted"].any() for batch in batches):
        known = sorted({role for e in examples for role in e.roles or ()})
        raise DataError(
            f"{examples[0].where} and {len(examples) - 1} more rows: no {tokens} token to score"
            + (f"; the rows' roles are {', '.join(known)}" if known else "")
        )
    return batches


def _counted(example: Example, tokens: str, skip_first: bool) -> torch.Tensor:
    place = torch.arange(len(example.tokens))
    if tokens in ("prompt", "completion"):
        counted = (place >= example.start) == (tokens == "completion")
    elif tokens == "all":
        counted = torch.ones_like(place, dtype=torch.bool)
    elif example.roles is None:
        raise DataError(
            f"{example.where}: scoring the {tokens}'s tokens needs rows of messages, and a chat template that adds "
            "each message to those before it; score all, prompt or completion tokens"
        )
    else:
        counted = torch.tensor([role == tokens for role in example.roles])
    return counted & (place > 0) if skip_first else counted


def group_by_length(
    lengths: Sequence[int], budget: int, seed: int | None = None, window: int = 1024
) -> list[list[int]]:
    """Index groups whose padded size (rows x longest) stays within `budget` tokens; every index appears once.

    Indices are sorted by length within windows (shuffled before, and the groups after, when there is a `seed`), which
    leaves a few per cent of padding. A row longer than the budget makes a group of its own.
    """

    def fill(window: list[int]) -> list[list[int]]:
        groups: list[list[int]] = [[]]
        for index in sorted(window, key=lambda i: lengths[i]):
            if groups[-1] and (len(groups[-1]) + 1) * lengths[index] > budget:
                groups.append([])
            groups[-1].append(index)
        return groups

    return _in_windows(len(lengths), fill, seed, window)


def pack(lengths: Sequence[int], budget: int, seed: int | None = None, window: int = 1024) -> list[list[int]]:
    """Index groups whose summed length stays within `budget` tokens; every index appears once.

    Best fit decreasing within windows: each row, longest first, joins the fullest group that has room for it. Indices
    are shuffled before, and the groups after, when there is a `seed`. Raises DataError for a row above the budget.
    """
    above = [length for length in lengths if length > budget]
    if above:
        raise DataError(
            f"{len(above)} of {len(lengths)} rows do not fit a packed batch of {budget} tokens (the longest has "
            f"{max(above)}): allow {max(above)} tokens a batch, or shorten or split these rows"
        )

    def fill(window: list[int]) -> list[list[int]]:
        groups: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (free tokens, number of the group), ascending
        for index in sorted(window, key=lambda i: -lengths[i]):
            at = bisect.bisect_left(rooms, (lengths[index], 0))
            free, number = rooms.pop(at) if at < len(rooms) else (budget, len(groups))
            if number == len(groups):
                groups.append([])
            groups[number].append(index)
            bisect.insort(rooms, (free - lengths[index], number))
        return groups

    return _in_windows(len(lengths), fill, seed, window)


def _in_windows(
    count: int, fill: Callable[[list[int]], list[list[int]]], seed: int | None, window: int
) -> list[list[int]]:
    """The groups that `fill` makes of each window of the indices, which are shuffled before, and the groups after, where
    there is a seed."""
    order = list(range(count))
    rng = random.Random(seed)
    if seed is not None:
        rng.shuffle(order)
    groups = [group for begin in range(0, count, window) for group in fill(order[begin : begin + window])]
    if seed is not None:
        rng.shuffle(groups)
    return groups


def micro_batches(
    lengths: Sequence[int], labelled: int, budget: int, seed: int, share: float = 0.0, packing: bool = False
) -> Iterator[list[int]]:
    """Endless index groups, epoch after epoch, each epoch in an order of its own: a pure function of the arguments, so
    that a position in the data is a number of groups.

    Indices from `labelled` on are unlabelled rows: with `share` 0 they come once, before the others; else that share of
    the groups holds them.
    """
    ours = _epochs(lengths[:labelled], 0, budget, seed, packing)
    others: Iterator[list[int]] = iter(())
    if labelled < len(lengths):
        others = _epochs(lengths[labelled:], labelled, budget, seed, packing)
        if not share:
            yield from islice(others, groups_in_epoch(lengths[labelled:], budget, seed, packing))
    owed = 0.0
    while True:
        owed += share
        if owed >= 1.0:
            owed -= 1.0
            yield next(others)
        else:
            yield next(ours)


def groups_in_epoch(lengths: Sequence[int], budget: int, seed: int, packing: bool) -> int:
    """Micro-batches in the first epoch."""
    return len((pack if packing else group_by_length)(lengths, budget, _epoch_seed(seed, 0)))


def _epochs(lengths: Sequence[int], first: int, budget: int, seed: int, packing: bool) -> Iterator[list[int]]:
    for epoch in count():
        for group in (pack if packing else group_by_length)(lengths, budget, _epoch_seed(seed, epoch)):
            yield [first + index for index in group]


def _epoch_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch
