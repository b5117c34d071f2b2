"""Cuts plain text into rows of tokens."""

import bisect
import itertools
import re
from pathlib import Path
from typing import Any

from ..support import files
from ..support.errors import DataError
from .example import Example
from .readers import MISSING


def read_text(path: str | Path, tokenizer: Any, length: int) -> list[Example]:
    """Cut a text file into consecutive rows of at most `length` tokens. The model learns all but the first of each row.

    A row ends at the end of a paragraph (text up to a blank line) if that leaves the row at least half full. Every token
    of the text is in exactly one row. An end-of-text token follows the last one. If the tokenizer puts a begin-of-text
    token before a text, each row has one.

    Raises DataError for a file that is missing, empty, JSONL or not UTF-8, and for a tokenizer that gives no offsets.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".json"):
        raise DataError(f"{path}: expected plain text (.txt); rows of JSON go to --train")
    return rows_of_text(files.read_text(path, MISSING, DataError), path, tokenizer, length)


def rows_of_text(text: str, path: str | Path, tokenizer: Any, length: int) -> list[Example]:
    """Cut a text as `read_text` does; `path` names it in errors, and in each row's place."""
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
            end -= end == len(tokens) - 1  # so that the last row has more than one token, and so a label
        line, at = line + text.count("\n", at, begins[begin]), begins[begin]
        examples.append(Example.after_prompt((*front, *tokens[begin:end]), 1, where=f"{path}:{line}"))
        begin = end
    return examples


def _tokens_of_text(text: str, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens, the character where each begins, and the number of tokens before each paragraph.

    The text is tokenised in pieces of whole paragraphs, each at least 2^16 characters: one long string takes tokenizers
    much memory. Single paragraphs won't do, because many tokenizers join a full stop to the line breaks after it, or
    split the line breaks before a word.
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
