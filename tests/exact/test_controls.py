"""Controls of a score, token by token and word by word: what changes, what stays, and by what chance."""

import copy
import math
import random
import re
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch
from helpers import build
from oracle import learned_of
from tokenizers import AddedToken

from plopfast.data.example import Example
from plopfast.studies.controls import random_model, random_tokens, shuffled_words

SPECIAL = {0, 1, 2}


def random_rows(rng, tokenizer, count=12, plain=False):
    """Rows of random ordinary and special tokens, of several learned parts, or plain text; roles at some."""
    rows = []
    for number in range(count):
        words = " ".join(
            rng.choice(("a cat", "the dog", "an animal", "is", "of the")) for _ in range(rng.randint(2, 6))
        )
        tokens = [1] * (number % 3 > 0) + tokenizer(words, add_special_tokens=False)["input_ids"]
        for _ in range(rng.randint(0, 2)):
            tokens.insert(rng.randint(1, len(tokens)), 2)
        size = len(tokens)
        borders = sorted(rng.sample(range(1, size + 1), 4))
        learned = ((1, size),) if plain else ((borders[0], borders[1]), (borders[2], borders[3]))
        at = rng.randint(0, size)
        roles = tuple("user" if i < at else "assistant" for i in range(size)) if number % 2 else None
        rows.append(Example(tuple(tokens), learned, None if plain else learned[-1], None, f"row {number}", roles))
    return rows


def test_random_tokens_one_by_one(tokenizer):
    rng, ordinary = random.Random(0), set(range(300)) - SPECIAL
    rows = random_rows(rng, tokenizer, 200)
    found = random_tokens(rows, tokenizer, seed=3)
    drawn = []
    for row, new in zip(rows, found, strict=True):
        assert replace(new, tokens=row.tokens) == row, "nothing else changes"
        for old, token in zip(row.tokens, new.tokens, strict=True):
            assert token == old if old in SPECIAL else token in ordinary
            drawn += [] if old in SPECIAL else [token]
    counts = np.bincount(drawn, minlength=300)[3:]
    chi = float(((counts - len(drawn) / 297) ** 2).sum() / (len(drawn) / 297))
    assert abs(chi - 296) < 5 * math.sqrt(2 * 296), "uniform, neither more nor less even than chance"
    same = [rows[0]] * 20
    assert len({row.tokens for row in random_tokens(same, tokenizer)}) == 20, "each row is drawn anew"
    assert random_tokens(rows, tokenizer, seed=3) == found != random_tokens(rows, tokenizer, seed=4)


def test_added_tokens_are_special_only_where_they_say_so(tokenizer):
    """Reserved special tokens, which no setting of the tokenizer names, stay; added words are words."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("<the reserved one>", special=True)], special_tokens=True)
    tokenizer.add_tokens(["zebra"])
    reserved, word = tokenizer.convert_tokens_to_ids(["<the reserved one>", "zebra"])
    assert reserved not in tokenizer.all_special_ids and tokenizer.added_tokens_decoder[reserved].special
    row = Example((1, *[reserved, word] * 4000), ((1, 8001),), None, None, "x")
    (found,) = random_tokens([row], tokenizer)
    assert set(found.tokens[1::2]) == {reserved} and reserved not in found.tokens[2::2]
    assert word in found.tokens[2::2] and found.tokens[2::2].count(word) < 60, "it is replaced, and drawn"
    mixed = Example(
        (1, word, reserved, *tokenizer(" a b c d e f", add_special_tokens=False)["input_ids"]),
        ((1, 4),),
        None,
        None,
        "x",
    )
    for seed in range(5):
        (moved,) = shuffled_words([mixed], tokenizer, seed=seed)
        assert moved.tokens[:3] == (1, word, reserved)


def parts_of(row):
    """(kind, tokens) of the parts that words must stay in: learned or not, the role, special or not."""
    learned = learned_of(row) | ({0} if not row.has_prompt else set())
    marks = [(i in learned, row.roles[i] if row.roles else "", token in SPECIAL) for i, token in enumerate(row.tokens)]
    for kind, group in groupby(zip(marks, row.tokens, strict=True), lambda pair: pair[0]):
        yield kind, [token for _, token in group]


@pytest.mark.parametrize("plain", [False, True])
def test_words_stay_in_their_parts(tokenizer, plain):
    rows, moved = random_rows(random.Random(1), tokenizer, 60, plain), 0
    found = shuffled_words(rows, tokenizer, seed=2)
    for row, new in zip(rows, found, strict=True):
        old_parts, new_parts = list(parts_of(row)), list(parts_of(new))
        # a part that had a single token can join its neighbour of the same kind only, so the kinds are the same
        assert [kind for kind, _ in old_parts] == [kind for kind, _ in new_parts]
        for (kind, one), (_, other) in zip(old_parts, new_parts, strict=True):
            before, after = tokenizer.decode(one), tokenizer.decode(other)
            if kind[2]:
                assert one == other, "special tokens stay"
            assert sorted(before.split()) == sorted(after.split())
            assert re.findall(r"\s+", before) == re.findall(r"\s+", after), "white space stays in place"
            assert bool(re.match(r"\s", before)) == bool(re.match(r"\s", after))
            moved += before != after
        assert (new.where, new.roles is None) == (row.where, row.roles is None)
        assert len(new.roles or new.tokens) == len(new.tokens)
        assert all(one[1] < other[0] for one, other in zip(new.learned, new.learned[1:], strict=False))
    assert moved > 30
    assert found == shuffled_words(rows, tokenizer, seed=2) != shuffled_words(rows, tokenizer, seed=3)
    for limit in (1, 3, 6):
        cut = shuffled_words(rows, tokenizer, seed=2, max_length=limit)
        assert cut == [row.truncated(limit) for row in found]


def test_orders_of_words_are_equally_likely(tokenizer):
    text = tokenizer(" a b c", add_special_tokens=False)["input_ids"]
    row = Example(tuple(text), ((1, len(text)),), None, None, "x")  # the first token has no label, but is of the text
    orders = [tokenizer.decode(new.tokens) for new in shuffled_words([row] * 600, tokenizer)]
    counts = {order: orders.count(order) for order in orders}
    assert len(counts) == 6 and all(abs(count - 100) < 5 * math.sqrt(600 * 5 / 36) for count in counts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_model_is_another_of_the_same_kind(dtype):
    model = build("qwen2").to(dtype).train()
    state = torch.get_rng_state()
    one, again, other = random_model(model, 5), random_model(model, 5), random_model(model, 6)
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is as before"
    assert type(one) is type(model) and one.config is not model.config and not one.training and model.training
    ours = dict(model.named_parameters())
    for (name, a), b, c in zip(one.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert a.dtype == dtype and a.shape == ours[name].shape and torch.equal(a, b)
        if a.dim() > 1:
            assert not torch.equal(a, c) and not torch.equal(a, ours[name])
