"""The two warnings that a good result hides: a pick that hangs on a few layers, a training that ended too early."""

import math

import pytest

from plopfast.report.caveats import EndedEarly, OtherPick, ended_early, other_picks

# as in the demo: five outliers lift o's mean above down's, its median is below
LIFTED = {
    "v": {"0.v": 0.6, "1.v": 0.6, "2.v": 0.6},
    "down": {"0.down": 1.0, "1.down": 1.1, "2.down": 1.2},
    "o": {"0.o": 0.9, "1.o": 0.9, "2.o": 3.0},
}


def test_a_pick_that_the_median_changes():
    median, clean = other_picks(LIFTED, {"2.o"}, ["v", "down"])
    assert (median.how, median.gone, median.instead) == ("the median over the layers", ["down"], ["o"])
    assert median.values == {"down": 1.1, "o": 0.9}
    assert clean == OtherPick(
        "the mean without outlier layers", ["down"], ["o"], {"down": pytest.approx(1.1), "o": 0.9}
    )
    assert [pick.how for pick in other_picks(LIFTED, set(), ["v", "down"])] == ["the median over the layers"], (
        "no outliers"
    )


def test_a_pick_that_only_outliers_change():
    values = {"a": {"a0": 1.0, "a1": 1.3, "a2": 1.9}, "b": {"b0": 1.2, "b1": 1.2}, "c": {"c0": 2.0, "c1": 1.8}}
    assert other_picks(values, set(), ["a"]) == [], "a is not what the mean picks"
    assert other_picks(values, {"c0"}, ["b"]) == [], "the median of a is above b's"
    assert other_picks(values, {"a2"}, ["b"]) == [
        OtherPick("the mean without outlier layers", ["b"], ["a"], {"b": 1.2, "a": pytest.approx(1.15)})
    ]


def test_the_highest_are_compared_with_the_highest():
    assert other_picks(LIFTED, {"2.o"}, ["o"], highest=True) == [
        OtherPick("the median over the layers", ["o"], ["down"], {"o": 0.9, "down": 1.1}),
        OtherPick("the mean without outlier layers", ["o"], ["down"], {"o": 0.9, "down": pytest.approx(1.1)}),
    ]
    assert other_picks(LIFTED, {"2.o"}, ["o"]) == []


@pytest.mark.parametrize(
    "picked", [["v"], ["v", "down", "o"], [], ["x"], ["o"]], ids=["settled", "all", "none", "unknown", "another rule's"]
)
def test_nothing_to_warn_of(picked):
    assert other_picks(LIFTED, {"2.o"}, picked) == []


def test_odd_scores():
    values = {"a": {"a0": math.nan}, "b": {"b0": 1.0, "b1": math.inf}, "c": {"c0": 2.0}}
    assert other_picks(values, {"b0", "c0"}, ["b"]) == [], (
        "what is no number is left out, a type of outliers keeps them"
    )
    assert other_picks({}, set(), []) == []
    values = {"b": {"b0": 1.0, "b1": 1.0, "b2": 9.0}, "c": {"c0": 3.0, "c1": 3.0, "c2": math.nan}}
    assert [pick.instead for pick in other_picks(values, set(), ["c"])] == [["b"]]


def test_how_a_training_ended():
    whole = {"clipped": 58, "best_step": 60, "looks": 2, "rows_seen": 455, "rows": 3430}
    found = ended_early(60, **whole)
    assert found == EndedEarly(58 / 60, True, 455 / 3430) and found
    for change, expected in (
        ({"clipped": 54}, EndedEarly(None, True, 455 / 3430)),  # exactly nine tenths
        ({"clipped": None}, EndedEarly(None, True, 455 / 3430)),
        ({"best_step": 30}, EndedEarly(58 / 60, False, 455 / 3430)),
        ({"looks": 1}, EndedEarly(58 / 60, False, 455 / 3430)),  # the best of one look
        ({"rows_seen": 3430}, EndedEarly(58 / 60, True, None)),
        ({"rows_seen": 3400.0}, EndedEarly(58 / 60, True, None)),  # an estimate, a hundredth below
        ({"rows_seen": 9000}, EndedEarly(58 / 60, True, None)),
        ({"rows_seen": None}, EndedEarly(58 / 60, True, None)),
        ({"rows": 0}, EndedEarly(58 / 60, True, None)),
    ):
        assert ended_early(60, **whole | change) == expected, change
    assert not ended_early(60) and not ended_early(0, clipped=0, best_step=0, looks=2)
