"""Batches, cuts and descriptions of rows against slow, plain accounts of them, on many small random rows; and their limits."""

import bisect
import copy
import random
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from tokenizers import processors

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
from plopfast.data.describe import BINS, facts_of
from plopfast.data.example import Example
from plopfast.data.lengths import Limit, merged
from plopfast.data.notices import Notices
from plopfast.data.text import read_text
from plopfast.support.errors import DataError

BOS = 1


def random_example(rng, longest=12, roles=False):
    """A row of tokens with a few learned spans, apart from each other; plain text, or with an answer at the last one."""
    count = rng.randint(2, longest)
    tokens = [rng.choice((BOS, 7, 8)), *(rng.choice((BOS, 5, 6, 7, 8, 9)) for _ in range(count - 1))]
    borders = sorted(rng.sample(range(1, count + 1), rng.choice([n for n in (2, 4) if n <= count])))
    spans = tuple(zip(borders[::2], borders[1::2], strict=True))
    kind = rng.choice(("text", "answer", "closed"))
    if kind == "text":
        spans, answer = ((1, count),), None
    else:
        begin, end = spans[-1]
        answer = (begin, max(begin, end - (kind == "closed")))
    names = tuple(rng.choice(("user", "assistant")) for _ in tokens) if roles else None
    return Example(tuple(tokens), spans, answer, None if answer is None else "text", f"row {rng.random()}", names)


def learned_of(example):
    return {i for begin, end in example.learned for i in range(begin, end)}


def examples(count, seed, **options):
    rng = random.Random(seed)
    return [random_example(rng, **options) for _ in range(count)]


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


def test_the_tokens_that_are_scored_one_by_one():
    rng = random.Random(2)
    for _ in range(40):
        rows = [random_example(rng, roles=True) for _ in range(rng.randint(1, 7))]
        for which in ("all", "prompt", "completion", "user", "assistant"):
            for skip_first in (False, True):
                wanted = [
                    [
                        i > 0 or not skip_first
                        if which == "all"
                        else (row.roles[i] == which if which in row.roles + ("user", "assistant") else
                              (i in learned_of(row)) == (which == "completion")) and (i > 0 or not skip_first)
                        for i in range(len(row.tokens))
                    ]
                    for row in rows
                ]  # fmt: skip
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
    groups = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        group = groups[-1] if groups else []
        if group and (len(group) + 1) * lengths[index] <= budget and len(group) < rows:
            group.append(index)
        else:
            groups.append([index])
    return groups


def slow_packing(lengths, budget, rows):
    """Best fit decreasing: the longest first, each into the fullest group that has room, the first of equal ones."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = [budget - sum(lengths[i] for i in group) for group in groups]
        fits = [n for n, group in enumerate(groups) if free[n] >= lengths[index] and len(group) < rows]
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
            for group in slow(lengths[begin : begin + window], budget, rows or 99)
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
        assert len(one) == sum(1 for _ in one) and all(len(group) <= 3 for group in one)
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


def test_a_row_in_its_own_words():
    for row in examples(300, seed=6):
        learned, count = learned_of(row), len(row.tokens)
        assert row.label_tokens == len(learned)
        assert row.is_learned() == [i in learned for i in range(count)]
        assert row.start == (row.answer[0] if row.answer else row.learned[-1][0])
        assert row.has_prompt == (row.answer is not None or learned != set(range(1, count)))
        for length in range(1, count + 2):
            cut = row.truncated(length)
            assert cut.tokens == row.tokens[:length] and learned_of(cut) == {i for i in learned if i < length}
            assert all(begin < end for begin, end in cut.learned)
            assert cut.answer == (row.answer and tuple(min(place, length) for place in row.answer))
    many = Example((1, 2, 3, 4, 5, 6), ((1, 2), (4, 6)), None, None, "x", tuple("abcdef"))
    assert many.start == 4 and many.truncated(3).roles == tuple("abc") and many.has_prompt
    made = Example.after_prompt((5, 6, 7, 2), 2, " animal", "x", closing=1)
    assert made.learned == ((2, 4),) and made.answer == (2, 3)
    assert Example.after_prompt((5, 6), 2).learned == () and Example.after_prompt((5, 6), 2).start == 2


def test_spans_are_joined_as_their_tokens_are():
    rng = random.Random(7)
    for _ in range(300):
        borders = sorted(rng.choices(range(9), k=2 * rng.randint(0, 4)))
        spans = list(zip(borders[::2], borders[1::2], strict=True))
        tokens = {i for begin, end in spans for i in range(max(begin, 1), end)}
        found = merged(spans)
        assert {i for begin, end in found for i in range(begin, end)} == tokens
        assert all(begin < end for begin, end in found) and all(one[1] < other[0] for one, other in pairwise(found))


@pytest.mark.parametrize("learn_all", [False, True])
def test_what_a_cut_leaves(learn_all):
    """From the left of the prompt, behind a BOS; the last turn stays whole, earlier ones whole or not at all."""
    cut = refused = 0
    for row in examples(400, seed=8, roles=True):
        for tokens in range(1, len(row.tokens) + 2):
            limit, notices = Limit(tokens, "cut", BOS, learn_all), Notices()
            less = len(row.tokens) - tokens
            if less <= 0:
                assert (
                    limit.apply(row, notices) is row
                    and Limit(tokens, "error", BOS, learn_all).apply(row, notices) is row
                )
                assert not notices.lines()
                continue
            with pytest.raises(DataError):
                Limit(tokens, "error", BOS, learn_all).apply(row, notices)
            assert Limit(tokens, "skip", BOS, learn_all).apply(row, notices) is None
            if not row.has_prompt:
                assert limit.apply(row, notices) == row.truncated(tokens)
                continue
            with_bos = row.tokens[0] == BOS and row.tokens[1 + less : 2 + less] != (BOS,)
            stay = [0, *range(1 + less, len(row.tokens))] if with_bos else list(range(less, len(row.tokens)))
            answer = range(row.start, len(row.tokens))
            before = len(stay) - len(answer) - with_bos  # tokens of the prompt that stay
            if before < 1 and not learn_all:
                refused += 1
                with pytest.raises(DataError):
                    limit.apply(row, notices)
                continue
            found, cut = limit.apply(row, notices), cut + 1
            assert found.tokens == tuple(row.tokens[i] for i in stay) and len(found.tokens) == tokens
            assert found.roles == tuple(row.roles[i] for i in stay)
            places = {old: new for new, old in enumerate(stay)}
            turns = [range(begin, end) for begin, end in row.learned]
            if not learn_all:
                turns = [turn for turn in turns if all(places.get(i, 0) > 0 for i in turn)]
            assert learned_of(found) == {places[i] for turn in turns for i in turn if places.get(i, 0) > 0}
            if not learn_all:
                assert row.learned[-1][0] in turns[-1]
                assert found.answer == tuple(place - less for place in row.answer)
            assert found.completion == row.completion and found.where == row.where
    assert cut > 100 and (learn_all or refused > 100)


def test_cutting_plain_text_and_no_limit():
    row = Example((1, 5, 6, 7), ((1, 4),), None, None, "x")
    assert Limit(2, "cut", BOS, False).apply(row, Notices()).tokens == (1, 5)
    assert Limit(None, "error", BOS, False).apply(row, Notices()) is row


@pytest.mark.parametrize("count", [1, 2, 3, 20, 21, 200])
def test_descriptions_in_numpys_figures(tokenizer, count):
    rng = random.Random(count)
    rows = [random_example(rng, longest=rng.choice((3, 30, 90))) for _ in range(count)]
    lengths = np.array([len(row.tokens) for row in rows])
    facts = facts_of("train", rows, tokenizer)
    assert (facts.rows, facts.tokens, facts.shortest, facts.longest) == (
        count, lengths.sum(), lengths.min(), lengths.max(),
    )  # fmt: skip
    assert facts.learned == sum(len(learned_of(row)) for row in rows)
    assert facts.percentiles == {f"{p}%": round(float(np.percentile(lengths, p))) for p in (50, 95)}
    assert len(facts.histogram) <= BINS and sum(n for _, n in facts.histogram) == count
    width = facts.histogram[1][0] if len(facts.histogram) > 1 else lengths.max() + 1
    assert facts.histogram == [(i * width, int((lengths // width == i).sum())) for i in range(len(facts.histogram))]
    assert facts.histogram[-1][1] > 0 and width * BINS > lengths.max() >= (width - 1) * (BINS - 1) / 2
    assert "".join(text for text, _ in facts.row) == tokenizer.decode(rows[0].tokens)
    shown = tokenizer.decode([t for i, t in enumerate(rows[0].tokens) if i in learned_of(rows[0])])
    assert "".join(text for text, learned in facts.row if learned) == shown


def random_text(rng, paragraphs, longest=12):
    words = ("a", "bb", "the", "Word.", "x\ny", "no", "\n")
    parts = []
    for _ in range(paragraphs):
        parts += [
            " ".join(rng.choices(words, k=rng.randint(1, longest))),
            rng.choice(("\n\n", "\n \n", "\n\n\n", "\n")),
        ]
    return "".join(parts)


def paragraph_ends(text):
    """Where a line begins that a blank line is before, and no other blank line after; the text's begin, too."""
    lines, places, at = text.split("\n"), [0], 0
    for number, line in enumerate(lines):
        last = number + 1 == len(lines)
        if number > 1 and not lines[number - 1].strip() and (line.strip() or last):
            places.append(at)
        at += len(line) + 1
    return places


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("paragraphs, length", [(1, 5), (12, 8), (40, 16), (40, 17), (3, 500), (9000, 40)])
def test_text_is_cut_where_a_plain_loop_cuts_it(tokenizer, tmp_path, paragraphs, length, with_bos):
    if with_bos:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    front = [tokenizer.bos_token_id] * with_bos
    for seed in range(1 if paragraphs > 1000 else 8):
        text = random_text(random.Random(seed), paragraphs)
        path = tmp_path / f"{seed}.txt"
        path.write_text(text)
        rows = read_text(path, tokenizer, length)
        assert all(row.tokens[: len(front)] == tuple(front) and len(row.tokens) <= length for row in rows)
        assert all(learned_of(row) == set(range(1, len(row.tokens))) and row.label_tokens for row in rows)
        parts = [row.tokens[len(front) :] for row in rows]
        tokens = [token for part in parts for token in part]
        assert tokens[-1] == tokenizer.eos_token_id and tokenizer.decode(tokens[:-1]) == text
        width = {token: len(tokenizer.decode([token])) for token in set(tokens[:-1])}
        ends = np.cumsum([width[token] for token in tokens[:-1]]).tolist()
        breaks = [bisect.bisect_right(ends, place) for place in paragraph_ends(text)]
        if paragraphs < 1000:
            assert tokens[:-1] == tokenizer(text, add_special_tokens=False)["input_ids"]
        at, room, line, last_begin = 0, length - len(front), 1, 0
        for row, part in zip(rows, parts, strict=True):
            begin = ends[at - 1] if at else 0
            line, last_begin = line + text.count("\n", last_begin, begin), begin
            assert row.where == f"{path}:{line}"
            if at + room < len(tokens):
                last = breaks[bisect.bisect_right(breaks, at + room) - 1]
                expected = last - at if last - at >= room / 2 else room
                assert len(part) == expected - (at + expected == len(tokens) - 1)
            at += len(part)
    for wrong in (0, 1, 2 + with_bos):
        with pytest.raises(DataError):
            read_text(path, tokenizer, wrong)
    assert read_text(path, tokenizer, 3 + with_bos)


def test_tokenizing_more_rows_than_a_batch_keeps_each_ones_own(tokenizer):
    rows = [(f"r:{i}", {"prompt": f"{i % 7}a", "completion": f" {i} {i % 3}"}) for i in range(2100)]
    found = pf.tokenize(rows, tokenizer)
    for (where, row), example in zip(rows, found, strict=True):
        assert example.where == where and tokenizer.decode(example.tokens[:-1]) == row["prompt"] + row["completion"]
        assert tokenizer.decode([example.tokens[i] for i in sorted(learned_of(example))]) == row["completion"] + "</s>"
