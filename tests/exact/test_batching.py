"""Batches of rows against slow, plain accounts of them, on many small random rows; and their limits."""

import random
from itertools import islice

import pytest
import torch
from oracle import learned_of, random_example

import plopfast as pf
from plopfast.data.batches import (
    batches_of,
    collate,
    collate_packed,
    counted_tokens,
    group_by_length,
    groups_in_epoch,
    micro_batches,
    pack,
)
from plopfast.data.example import Example
from plopfast.support.errors import DataError


def test_padded_and_packed_batches_cell_by_cell():
    rng = random.Random(1)
    for _ in range(30):
        rows = [random_example(rng) for _ in range(rng.randint(1, 5))]
        padded, packed = collate(rows), collate_packed(rows)
        longest = max(len(row.tokens) for row in rows)
        assert all(part.shape == (len(rows), longest) and part.dtype == torch.int64 for part in padded.values())
        for number, row in enumerate(rows):
            for i in range(longest):
                is_row = i < len(row.tokens)
                cell = [int(padded[key][number, i]) for key in ("input_ids", "attention_mask", "labels")]
                label = row.tokens[i] if i in learned_of(row) else -100
                assert cell == ([row.tokens[i], 1, label] if is_row else [0, 0, -100])
        cells = [
            (token, i, token if i in learned_of(row) and i else -100)
            for row in rows
            for i, token in enumerate(row.tokens)
        ]
        for key, column in zip(("input_ids", "position_ids", "labels"), zip(*cells, strict=True), strict=True):
            assert packed[key].tolist() == [list(column)], key
        whole_row = Example(rows[0].tokens, ((0, len(rows[0].tokens)),), None, None, "")
        assert collate_packed([whole_row, whole_row])["labels"][0].tolist() == 2 * [-100, *whole_row.tokens[1:]]


def is_scored(row, i, which):
    if which in ("prompt", "completion"):
        return (i in learned_of(row)) == (which == "completion")
    return which in ("all", row.roles[i])


def test_the_tokens_that_are_scored_one_by_one():
    rng = random.Random(2)
    for _ in range(40):
        rows = [random_example(rng, roles=True) for _ in range(rng.randint(1, 7))]
        for which in ("all", "prompt", "completion", "user", "assistant"):
            for skip_first in (False, True):
                wanted = [
                    [is_scored(row, i, which) and not (skip_first and i == 0) for i in range(len(row.tokens))]
                    for row in rows
                ]
                many = rng.randint(1, 4)
                if not any(map(any, wanted)):
                    with pytest.raises(DataError):
                        batches_of(rows, many, which, skip_first)
                    continue
                found = batches_of(rows, many, which, skip_first)
                assert [len(batch["input_ids"]) for batch in found] == [
                    len(rows[i : i + many]) for i in range(0, len(rows), many)
                ]
                if which == "all" and not skip_first:
                    assert all("counted" not in batch for batch in found)
                    continue
                masks = [row for batch in found for row in batch["counted"].tolist()]
                for mask, marks in zip(masks, wanted, strict=True):
                    assert mask == marks + [False] * (len(mask) - len(marks))
                for row in rows:
                    labelled = torch.tensor(row.is_learned())
                    counted_tokens(which, labelled, row.roles, skip_first)
                    assert labelled.tolist() == row.is_learned(), "the caller's tensor stays as it was"


def slow_groups(lengths, budget, rows):
    """The shortest first, as many as fit; with a limit of rows, spread evenly over as many groups where those fit too."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        group = groups[-1] if groups else []
        if group and (len(group) + 1) * lengths[index] <= budget and len(group) < (rows or 99):
            group.append(index)
        else:
            groups.append([index])
    if rows:
        even = [[] for _ in groups]
        for place, index in enumerate(index for group in groups for index in group):
            number = max(n for n in range(len(groups)) if n * len(lengths) // len(groups) <= place)
            even[number].append(index)
        if all(len(group) * max(lengths[i] for i in group) <= budget for group in even):
            return even
    return groups


def slow_packing(lengths, budget, rows):
    """Best fit decreasing: the longest first, each into the fullest group that has room, the first of equal ones."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = [budget - sum(lengths[i] for i in group) for group in groups]
        fits = [n for n, group in enumerate(groups) if free[n] >= lengths[index] and len(group) < (rows or 99)]
        if fits:
            groups[min(fits, key=lambda n: free[n])].append(index)
        else:
            groups.append([index])
    return groups


@pytest.mark.parametrize("how, slow", [(group_by_length, slow_groups), (pack, slow_packing)])
def test_groups_are_what_a_plain_loop_says(how, slow):
    rng = random.Random(3)
    for _ in range(150):
        lengths = [rng.randint(1, 9) for _ in range(rng.randint(0, 14))]
        budget = max([1, *lengths]) + rng.randint(0, 20)
        rows = rng.choice((None, 1, 2, 3, len(lengths) or 1))
        window = rng.choice((1, 3, 5, 14, 1024))
        expected = [
            [begin + i for i in group]
            for begin in range(0, len(lengths), window)
            for group in slow(lengths[begin : begin + window], budget, rows)
        ]
        assert how(lengths, budget, window=window, rows=rows) == expected
        seeded = how(lengths, budget, seed=rng.randint(0, 9), window=window, rows=rows)
        assert sorted(i for group in seeded for i in group) == list(range(len(lengths)))
        for group in seeded:
            assert len(group) <= (rows or 99)
            size = sum(lengths[i] for i in group)
            assert (size if how is pack else max(lengths[i] for i in group) * len(group)) <= budget


def test_a_row_of_the_budget_and_one_above():
    assert group_by_length([8, 4, 4], 8) == [[1, 2], [0]] and pack([8, 4, 4], 8) == [[0], [1, 2]]
    assert group_by_length([9, 1], 8) == [[1], [0]]
    with pytest.raises(DataError):
        pack([8, 9], 8)


def epochs(count, lengths, budget, seed, packing=False, rows=None):
    groups = micro_batches(lengths, len(lengths), budget, seed, packing=packing, rows=rows)
    taken = []
    for _ in range(count):
        found, seen = [], set()
        while len(seen) < len(lengths):
            found.append(next(groups))
            assert not seen & set(found[-1]), "no row comes again before all have"
            seen |= set(found[-1])
        taken.append(found)
    return taken


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_differ_in_rows_and_order_and_seeds_have_epochs_of_their_own(packing):
    rng = random.Random(4)
    lengths = [rng.randint(1, 9) for _ in range(60)]
    options = {"budget": 20, "packing": packing, "rows": 3}
    of = {seed: epochs(3, lengths, seed=seed, **options) for seed in (0, 1, 2)}
    assert of[1] == epochs(3, lengths, seed=1, **options)
    every = [epoch for found in of.values() for epoch in found]
    for number, one in enumerate(every):
        assert all(len(group) <= 3 for group in one)
        for other in every[number + 1 :]:
            assert one != other and sorted(map(sorted, one)) != sorted(map(sorted, other))
        longest = [max(lengths[i] for i in group) for group in one]
        assert longest != sorted(longest) and longest != sorted(longest, reverse=True), "groups are in random order"
    for seed in (0, 1):
        assert len(of[seed][0]) == groups_in_epoch(lengths, 20, seed, packing, 3)


@pytest.mark.parametrize("how", [group_by_length, pack])
def test_rows_far_apart_meet_in_a_group(how):
    """The rows are shuffled before they are cut into windows."""
    found = how([4] * 200, 8, seed=1, window=20)
    distance = sum(abs(one - other) for one, other in found) / len(found)
    assert 200 / 3 * 0.7 < distance < 200 / 3 * 1.3, "as for random pairs"
    assert how([4] * 200, 8, seed=1, window=20) == found != how([4] * 200, 8, seed=2, window=20)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.3])
@pytest.mark.parametrize("packing", [False, True])
def test_unlabelled_rows_have_their_share_or_come_first(share, packing):
    rng = random.Random(5)
    lengths = [rng.randint(1, 9) for _ in range(30)]
    taken = list(islice(micro_batches(lengths, 18, 12, 3, share, packing), 200))
    is_unlabelled = [{i >= 18 for i in group} for group in taken]
    assert all(len(kinds) == 1 for kinds in is_unlabelled), "no group mixes the kinds"
    marks = [kinds == {True} for kinds in is_unlabelled]
    if not share:
        first = groups_in_epoch(lengths[18:], 12, 3, packing)
        assert marks == [True] * first + [False] * (200 - first)
        assert sorted(i for group in taken[:first] for i in group) == list(range(18, 30))
    else:
        for n in range(1, 201):
            assert abs(sum(marks[:n]) - n * share) <= 1
            if share != 0.3:  # a float that is exact
                assert sum(marks[:n]) == int(n * share)
    for kind, rows in ((False, range(18)), (True, range(18, 30))):
        order = [i for group, mark in zip(taken, marks, strict=True) if mark == kind for i in group]
        assert sorted(order[: len(rows)]) == list(rows) and (order[: len(rows)] != list(rows))


def test_tokenizing_more_rows_than_a_batch_keeps_each_ones_own(tokenizer):
    rows = [(f"r:{i}", {"prompt": f"{i % 7}a", "completion": f" {i} {i % 3}"}) for i in range(2100)]
    found = pf.tokenize(rows, tokenizer)
    for (where, row), example in zip(rows, found, strict=True):
        assert example.where == where and tokenizer.decode(example.tokens[:-1]) == row["prompt"] + row["completion"]
        assert tokenizer.decode([example.tokens[i] for i in sorted(learned_of(example))]) == row["completion"] + "</s>"
