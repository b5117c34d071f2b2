"""How the report puts lists, ranges and differences into words."""

from collections.abc import Sequence
from typing import Any

from ..scoring.stopping import Decision
from ..support.tables import UNKNOWN


def listed(words: Sequence[str]) -> str:
    """Return "a, b and c", and "all weights" for none."""
    if len(words) < 2:
        return words[0] if words else "all weights"
    return f"{', '.join(words[:-1])} and {words[-1]}"


def range_of(values: Sequence[int]) -> str:
    """Return "8", or "4 to 8"."""
    if not values:
        return UNKNOWN
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def points_of(versus: dict[str, Any]) -> str:
    """Return a difference in accuracy and its interval, in points."""
    difference, low, high = (100 * versus[key] for key in ("difference", "low", "high"))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def interval_of(metrics: dict[str, Any], spec: str) -> str:
    """Return the interval of an accuracy, "0.61 to 0.72"; nothing where an older file has none."""
    bounds = [metrics.get(key) for key in ("accuracy_low", "accuracy_high")]
    return "" if None in bounds else " to ".join(format(bound, spec) for bound in bounds)


def ties_of(decision: Decision, limit: int = 3) -> str:
    """Name the first near-ties of a decision."""
    pairs = [f"{chosen} from {other}" for chosen, other in decision.near_ties]
    return listed(pairs[:limit]) + (f" (and {len(pairs) - limit} more pairs)" if len(pairs) > limit else "")
