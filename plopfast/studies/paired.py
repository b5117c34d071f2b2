"""Which placements of a trial differ: paired comparisons over the same test rows and seeds.

`right` [arms, seeds, rows] float64 says how right each run was on each row (0 or 1, or a share). An arm is a placement. A
difference between two arms is uncertain for two reasons, and each of the 10,000 resamples draws both:

- Other rows: a paired bootstrap (Efron and Tibshirani 1993). Both arms and all seeds get the same rows.
- Other seeds: an arm's mean over the rows differs from seed to seed. Three seeds are too few to resample: where seeds
  matter, that finds a difference in up to a third of the trials that have none (even with S - 1 of S seeds at a time, Rao
  and Wu 1988), because a resample can hardly change the sign. So this part is drawn from Student's t. Its variance is
  estimated from all arms together, which assumes that they vary alike: (arms - 1)(seeds - 1) degrees of freedom. Where
  they don't, more than 5 % of the trials without a difference claim one: 7 % where only the reference varies, three times
  as much as four other arms, and 13 % at ten times as much (three seeds, 200 rows). Each pair's own variance would keep
  the level, but find a third as many differences.

Noise that belongs neither to rows nor to seeds counts in both, so the test errs on the careful side. Holm's procedure
(1979) corrects for the number of comparisons. tests/studies/test_paired.py simulates the errors.

Why not scipy: `scipy.stats.bootstrap` resamples rows alone, without the seeds' part, and scipy has no Holm. It would only
replace the approximate t quantiles of `scoring.stopping.student_t`, which is not worth a dependency of 100 MB.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

RESAMPLES = 10_000
CHUNK = 1000  # resamples at a time: their row counts take 8 CHUNK rows bytes


@dataclass(frozen=True)
class Versus:
    """An arm compared with the first one.

    `difference` in accuracy, and its percentile interval `low` to `high`, which is not corrected. `p` is two-sided;
    `p_corrected` is Holm's over all comparisons and decides the `verdict`.
    """

    difference: float
    low: float
    high: float
    p: float
    p_corrected: float
    verdict: str


class Interval(NamedTuple):
    """A mean accuracy, and its percentile interval `low` to `high`."""

    mean: float
    low: float
    high: float


def compare(right: torch.Tensor, confidence: float = 0.95, seed: int = 0, resamples: int = RESAMPLES) -> list[Versus]:
    """Compare each further arm with the first.

    `right` [arms, seeds, rows]: at least two arms, two seeds and one row. The verdict is "better" or "worse" where the
    corrected p is below 1 - confidence, else "no difference shown".
    """
    means_AS = right.mean(2)
    gaps_AS = means_AS - means_AS.mean(1, keepdim=True)
    gaps_AS = gaps_AS - gaps_AS.mean(0)  # all arms share a seed's data order and its effect
    arms, seeds = means_AS.shape
    freedom = (arms - 1) * (seeds - 1)
    error = math.sqrt(2 * float(gaps_AS.square().sum()) / freedom / seeds)  # of the difference of two arms' means
    difference_CN = (right[1:] - right[:1]).mean(1)
    drawn_CB = _drawn(difference_CN, error, freedom, seed, resamples)
    below, above = (drawn_CB <= 0).sum(1), (drawn_CB >= 0).sum(1)
    p = [min(1.0, 2 * (1 + int(n)) / (1 + resamples)) for n in torch.minimum(below, above)]
    return [
        Versus(*interval, p_one, corrected, _verdict(interval.mean, corrected, confidence))
        for interval, p_one, corrected in zip(_intervals(difference_CN, drawn_CB, confidence), p, holm(p), strict=True)
    ]


def _verdict(difference: float, p_corrected: float, confidence: float) -> str:
    if p_corrected >= 1 - confidence:
        return "no difference shown"
    return "better" if difference > 0 else "worse"


def accuracies(
    right: torch.Tensor, confidence: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval]:
    """Return each arm's accuracy, by the same resampling. The variance between seeds is estimated from all arms together."""
    means_AS = right.mean(2)
    arms, seeds = means_AS.shape
    freedom = arms * (seeds - 1)
    error = math.sqrt(float(means_AS.var(1).mean()) / seeds)
    drawn_AB = _drawn(right.mean(1), error, freedom, seed, resamples).clamp(0, 1)
    return _intervals(means_AS, drawn_AB, confidence)


def holm(p: list[float]) -> list[float]:
    """Return Holm's corrected p-values: the smallest times their number, the next times one less, and so on, never falling."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, p[index] * (len(p) - rank)))
        corrected[index] = highest
    return corrected


def resampled(rows: int, resamples: int, generator: torch.Generator) -> torch.Tensor:
    """How often each row is in each bootstrap resample: [resamples, rows] float64, whose rows sum to `rows`."""
    draws = torch.randint(rows, (resamples, rows), generator=generator)
    return torch.zeros(resamples, rows, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())


def _drawn(x_CN: torch.Tensor, error: float, freedom: int, seed: int, resamples: int) -> torch.Tensor:
    """Resample means over the rows [comparisons, resamples], each moved by `error` times a draw of Student's t."""
    generator = torch.Generator().manual_seed(seed)
    rows, parts = x_CN.shape[1], []
    for begin in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - begin)
        times_BN = resampled(rows, size, generator)
        normal_B, *others = torch.randn(1 + freedom, size, generator=generator, dtype=torch.float64)
        t_B = normal_B / torch.stack(others).square().mean(0).sqrt()
        parts.append(x_CN @ times_BN.T / rows + error * t_B)
    return torch.cat(parts, 1)


def _intervals(x_CN: torch.Tensor, drawn_CB: torch.Tensor, confidence: float) -> list[Interval]:
    """Return the mean of each row of `x_CN`, and the percentile interval of its resampled means."""
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    bounds = drawn_CB.quantile(tails, dim=1).T.tolist()
    return [Interval(mean, low, high) for mean, (low, high) in zip(x_CN.mean(1).tolist(), bounds, strict=True)]
