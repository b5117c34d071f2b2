"""Which of some values are outliers: layers whose NFN is far from their type's."""

from collections.abc import Sequence
from statistics import median

OUTLIER = 3.5  # a value with a larger robust z is an outlier (Iglewicz and Hoaglin 1993)


def robust_z(values: Sequence[float]) -> list[float]:
    """Returns each value's distance from the median, in robust standard deviations.

    One is 1.4826 times the median absolute deviation. Where that is 0, so is the distance.
    """
    middle = median(values)
    spread = 1.4826 * median(abs(value - middle) for value in values)
    return [(value - middle) / spread if spread else 0.0 for value in values]
