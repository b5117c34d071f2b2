"""Intervals against published ones, and against the rows they stand for."""

import math

import pytest
import torch
from helpers import build

from plopfast.data.example import Example
from plopfast.training.evaluate import evaluate, in_words
from plopfast.training.intervals import of_change, of_gain, of_shares, wilson


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_newcombe_gives_it(right, rows, low, high):
    """Method 3 of table I in R. G. Newcombe, Statistics in Medicine 17, 1998."""
    assert wilson(right / rows, rows) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1 - right / rows, rows) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_none_or_all_right_still_has_a_width():
    assert wilson(1.0, 3) == (pytest.approx(0.4385, abs=1e-4), 1.0) and wilson(0.0, 3)[0] == 0.0
    for hits in ([0, 0, 0], [4, 9, 2], [2]):
        low, high = of_shares(hits, [4, 9, 2][: len(hits)])
        assert high - low > 0.5


def test_shares_resample_rows_and_not_tokens():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 40, (200,), generator=generator)
    right = torch.rand(200, generator=generator) < 0.6
    hits = torch.where(right, counts, 0)  # a row is right as a whole
    share = float(hits.sum() / counts.sum())
    low, high = of_shares(hits.tolist(), counts.tolist())
    error = float((hits - share * counts).double().std()) / float(counts.double().mean()) / math.sqrt(200)
    assert (low, high) == pytest.approx((share - 1.96 * error, share + 1.96 * error), abs=0.012)
    by_token = wilson(share, int(counts.sum()))
    assert high - low > 3 * (by_token[1] - by_token[0])
    assert of_shares(hits.tolist(), counts.tolist()) == (low, high), "seeded"
    assert of_shares([*hits.tolist(), 0], [*counts.tolist(), 0]) == (low, high), "no token, no say"


def test_an_evaluation_says_its_interval():
    model = build("llama")
    answered = [Example.after_prompt((5 + i, 6, 7, 2), 2, "x", f"x:{i}", closing=1) for i in range(24)]
    found = evaluate(model, answered)
    assert found.metric == "exact-match"
    assert (found.accuracy_low, found.accuracy_high) == wilson(found.accuracy, 24)
    text = evaluate(model, [Example.after_prompt(range(5 + i, 40 + i), 1, None, f"x:{i}") for i in range(24)])
    assert text.metric == "token" and text.accuracy_low <= text.accuracy <= text.accuracy_high < 0.5
    summary = found.summary()
    assert summary["accuracy_low"] == found.accuracy_low and "rows" not in summary
    bounds = f"95% interval {found.accuracy_low:.4f} to {found.accuracy_high:.4f}"
    parts = f"answers {found.answer_loss:.4f}, their ends {found.end_loss:.4f}"
    assert in_words(summary, "test") == (
        f"loss {found.loss:.4f} ({parts}), accuracy {found.accuracy:.4f} ({bounds}; exact-match, 24 test rows)"
    )
    old = {"loss": 0.5, "accuracy": 1.0, "metric": "choice", "examples": 1}
    assert in_words(old, "held-out") == "loss 0.5000, accuracy 1.0000 (choice, 1 held-out row)"


def test_the_interval_of_a_gain_holds_what_is_true():
    """In nine of ten draws at least, also where hardly a row changes and where all do; 95 in a hundred are aimed at."""
    generator = torch.Generator().manual_seed(0)
    for before, after, same in ((0.5, 0.5, 0.9), (0.5, 0.8, 0.0), (0.95, 0.97, 0.5), (0.1, 0.9, 0.0)):
        held = 0
        for _ in range(300):
            u, v = (torch.rand(60, generator=generator) for _ in range(2))
            v = torch.where(torch.rand(60, generator=generator) < same, u, v)  # alike on some rows
            found = of_gain((u < before).double().tolist(), (v < after).double().tolist())
            held += found.low <= after - before <= found.high
        assert 0.9 * 300 <= held < 300, (before, after, held)


def test_a_gain_is_surer_where_the_same_rows_are_right():
    one, other = [1.0] * 40 + [0.0] * 40, [0.0] * 40 + [1.0] * 40
    alike, apart = of_gain(one, one), of_gain(one, other)
    assert alike.difference == apart.difference == 0
    assert 0 < alike.high - alike.low < 0.5 * (apart.high - apart.low)
    assert of_gain([1, 0, 0], [0, 0, 0]).difference == pytest.approx(-1 / 3)
    up, down = of_gain(one[:50], [1.0] * 50), of_gain([1.0] * 50, one[:50])
    assert (up.low, up.high) == pytest.approx((-down.high, -down.low)) and up.low > 0


def test_nothing_changed_is_not_certain():
    for values in ([1.0] * 20, [0.0] * 20):
        found = of_gain(values, values)
        assert found.difference == 0 and found.low < -0.1 and found.high > 0.1


def test_shares_and_losses_are_resampled():
    generator = torch.Generator().manual_seed(1)
    before = torch.rand(200, generator=generator)
    after = before + 0.1 + 0.05 * torch.randn(200, generator=generator)
    found = of_gain(before.tolist(), after.tolist())
    error = float((after - before).std()) / 200**0.5
    assert found.difference == pytest.approx(float((after - before).mean()), rel=1e-5)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    weights = [2] * 100 + [4] * 100
    change = of_change([1.0] * 100 + [3.0] * 100, weights)
    assert change.difference == pytest.approx(400 / 600) and change.low < change.difference < change.high
