"""Scales of the page's figures: where a value lies on an axis, its ticks, and what is drawn of many values.

A place on an axis is a share of its length, 0 to 1, so that one figure serves a phone and a wide screen.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean

STEPS = (1, 2, 2.5, 5, 10)
LOG_STEPS = ((1,), (1, 3), (1, 2, 5))  # of a power of ten, from few ticks to many
WIDE_RANGE = 8  # a log axis, where the highest value is so many times the lowest
SMOOTHED = 7  # steps in a mean
MOST_DOTS = 300  # of a line plot; more are binned
MARGIN = 0.05  # of the range of the logarithms, below and above the values


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high` with ticks (value, label)."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]] = ()
    log: bool = False

    def at(self, value: float) -> float:
        """Return the value's place, from 0 to 1; what lies beyond the scale is put at its end.

        >>> Scale(0, 4).at(1)
        0.25
        """
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = (math.log(max(value, self.low)) if self.log else value) - low
        return min(1.0, max(0.0, place / (high - low))) if high > low else 0.5

    def beyond(self, value: float) -> bool:
        """Whether the value lies above the scale."""
        return value > self.high * (1 + 1e-9) if self.high > 0 else value > self.high


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the values that are numbers: not None, NaN or infinite."""
    return [value for value in values if value is not None and math.isfinite(value)]


def linear(
    values: Iterable[float | None], *, zero: bool = False, most: int = 5, unit: str = "", signed: bool = False
) -> Scale:
    """Return a scale with round ends around the values, and at most `most` + 1 ticks. `zero`: it begins (or ends) at 0.

    >>> [label for _, label in linear([0.43, 1.6]).ticks]
    ['0', '0.5', '1', '1.5', '2']
    """
    found = finite(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # all alike
        half = abs(high) / 2 or 0.5
        low, high = (low if zero and low == 0 else low - half), high + half
    step = _step((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if last - first > most:
        step = _step(step * 1.01)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = max(0, -math.floor(math.log10(step) + 1e-9)) + (_mantissa(step) == 2.5)
    ticks = [(k * step, tick_label(k * step, places, signed) + unit * (k == last)) for k in range(first, last + 1)]
    return Scale(first * step, last * step, ticks)


def logarithmic(values: Iterable[float | None]) -> Scale:
    """Return a log scale of the values, which are positive, with 3 to 6 ticks where their range allows it."""
    found = [value for value in finite(values) if value > 0] or [1.0, 10.0]
    low, high = min(found), max(found)
    pad = math.exp(MARGIN * (math.log(high) - math.log(low))) if high > low else 2.0
    low, high = max(low / pad, 1e-300), min(high * pad, 1e300)  # beyond, powers of ten are no floats
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    inside: list[float] = []
    for steps in LOG_STEPS:
        inside = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(inside) >= 3:
            break
    inside = inside[:: -(-len(inside) // 6)] if inside else [low, high]
    return Scale(low, high, [(value, f"{value:.3g}") for value in inside], log=True)


def fitting(values: Iterable[float | None]) -> Scale:
    """Return a log scale for positive values that differ much, a linear one from 0 for others."""
    found = finite(values)
    if found and min(found) > 0 and max(found) / min(found) >= WIDE_RANGE:
        return logarithmic(found)
    return linear(found, zero=True)


def counted(last: int, most: int = 6) -> Scale:
    """Return a scale of steps from 0 to the last one, which has a tick where there is room.

    >>> [label for _, label in counted(60).ticks]
    ['0', '10', '20', '30', '40', '50', '60']
    """
    last = max(last, 1)
    ticks = [(x, label) for x, label in linear([0, last], zero=True, most=most).ticks if x <= last and x == int(x)]
    if ticks[-1][0] < last:
        if len(ticks) > 1 and last - ticks[-1][0] < 0.6 * ticks[1][0]:
            ticks.pop()
        ticks.append((last, f"{last:,}"))
    return Scale(0, last, ticks)


def tick_label(value: float, places: int, signed: bool = False) -> str:
    """Return a number for an axis, with a real minus sign and without a negative zero."""
    value = round(value, places)
    text = f"{abs(value):,.{places}f}" if abs(value) < 1e6 else f"{abs(value):.3g}"
    if "." in text and "e" not in text:
        text = text.rstrip("0").rstrip(".")
    return ("−" if value < 0 else "+" if signed and value > 0 else "") + text


def smoothed(values: Sequence[float | None], width: int = SMOOTHED) -> list[float | None]:
    """Return the mean of the `width` values around each; the geometric mean where all are positive. None where there is none.

    >>> smoothed([1.0, 100.0, 1.0], 3)[1]  # the third root of 100
    4.641588833612778
    """
    usable = finite(values)
    mean = geometric_mean if usable and min(usable) > 0 else fmean
    half, found = width // 2, []
    for at in range(len(values)):
        near = finite(values[max(0, at - half) : at + half + 1])
        found.append(mean(near) if near else None)
    return found


def binned(points: Sequence[tuple[float, float]], most: int = MOST_DOTS) -> tuple[list[tuple[float, float]], int]:
    """Return at most `most` points, each the mean of equally many that follow each other, and how many those are."""
    size = max(1, -(-len(points) // most))
    if size == 1:
        return list(points), 1
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    positive = bool(points) and min(y for _, y in points) > 0
    mean = geometric_mean if positive else fmean
    return [(fmean(x for x, _ in group), mean([y for _, y in group])) for group in groups], size


def classes(values: Iterable[float | None], most: int) -> list[float]:
    """Return rising borders that part the values into at most `most` classes of about as many each, in two digits or three."""
    found = sorted(finite(values))
    if not found:
        return []
    for digits in (2, 3):
        cuts = {float(f"{found[len(found) * k // most]:.{digits}g}") for k in range(1, most)}
        cuts = {cut for cut in cuts if found[0] < cut <= found[-1]}
        if len(cuts) >= min(most - 1, 3):
            break
    return sorted(cuts)


def _step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in STEPS if step * power >= least * (1 - 1e-9))


def _mantissa(value: float) -> float:
    return round(value / 10.0 ** math.floor(math.log10(value) + 1e-9), 6)
