"""Groups rows of tokens into batches: padded or packed, of similar length, epoch after epoch."""

import bisect
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice, pairwise
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..support.errors import DataError
from .example import Example
from .rows import IGNORE


def collate(examples: Sequence[Example], device: Any = "cpu") -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and `labels`, each int64 [rows, longest], padded on the right with token 0."""
    rows = [torch.tensor(example.tokens) for example in examples]
    batch = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(_labels(rows, examples), batch_first=True, padding_value=IGNORE),
    }
    return {key: value.to(device) for key, value in batch.items()}


def collate_packed(examples: Sequence[Example], device: Any = "cpu") -> dict[str, torch.Tensor]:
    """Return `input_ids`, `position_ids` and `labels`, each int64 [1, tokens]: the rows end to end, without padding.

    Positions restart at 0 with each sequence. Its first token has no label, because the token before it belongs to
    another sequence. There is no attention mask on purpose: without one (and without a cache) transformers takes the
    borders of the sequences from the positions, for every layer's mask (full or sliding; sdpa, eager) and as cu_seqlens
    of flash attention. `check_packing` tests whether a model does so.
    """
    rows = [torch.tensor(example.tokens) for example in examples]
    labels = _labels(rows, examples)
    for row in labels:
        row[:1] = IGNORE
    batch = {
        "input_ids": torch.cat(rows),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows]),
        "labels": torch.cat(labels),
    }
    return {key: value.unsqueeze(0).to(device) for key, value in batch.items()}


def _labels(rows: list[torch.Tensor], examples: Sequence[Example]) -> list[torch.Tensor]:
    """Return the labels of each row: its learned tokens."""
    labels = [torch.full_like(row, IGNORE) for row in rows]
    for row, label, example in zip(rows, labels, examples, strict=True):
        for begin, end in example.learned:
            label[begin:end] = row[begin:end]
    return labels


def batches_of(
    examples: Sequence[Example], rows: int, tokens: str = "all", skip_first: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Return batches of `rows` examples in the given order, padded as a Hugging Face tokenizer pads them.

    `tokens` says which tokens are scored: "all", "prompt", "completion" or a role. `skip_first` leaves out the first
    token of each row: its large norms come from the attention sink (Xiao et al., arXiv 2309.17453). Unless every token
    is scored, each batch also holds `counted`, a bool [rows, tokens].

    Raises DataError if no token is left, or if `tokens` is a role and the examples have none.
    """
    chunks = [examples[i : i + rows] for i in range(0, len(examples), rows)]
    batches = [collate(chunk) for chunk in chunks]
    if tokens == "all" and not skip_first:
        return batches
    for batch, chunk in zip(batches, chunks, strict=True):
        masks = [counted_tokens(tokens, torch.tensor(e.is_learned()), e.roles, skip_first, e.where) for e in chunk]
        batch["counted"] = pad_sequence(masks, batch_first=True)
    if not any(batch["counted"].any() for batch in batches):
        known = sorted({role for e in examples for role in e.roles or ()})
        raise DataError(
            f"{examples[0].where} and {len(examples) - 1} more rows: no {tokens} token to score"
            + (f"; the rows' roles are {', '.join(known)}" if known else "")
        )
    return batches


def counted_tokens(
    which: str,
    labelled: torch.Tensor,
    roles: Sequence[str] | None = None,
    skip_first: bool = False,
    where: str = "rows",
) -> torch.Tensor:
    """Return which tokens of a row are scored, bool [tokens].

    `which`: "all", "prompt" (tokens without a label), "completion" (tokens with one), or a role. `labelled`: bool
    [tokens]. `roles`: the role of each token. Raises DataError, beginning with `where`, for a role that the row lacks.
    """
    if which in ("prompt", "completion"):
        counted = labelled == (which == "completion")
    elif which == "all":
        counted = torch.ones_like(labelled)
    elif roles is None:
        raise DataError(
            f"{where}: scoring the {which}'s tokens needs rows of messages, and a chat template that adds each message "
            "to those before it; score all, prompt or completion tokens"
        )
    else:
        counted = torch.tensor([role == which for role in roles])
    if skip_first:
        counted[:1] = False
    return counted


def group_by_length(
    lengths: Sequence[int], budget: int, seed: int | None = None, window: int = 1024, rows: int | None = None
) -> list[list[int]]:
    """Return groups of at most `rows` indices whose padded size (rows x longest) is at most `budget` tokens. Each index
    appears once.

    Indices are sorted by length within windows of `window` rows, which leaves a few per cent of padding. With a `seed`,
    the rows are shuffled before that and the groups after it. A row longer than the budget gets a group of its own. Where
    `rows` is the limit and not the budget, the groups of a window have equally many rows, give or take one: otherwise the
    longest row of 57 would be alone in a group, and so in a training step, where 8 others share one.

        group_by_length([500, 3], budget=256)  # [[1], [0]]
        group_by_length([4, 3, 2, 1], budget=256, rows=3)  # [[3, 2], [1, 0]]
    """

    most = len(lengths) if rows is None else rows

    def fill(window: list[int]) -> list[list[int]]:
        groups: list[list[int]] = [[]]
        for index in sorted(window, key=lambda i: lengths[i]):
            count = len(groups[-1]) + 1
            if groups[-1] and (count * lengths[index] > budget or count > most):
                groups.append([])
            groups[-1].append(index)
        if rows is None:
            return groups
        cuts = [len(window) * number // len(groups) for number in range(len(groups) + 1)]
        shortest_first = list(chain.from_iterable(groups))
        even = [shortest_first[begin:end] for begin, end in pairwise(cuts)]
        fits = all(len(group) * lengths[group[-1]] <= budget for group in even)
        return even if fits else groups

    return _in_windows(len(lengths), fill, seed, window)


def pack(
    lengths: Sequence[int], budget: int, seed: int | None = None, window: int = 1024, rows: int | None = None
) -> list[list[int]]:
    """Return groups of at most `rows` indices whose lengths add up to at most `budget` tokens. Each index appears once.

    The method is best fit decreasing within windows of `window` rows: each row, longest first, joins the fullest group
    that has room for it. With a `seed`, the rows are shuffled before that and the groups after it. Raises DataError for
    a row longer than the budget.

        pack([8, 3, 5, 4, 4], budget=8)  # [[0], [2, 1], [3, 4]]
    """
    above = [length for length in lengths if length > budget]
    if above:
        raise DataError(
            f"{len(above)} of {len(lengths)} rows do not fit a packed batch of {budget} tokens (the longest has "
            f"{max(above)}): allow {max(above)} tokens a batch, or shorten or split these rows"
        )

    def fill(window: list[int]) -> list[list[int]]:
        groups: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (free tokens, number of the group) of groups that may grow, ascending
        for index in sorted(window, key=lambda i: -lengths[i]):
            at = bisect.bisect_left(rooms, (lengths[index], 0))
            free, number = rooms.pop(at) if at < len(rooms) else (budget, len(groups))
            if number == len(groups):
                groups.append([])
            groups[number].append(index)
            if rows is None or len(groups[number]) < rows:
                bisect.insort(rooms, (free - lengths[index], number))
        return groups

    return _in_windows(len(lengths), fill, seed, window)


def _in_windows(
    count: int, fill: Callable[[list[int]], list[list[int]]], seed: int | None, window: int
) -> list[list[int]]:
    """Apply `fill` to each window of indices. With a seed, shuffle the indices first and the groups last."""
    order = list(range(count))
    rng = random.Random(seed)
    if seed is not None:
        rng.shuffle(order)
    groups = [group for begin in range(0, count, window) for group in fill(order[begin : begin + window])]
    if seed is not None:
        rng.shuffle(groups)
    return groups


def micro_batches(
    lengths: Sequence[int], labelled: int, budget: int, seed: int, share: float = 0.0, packing: bool = False,
    rows: int | None = None,
) -> Iterator[list[int]]:  # fmt: skip
    """Yield groups of indices without end, epoch after epoch, each epoch in its own order.

    The groups depend on the arguments alone, so the number of groups taken is a position in the data. Indices from
    `labelled` on are unlabelled rows. With `share` 0 they come once, before all others; otherwise that share of the
    groups holds them.
    """
    unlabelled = lengths[labelled:]
    assert unlabelled or not share  # the trainer's plan refuses this; it would never end
    how = (budget, seed, packing, rows)
    ours = _epochs(lengths[:labelled], *how)
    others = ([labelled + index for index in group] for group in _epochs(unlabelled, *how))
    if unlabelled and not share:
        yield from islice(others, groups_in_epoch(unlabelled, *how))
    owed = 0.0
    while True:
        owed += share
        yield next(others if owed >= 1.0 else ours)
        owed %= 1.0


def groups_in_epoch(lengths: Sequence[int], budget: int, seed: int, packing: bool, rows: int | None = None) -> int:
    """Return the number of micro-batches in the first epoch."""
    return len(_epoch(0, lengths, budget, seed, packing, rows))


def _epochs(lengths: Sequence[int], budget: int, seed: int, packing: bool, rows: int | None) -> Iterator[list[int]]:
    for epoch in count():
        yield from _epoch(epoch, lengths, budget, seed, packing, rows)


def _epoch(
    epoch: int, lengths: Sequence[int], budget: int, seed: int, packing: bool, rows: int | None
) -> list[list[int]]:
    return (pack if packing else group_by_length)(lengths, budget, seed * 1_000_003 + epoch, rows=rows)
