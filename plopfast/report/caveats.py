"""Two warnings that a good result hides: a pick that hangs on a few layers, and a training that ended too early.

Pure functions of numbers; the sections and the head of the page put what they return into sentences.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

MOSTLY = 0.9  # of the steps; more clipped ones mean that the clipping sets the step size, not the learning rate


@dataclass(frozen=True)
class OtherPick:
    """Another summary of the layers than their mean picks other types: `gone` leave, `instead` come."""

    how: str
    gone: list[str]
    instead: list[str]
    values: dict[str, float]  # of those types, by this summary


def other_picks(
    by_type: Mapping[str, Mapping[str, float]], outliers: Collection[str], picked: Sequence[str], highest: bool = False
) -> list[OtherPick]:
    """Compare the types `picked` by their mean over the layers with those that other summaries of the layers pick.

    `by_type`: type -> module -> NFN. The other summaries are the median, and the mean without the `outliers` (a type whose
    modules are all outliers keeps them). Returns the summaries that pick other types; nothing where all types are picked, or
    where `picked` is not what the mean picks (another rule chose them).
    """
    known = {type_: {name: v for name, v in values.items() if math.isfinite(v)} for type_, values in by_type.items()}
    known = {type_: values for type_, values in known.items() if values}
    kept = {type_: {name: v for name, v in values.items() if name not in outliers} for type_, values in known.items()}
    if not 0 < len(picked) < len(known) or not set(picked) <= known.keys():
        return []

    def best(
        summary: Callable[[Sequence[float]], float], values: Mapping[str, Mapping[str, float]]
    ) -> tuple[list[str], dict[str, float]]:
        scores = {type_: summary([*(found or known[type_]).values()]) for type_, found in values.items()}
        return sorted(scores, key=lambda type_: scores[type_], reverse=highest)[: len(picked)], scores

    if set(best(fmean, known)[0]) != set(picked):
        return []
    found = []
    for how, (types, scores) in (
        ("the median over the layers", best(median, known)),
        ("the mean without outlier layers", best(fmean, kept)),
    ):
        gone, instead = [t for t in picked if t not in types], [t for t in types if t not in picked]
        if gone:
            found.append(OtherPick(how, gone, instead, {t: scores[t] for t in (*gone, *instead)}))
    return found


@dataclass(frozen=True)
class EndedEarly:
    """What a training's end leaves open; None or False where it does not, or where it is not known."""

    clipped: float | None = None  # share of the steps
    last_best: bool = False
    seen: float | None = None  # share of the rows

    def __bool__(self) -> bool:
        return bool(self.clipped or self.last_best or self.seen is not None)


def ended_early(
    steps: int,
    *,
    clipped: int | None = None,
    best_step: int | None = None,
    looks: int = 0,
    rows_seen: float | None = None,
    rows: int = 0,
) -> EndedEarly:
    """Say what speaks against a training's end: nearly all steps clipped, the last step the best, or rows left unseen.

    `looks`: how often the validation loss was looked at; with a single look, the last step is the best of one. `rows_seen` may
    be an estimate, so that a hundredth is no less than all of the `rows`.

    >>> ended_early(60, clipped=58, best_step=60, looks=2, rows_seen=455, rows=3430)
    EndedEarly(clipped=0.9666666666666667, last_best=True, seen=0.13265306122448978)
    """
    of_steps = clipped / steps if clipped is not None and steps else 0.0
    of_rows = rows_seen / rows if rows_seen is not None and rows else 1.0
    return EndedEarly(
        clipped=of_steps if of_steps > MOSTLY else None,
        last_best=looks > 1 and bool(steps) and best_step == steps,
        seen=of_rows if of_rows < 0.99 else None,
    )
