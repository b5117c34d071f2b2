"""The rows that are scored: taken out of the caller's batches, without padding, with the tokens that count."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data.batches import counted_tokens
from ..data.rows import IGNORE
from ..support.errors import DataError

KEYS = {"input_ids", "attention_mask", "labels", "counted", "token_type_ids"}


@dataclass(frozen=True)
class Row:
    tokens: torch.Tensor  # [tokens] int64, without padding
    counted: torch.Tensor  # [tokens] bool
    number: int  # in the order of arrival, among the rows with a token that counts
    batch: int  # where it came from, for errors
    row: int
    room: int  # padded tokens in the batch it came in


def rows_of(batches: Iterable[Mapping[str, Any]], which: str, bos: int | None) -> Iterator[Row]:
    """Yields the rows of `score`'s batches that have a token that counts.

    `which`: "all", "prompt" or "completion". `bos`: a leading token of this number does not count; None: it does. Raises
    DataError for a batch of another form.
    """
    number = 0
    for index, batch in enumerate(batches):
        _check_batch(batch, index, which)
        ids = [torch.as_tensor(row).cpu() for row in batch["input_ids"]]
        room = sum(len(row) for row in ids)
        for row, tokens in enumerate(ids):
            mask = _part(batch, "attention_mask", row, torch.ones_like(tokens)).bool()
            labelled = mask if which == "all" else _part(batch, "labels", row, tokens) != IGNORE
            marked = _part(batch, "counted", row, mask).bool()
            tokens = tokens[mask]
            skip_first = bos is not None and len(tokens) > 0 and bool(tokens[0] == bos)
            counted = marked[mask] & counted_tokens(which, labelled[mask], skip_first=skip_first)
            if counted.any():
                yield Row(tokens, counted, number, index, row, room)
                number += 1


def _part(batch: Mapping[str, Any], key: str, row: int, default: torch.Tensor) -> torch.Tensor:
    """One row of a batch's tensor or list, [tokens]."""
    return torch.as_tensor(batch[key][row]).cpu() if key in batch else default


def _check_batch(batch: Mapping[str, Any], index: int, which: str) -> None:
    if set(batch) - KEYS or "input_ids" not in batch:
        raise DataError(f"batch {index}: expected input_ids, attention_mask and labels, got {sorted(batch)}")
    if which != "all" and "labels" not in batch:
        raise DataError(f"batch {index}: scoring {which} tokens needs labels (-100 on the prompt)")
