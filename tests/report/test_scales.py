"""Scales: ticks, places, smoothing, bins and classes."""

import math

import pytest

from plopfast.report.scales import (
    Scale,
    binned,
    classes,
    counted,
    finite,
    fitting,
    linear,
    logarithmic,
    smoothed,
    tick_label,
)


@pytest.mark.parametrize(
    ("values", "options", "labels"),
    [
        ([0, 100], {"unit": "%", "most": 4}, ["0", "25", "50", "75", "100%"]),
        ([0.43, 1.79], {"most": 8}, ["0.4", "0.6", "0.8", "1", "1.2", "1.4", "1.6", "1.8"]),
        ([-2.2, 6.5], {"most": 4, "signed": True}, ["−2.5", "0", "+2.5", "+5", "+7.5"]),
        ([2.96, 4.27], {"zero": True, "most": 4}, ["0", "2", "4", "6"]),
        ([0, 18342], {}, ["0", "5,000", "10,000", "15,000", "20,000"]),
        ([0.0002, 0.0011], {"zero": True}, ["0", "0.00025", "0.0005", "0.00075", "0.001", "0.00125"]),
        ([-3, -1], {"zero": True}, ["−3", "−2", "−1", "0"]),
    ],
)
def test_linear_ticks(values, options, labels):
    scale = linear(values, **options)
    assert [label for _, label in scale.ticks] == labels
    assert scale.low <= min(values) and max(values) <= scale.high
    assert scale.at(scale.ticks[0][0]) == 0 and scale.at(scale.ticks[-1][0]) == 1


@pytest.mark.parametrize(
    "values", [[], [5.0], [0.0], [0.0, 0.0], [-1.0], [math.nan], [None], [1e-300], [1e300], [7, math.inf]]
)
@pytest.mark.parametrize("make", [linear, logarithmic, fitting, lambda values: linear(values, zero=True)])
def test_every_scale_has_a_range(values, make):
    scale = make(values)
    assert math.isfinite(scale.low) and scale.low < scale.high and 1 <= len(scale.ticks) <= 9
    assert all(0 <= scale.at(value) <= 1 for value in finite(values))


def test_log_ticks():
    assert [label for _, label in logarithmic([0.01, 12.9]).ticks] == ["0.01", "0.1", "1", "10"]
    assert [label for _, label in logarithmic([0.2, 12]).ticks] == ["0.3", "1", "3", "10"]
    assert 3 <= len(logarithmic([1e-9, 1e9]).ticks) <= 6
    assert 3 <= len(logarithmic([1e-320, 1e308]).ticks) <= 6 and logarithmic([5e-324]).low > 0
    scale = logarithmic([0.1, 10])
    assert scale.log and scale.at(1) == pytest.approx(0.5) and scale.at(0) == 0
    assert fitting([1, 9]).log and not fitting([1, 7]).log and not fitting([0, 9]).log and not fitting([-1, 9]).log


def test_what_lies_beyond():
    scale = Scale(0, 2)
    assert (scale.at(3), scale.at(-1), scale.at(0.5)) == (1, 0, 0.25)
    assert scale.beyond(2.1) and not scale.beyond(2.0) and not scale.beyond(-1)
    assert Scale(1, 1).at(1) == 0.5


def test_steps():
    assert [label for _, label in counted(60, 3).ticks] == ["0", "20", "40", "60"]
    assert [label for _, label in counted(7).ticks][-1] == "7" and [label for _, label in counted(1).ticks] == [
        "0",
        "1",
    ]
    assert [label for _, label in counted(1234).ticks] == ["0", "250", "500", "750", "1,000", "1,234"]
    assert counted(0).high == 1


def test_smoothing_is_the_geometric_mean_of_seven():
    values = [2.0**k for k in range(11)]
    found = smoothed(values)
    assert found[5] == pytest.approx(2.0**5) and found[3] == pytest.approx(2.0**3), "3 on each side"
    assert found[0] == pytest.approx(2.0**1.5) and found[10] == pytest.approx(2.0**8.5), "fewer at the ends"
    assert smoothed([1.0, 100.0, 1.0], 3)[1] == pytest.approx(100 ** (1 / 3))
    assert smoothed([1.0, 0.0, 2.0], 3) == [0.5, 1.0, 1.0], "with a 0, the plain mean"
    assert smoothed([None, math.nan, None]) == [None] * 3 and smoothed([]) == []
    assert smoothed([None, 4.0], 3) == [4.0, 4.0]


def test_bins():
    points = [(float(x), 1.0 if x % 2 else 100.0) for x in range(1000)]
    found, size = binned(points, 300)
    assert size == 4 and len(found) == 250 and found[0] == (1.5, pytest.approx(10.0))
    assert binned(points[:300], 300) == (points[:300], 1) and binned([]) == ([], 1)
    assert binned([(0.0, 0.0), (1.0, 3.0)], 1)[0] == [(0.5, 1.5)]


def test_classes():
    found = classes([k / 100 for k in range(50, 200)], 7)
    assert len(found) == 6 and found == sorted(found) and found[0] > 0.5 and found[-1] < 2
    assert classes([1.0, 1.0], 7) == [] and classes([], 7) == [] and classes([1.0, 2.0], 7) == [2.0]


def test_labels():
    assert [tick_label(value, 2) for value in (-0.001, 0.5, -2, 1234.5)] == ["0", "0.5", "−2", "1,234.5"]
    assert tick_label(4, 0, signed=True) == "+4" and tick_label(0, 0, signed=True) == "0"
