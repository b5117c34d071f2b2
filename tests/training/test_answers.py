"""Evaluating is what its words say: right rows, right tokens and likeliest choices are found again from the logits."""

import pytest
import torch
from helpers import build
from plain_training import losses_of, rows_of

from plopfast.data.example import Example
from plopfast.training.evaluate import choices_of, evaluate
from plopfast.training.intervals import of_shares, wilson


def greedy(model, rows):
    """For each row, whether each of its label tokens is the likeliest."""
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.tokens])
            best = model(input_ids=ids).logits[0].argmax(-1)
            found.append([int(best[at - 1]) == row.tokens[at] for at in range(row.start, len(row.tokens))])
    return found


def partly_right(model):
    """Rows whose answers are all, partly and not at all what the model says."""
    rows = []
    for number, wrong in enumerate(((), (0,), (2,), (0, 1, 2), (), (1,))):
        tokens = [1, 5 + number, 40 + number]
        for at in range(3):
            with torch.no_grad():
                best = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(best if at not in wrong else (best + 7) % 300)
        rows.append(Example.after_prompt(tokens, 3, "x", f"rows:{number}"))
    return rows


def test_a_row_is_right_where_all_of_it_is():
    model = build("llama")
    rows = partly_right(model)
    expected = greedy(model, rows)
    assert len({tuple(row) for row in expected}) > 3
    found = evaluate(model, rows, batch_tokens=20)
    assert found.metric == "exact-match" and found.right == [float(all(row)) for row in expected]
    assert found.accuracy == sum(map(all, expected)) / len(rows)
    assert (found.accuracy_low, found.accuracy_high) == wilson(found.accuracy, len(rows))
    total, count = losses_of(model, rows)
    assert found.loss == pytest.approx(float(total) / count, rel=1e-5) and found.tokens == count == 18


def test_tokens_of_plain_text():
    model = build("llama")
    rows = [
        Example.after_prompt(row.tokens[: len(row.tokens) - number % 3], 1)
        for number, row in enumerate(partly_right(model))
    ]
    expected = greedy(model, rows)
    found = evaluate(model, rows, batch_tokens=20)
    assert found.metric == "token" and found.accuracy == pytest.approx(
        sum(map(sum, expected)) / sum(map(len, expected))
    )
    assert sum(found.right) / len(rows) == pytest.approx(found.accuracy)
    hits, counts = [sum(row) for row in expected], [len(row) for row in expected]
    assert (found.accuracy_low, found.accuracy_high) == of_shares(hits, counts)


def test_of_several_parts_the_last_one_counts():
    model = build("llama")
    tokens = partly_right(model)[1].tokens
    best = greedy(model, [Example.after_prompt(tokens, 1)])[0]
    rows = [Example(tokens, ((1, 3), (3, 6)), None, None, ""), Example(tokens, ((1, 4), (4, 6)), None, None, "")]
    found = evaluate(model, rows)
    assert found.accuracy == pytest.approx((sum(best[2:]) + sum(best[3:])) / 5) != sum(best[:2]) / 2


@pytest.mark.parametrize("learned", [((1, 6),), ((2, 6),), ((1, 2), (3, 6)), ((1, 2), (2, 6)), ((1, 3), (3, 6))])
def test_what_is_learned_before_the_answer_is_no_part_of_it(learned):
    """Also where it touches the answer, as with every word of a row learned."""
    model = build("llama")
    rows = [Example(row.tokens, learned, (3, 6), "x", row.where) for row in partly_right(model)]
    expected = [all(best) for best in greedy(model, rows)]
    assert 0 < sum(expected) < len(rows) and evaluate(model, rows).right == [float(right) for right in expected]


@pytest.mark.parametrize("answers", [[(7,), (9,), (11,)], [(7, 8), (7, 9), (10, 11, 12)]], ids=str)
def test_the_likeliest_choice(answers):
    model = build("llama")
    rows = [
        Example.after_prompt((1, 20 + number, *answers[number % 3], 2), 2, str(number % 3), closing=1)
        for number in range(12)
    ]
    assert sorted(choices_of(rows)) == sorted(map(list, answers))
    right = []
    for row in rows:
        scores = []
        for answer in answers:
            ids = torch.tensor([(*row.tokens[:2], *answer)])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logprobs[1 + at, token]) for at, token in enumerate(answer)))
        right.append(float(scores.index(max(scores)) == int(row.completion)))
    assert 0 < sum(right) < len(rows)
    assert evaluate(model, rows, choices=choices_of(rows), batch_tokens=20).right == right


def test_evaluating_keeps_nothing_for_gradients():
    model, seen = build("llama").requires_grad_(True), []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    evaluate(model, rows_of(4))
    assert seen and not any(seen)


def test_the_bootstraps_seed():
    hits, counts = [1, 2, 0, 3, 1], [2, 4, 1, 3, 5]
    assert of_shares(hits, counts, seed=1) == of_shares(hits, counts, seed=1) != of_shares(hits, counts, seed=2)
