"""Rows cut to a limit, text cut into rows, and what is said of them, against slow, plain accounts; at every limit."""

import bisect
import copy
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from oracle import BOS, examples, learned_of, random_example
from tokenizers import processors

import plopfast as pf
from plopfast.data.describe import BINS, DataFacts, facts_of
from plopfast.data.example import Example
from plopfast.data.lengths import Limit, merged
from plopfast.data.notices import Notices
from plopfast.data.text import read_text
from plopfast.support.errors import DataError


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


def test_bars_show_every_row(tokenizer):
    """A bin with one row of thousands has a bar, an empty one none, and the fullest is the highest."""
    many = [Example((1, *range(3, 3 + n)), ((1, 1 + n),), None, None, "x") for n in [1] * 900 + [40] * 90 + [80]]
    facts = facts_of("train", many, tokenizer)
    (line,) = DataFacts([facts, replace(facts, split="t")], []).picture().splitlines()[:1]
    bars = line.split(" 0 ", 1)[1][: len(facts.histogram)]
    heights = [" ▁▂▃▄▅▆▇█".index(bar) for bar in bars]
    for height, (_, count) in zip(heights, facts.histogram, strict=True):
        assert (height > 0) == (count > 0) and (height == 8) == (count == 900)
    assert facts.histogram[-1][1] == 1


@pytest.mark.parametrize("learn", ["assistant", "last", "all"])
def test_a_description_is_of_what_is_learned(tokenizer, learn):
    rows = [(f"x:{i}", {"prompt": "a b" * i, "completion": " c"}) for i in range(1, 9)]
    (facts,) = pf.describe_data({"train": rows}, tokenizer, learn=learn).splits
    found = pf.tokenize(rows, tokenizer, learn=learn)
    assert facts.learned == sum(len(learned_of(row)) for row in found) and facts.tokens == sum(
        len(r.tokens) for r in found
    )
    limit = sorted(len(row.tokens) for row in found)[4]
    (cut,) = pf.describe_data({"train": rows}, tokenizer, limit, learn=learn, long="skip").splits
    assert (cut.rows, cut.longest) == (5, limit)


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
@pytest.mark.parametrize("paragraphs, length", [(1, 5), (12, 8), (40, 16), (40, 17), (3, 500), (6000, 40)])
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
