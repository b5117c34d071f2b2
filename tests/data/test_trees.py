"""Rows that branch: every path is found again in its row, and nothing is held twice."""

import random

import pytest
import torch

from plopfast.data import trees as module
from plopfast.data.trees import Question, chains, grouped, inputs_of_rows, padded_size, trees


def question(prompt, *tails):
    """All tokens of each path but the first are read, and the one after it."""
    paths = [(*prompt, *tail, 99) for tail in tails]
    return Question(tuple(prompt), tuple(tails), tuple(tuple(enumerate(path[1:])) for path in paths))


def random_questions(seed, count=30):
    rng = random.Random(seed)
    draw = lambda most: tuple(rng.choice((5, 6)) for _ in range(rng.randint(0, most)))  # noqa: E731
    return [question((1, *draw(9)), *(draw(4) for _ in range(rng.randint(1, 4)))) for _ in range(count)]


def path_to(row, node):
    parents = row.parents or range(-1, len(row.tokens) - 1)
    tokens = []
    while node >= 0:
        tokens.append(row.tokens[node])
        node = parents[node]
    return tuple(reversed(tokens))


def test_the_example():
    (row,) = trees([question((5, 6), (7, 8), (7, 9))])
    assert (row.tokens, row.parents) == ([5, 6, 7, 8, 9], [-1, 0, 1, 2, 2])
    inputs = inputs_of_rows([row], torch.float32)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]] and inputs["position_ids"].tolist() == [[0, 1, 2, 3, 3]]
    sees = (inputs["attention_mask"][0, 0] == 0).int().tolist()
    assert sees == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    assert inputs["attention_mask"].min() == torch.finfo(torch.float32).min


@pytest.mark.parametrize("make", [trees, chains])
@pytest.mark.parametrize("seed", range(4))
def test_every_path_is_asked_once_and_found_again(make, seed, monkeypatch):
    monkeypatch.setattr(module, "WIDTH", 12)
    questions = random_questions(seed)
    asked = []
    for row in make(questions):
        for number, path, nodes in row.asked:
            asked.append((number, path))
            whole = questions[number].prompt + questions[number].tails[path]
            assert [path_to(row, node) for node in nodes] == [whole[: end + 1] for end in range(len(whole))]
    assert sorted(asked) == [(n, path) for n, q in enumerate(questions) for path in range(len(q.tails))]


def test_a_tree_holds_no_prefix_twice():
    for row in trees(random_questions(7)):
        paths = [path_to(row, node) for node in range(len(row.tokens))]
        assert len(set(paths)) == len(paths)


def test_a_path_that_begins_another_is_run_with_it():
    rows = chains([question((1, 2), (3,), (3, 4), (), (5,), (3,))])
    assert sorted(row.tokens for row in rows) == [(1, 2, 3, 4), (1, 2, 5)]


def test_alike_questions_become_neighbours_and_rows_end(monkeypatch):
    monkeypatch.setattr(module, "WIDTH", 12)
    alike = [question((1, 5, 5, 5, 5, 5), (n,)) for n in range(10, 22)]
    other = [question((1, n), (7,)) for n in range(6, 9)]
    rows = trees([q for pair in zip(alike, other * 4, strict=True) for q in pair])
    widths = [len(row.tokens) for row in rows]
    assert max(widths) == 14, "twice the first question, where that is more than the width"
    firsts = [{number % 2 for number, _, _ in row.asked} for row in rows]
    assert firsts[0] == {0}, "the twelve alike ones are not split up"


def test_wide_rows_end_too(monkeypatch):
    monkeypatch.setattr(module, "WIDTH", 4)
    monkeypatch.setattr(module, "WIDEST", 9)
    long, longer = ([question((1, *[5] * stem, n), (7,)) for n in range(10, 20)] for stem in (4, 12))
    assert max(len(row.tokens) for row in trees(long)) == 9
    assert [len(row.tokens) for row in trees(longer)] == [15] * 10, "as long as its one question"


def test_rows_without_branches_need_no_mask():
    rows = trees([question((1, 2), (3, 4))])
    assert rows[0].parents is None and inputs_of_rows(rows, torch.float32).keys() == {"input_ids"}


def test_a_chain_beside_a_tree():
    rows = [*chains([question((1, 2), (3,))]), *trees([question((5,), (6, 7), (8, 9))])]
    inputs = inputs_of_rows(rows, torch.bfloat16)
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 0, 0], [5, 6, 7, 8, 9]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 1, 2]]
    sees = inputs["attention_mask"][:, 0] == 0
    assert sees[0].int().tolist()[:3] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert sees.any(-1).all(), "padding sees itself, so that no softmax is empty"


def test_sizes_count_padding():
    rows = chains([question((1,), (2,) * n) for n in (1, 3, 4)])
    assert padded_size(grouped(rows, 10)) == 2 * 4 + 5
