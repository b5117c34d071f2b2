"""A sweep goes on beyond its edge, and only there."""

import math

import pytest

from plopfast.studies.sweep import FURTHER, Sweep


def swept(given, loss):
    """The rates in the order in which they are tried, and the best; `loss` None: does not train."""
    sweep = Sweep(given)
    while wanted := sweep.wanted():
        for lr in wanted:
            sweep.tried[lr] = {"valid_loss": loss(lr)}
    return [*sweep.tried], sweep.best(), sweep.edge()


def bowl(best):
    return lambda lr: math.log(lr / best) ** 2


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (2e-3, [1e-3, 2e-3, 4e-3]),
        (8e-3, [1e-3, 2e-3, 4e-3, 8e-3, 0.016]),
        (2.5e-4, [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4, 1.25e-4]),
    ],
)
def test_the_best_has_neighbours_on_both_sides(best, expected):
    assert swept([1e-3, 2e-3, 4e-3], bowl(best)) == (expected, best, "")


def test_it_ends_where_the_edge_runs_away():
    tried, best, edge = swept([1e-3, 2e-3], lambda lr: -lr)
    assert len(tried) == 2 + FURTHER and best == max(tried) == 0.032 and edge == "highest"
    tried, best, edge = swept([1e-3, 2e-3], lambda lr: lr)
    assert len(tried) == 2 + FURTHER and best == min(tried) and edge == "lowest"


def test_one_rate_is_taken_as_it_is():
    assert swept([1e-3], bowl(1.0)) == ([1e-3], 1e-3, "")


def test_a_rate_that_does_not_train_is_an_edge_that_was_passed():
    tried, best, edge = swept([1e-3, 2e-3, 4e-3], lambda lr: None if lr > 2e-3 else -lr)
    assert (tried, best, edge) == ([1e-3, 2e-3, 4e-3], 2e-3, "")
    assert swept([1.0, 2.0], lambda lr: None) == ([1.0, 2.0], None, "")


def test_rates_far_apart_are_followed_tenfold():
    assert swept([1e30, 1e-3], lambda lr: None if lr > 1 else bowl(1e-4)(lr)) == ([1e30, 1e-3, 1e-4, 1e-5], 1e-4, "")


def test_rates_are_named_as_their_folders_are():
    tried, *_ = swept([3e-4, 1e-3], bowl(1e-2))
    assert all(float(f"{lr:g}") == lr for lr in tried) and tried[2] == 0.00333333
