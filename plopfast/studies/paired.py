"""Which arms of a trial differ: paired comparisons over the same test rows and seeds.

`right` [arms, seeds, rows] float64: how right each run was on each row (0 or 1, or shares). A difference of two arms is
uncertain for two reasons, and each of the 10,000 resamples draws both:

- other rows: a paired bootstrap (Efron and Tibshirani 1993), the same rows for both arms and all seeds;
- other seeds: the arms' means over the rows differ from seed to seed. Three seeds are too few to be resampled: where they
  matter, doing so finds a difference in up to a third of the trials that have none (even S - 1 of S at a time, Rao and Wu
  1988), as a resample can hardly have another sign. So their part is drawn from Student's t instead, its variance
  estimated from all arms together, which are taken to vary alike: (arms - 1)(seeds - 1) degrees of freedom. Where they
  do not, more than 5 % of the trials without a difference claim one: 7 % where the reference alone varies three times as
  much as four other arms, 13 % ten times as much (three seeds, 200 rows). Each pair's own variance would keep the level
  and find a third as many differences.

The part of the noise that belongs to neither rows nor seeds counts in both, so that the test errs on the careful side.
Corrected for the number of comparisons by Holm's procedure (1979). tests/test_paired.py simulates its errors.
"""

import math
from dataclasses import dataclass

import torch

RESAMPLES = 10_000
CHUNK = 1000  # resamples at a time: their row counts take 8 CHUNK rows bytes


@dataclass(frozen=True)
class Versus:
    """An arm against the first one. `low` to `high`: percentile interval of the difference in accuracy, not corrected;
    `p` two-sided, `p_corrected` by Holm over all comparisons, on which the `verdict` rests."""

    difference: float
    low: float
    high: float
    p: float
    p_corrected: float
    verdict: str


def compare(right: torch.Tensor, confidence: float = 0.95, seed: int = 0, resamples: int = RESAMPLES) -> list[Versus]:
    """Each further arm against the first. The verdict is "better" or "worse" where the corrected p is below 1 - confidence,
    else "no difference shown". `right` [arms, seeds, rows]: two seeds and one row at least."""
    means_AS = right.mean(2)
    gaps_AS = means_AS - means_AS.mean(1, keepdim=True)
    gaps_AS = gaps_AS - gaps_AS.mean(0)  # a seed's data order is the same in all arms, and so is what that does
    arms, seeds = means_AS.shape
    freedom = (arms - 1) * (seeds - 1)
    error = math.sqrt(2 * float(gaps_AS.square().sum()) / freedom / seeds)  # of the difference of two arms' means
    difference_CN = (right[1:] - right[:1]).mean(1)
    drawn_CB = _drawn(difference_CN, error, freedom, seed, resamples)
    below, above = (drawn_CB <= 0).sum(1), (drawn_CB >= 0).sum(1)
    p = [min(1.0, 2 * (1 + int(n)) / (1 + resamples)) for n in torch.minimum(below, above)]
    found = []
    for one, corrected, mean, (low, high) in zip(
        p, holm(p), difference_CN.mean(1).tolist(), _percentiles(drawn_CB, confidence), strict=True
    ):
        verdict = "no difference shown" if corrected >= 1 - confidence else "better" if mean > 0 else "worse"
        found.append(Versus(mean, low, high, one, corrected, verdict))
    return found


def accuracies(
    right: torch.Tensor, confidence: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> list[tuple[float, float, float]]:
    """(mean, low, high) of each arm, by the same resampling; the seeds' variance within arms is that of all together."""
    means_AS = right.mean(2)
    arms, seeds = means_AS.shape
    freedom = arms * (seeds - 1)
    error = math.sqrt(float(means_AS.var(1).mean()) / seeds)
    drawn_AB = _drawn(right.mean(1), error, freedom, seed, resamples).clamp(0, 1)
    bounds = _percentiles(drawn_AB, confidence)
    return [(mean, *limits) for mean, limits in zip(means_AS.mean(1).tolist(), bounds, strict=True)]


def holm(p: list[float]) -> list[float]:
    """Holm's corrected p-values: the smallest times their number, the next times one less, and so on, never falling."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, p[index] * (len(p) - rank)))
        corrected[index] = highest
    return corrected


def _drawn(x_CN: torch.Tensor, error: float, freedom: int, seed: int, resamples: int) -> torch.Tensor:
    """Resampled means over the rows [comparisons, resamples], each moved by `error` times a draw of Student's t."""
    generator = torch.Generator().manual_seed(seed)
    rows, parts = x_CN.shape[1], []
    for begin in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - begin)
        draws = torch.randint(rows, (size, rows), generator=generator)
        times_BN = torch.zeros(size, rows, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())
        normal_B, *others = torch.randn(1 + freedom, size, generator=generator, dtype=torch.float64)
        t_B = normal_B / torch.stack(others).square().mean(0).sqrt()
        parts.append(x_CN @ times_BN.T / rows + error * t_B)
    return torch.cat(parts, 1)


def _percentiles(drawn_CB: torch.Tensor, confidence: float) -> list[tuple[float, float]]:
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    return [(float(low), float(high)) for low, high in drawn_CB.quantile(tails, dim=1).T]
