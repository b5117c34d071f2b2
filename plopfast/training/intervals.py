"""The 95 % interval of an accuracy, which says how far another sample of as many rows could move it.

- Rows that are right or wrong: Wilson's score interval (E. B. Wilson, Probable inference, the law of succession, and
  statistical inference, JASA 22, 1927). It stays within 0 and 1 and has a width where all rows are right, as the normal
  approximation has not (Brown, Cai and DasGupta, Statistical Science 16, 2001).
- A share of tokens: rows are resampled, not tokens, because the tokens of a row are right together (a percentile
  bootstrap of a ratio; Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Z = 1.959963984540054  # the 97.5 % point of the normal distribution
RESAMPLES = 2000
CHUNK = 2**22  # draws at a time


def wilson(accuracy: float, rows: int) -> tuple[float, float]:
    """Returns the interval of an `accuracy` on `rows` rows.

    wilson(1.0, 3)  # 3 of 3 rows right: (0.4385, 1.0)
    """
    spread = Z * math.sqrt(accuracy * (1 - accuracy) / rows + Z**2 / (4 * rows**2))
    low, high = ((accuracy + Z**2 / (2 * rows) + sign * spread) / (1 + Z**2 / rows) for sign in (-1, 1))
    return (0.0 if accuracy == 0 else low), (1.0 if accuracy == 1 else high)  # rounding aside, they are


class Difference(NamedTuple):
    """A difference, and its 95 % interval."""

    difference: float
    low: float
    high: float

    def in_words(self) -> str:
        return f"{self.difference:+.4f} (95% interval {self.low:+.4f} to {self.high:+.4f}, paired by row)"


def of_gain(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Returns the mean of `after` minus that of `before`, of the same rows.

    Rows that are right or wrong: Newcombe's interval for paired proportions (R. G. Newcombe, Improved confidence intervals for
    the difference between binomial proportions based on paired data, Statistics in Medicine 17, 1998, method 10), which has a
    width where nothing changed, too. Others are resampled.

    >>> of_gain([1, 0, 0, 0], [1, 1, 1, 0]).difference
    0.5
    """
    rows = len(before)
    if not {*before, *after} <= {0, 1}:
        return of_change([b - a for a, b in zip(before, after, strict=True)], [1] * rows)
    both = sum(a == b == 1 for a, b in zip(before, after, strict=True))
    p1, p2 = math.fsum(after) / rows, math.fsum(before) / rows
    (l1, u1), (l2, u2) = wilson(p1, rows), wilson(p2, rows)
    neither = rows - round((p1 + p2) * rows) + both
    cross = both * neither - (round(p1 * rows) - both) * (round(p2 * rows) - both)
    spread = math.sqrt(p1 * (1 - p1) * p2 * (1 - p2)) * rows**2
    phi = (max(cross - rows / 2, 0) if cross > 0 else cross) / spread if spread else 0.0
    below = math.sqrt(max((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2, 0))
    above = math.sqrt(max((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2, 0))
    return Difference(p1 - p2, p1 - p2 - below, p1 - p2 + above)


def of_change(changes: Sequence[float], weights: Sequence[int]) -> Difference:
    """Returns sum(changes) / sum(weights) of rows, such as the change of a loss in nats a token, by resampling the rows."""
    pairs = torch.tensor([changes, weights], dtype=torch.float64)
    low, high = _resampled(pairs, seed=0)
    return Difference(math.fsum(changes) / sum(weights), low, high)


def of_shares(hits: Sequence[int], counts: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """Returns the interval of sum(hits) / sum(counts), where `hits` of `counts` tokens are right in each row.

    Rows that are all alike leave nothing to resample; the interval is then Wilson's for as many rows, which is the wider
    one for shares.
    """
    pairs = [(hit, count) for hit, count in zip(hits, counts, strict=True) if count]
    shares, rows = {hit / count for hit, count in pairs}, len(pairs)
    if len(shares) == 1:
        return wilson(shares.pop(), rows)
    return _resampled(torch.tensor(pairs, dtype=torch.float64).T, seed)


def _resampled(both: torch.Tensor, seed: int) -> tuple[float, float]:
    """Returns the interval of sum(both[0]) / sum(both[1]) over resamples of the rows; `both` [2, rows] float64."""
    rows = both.shape[1]
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for begin in range(0, RESAMPLES, size := max(1, CHUNK // rows)):
        draws = torch.randint(rows, (min(size, RESAMPLES - begin), rows), generator=generator)
        right, of = both[:, draws].sum(2)
        parts.append(right / of)
    low, high = torch.cat(parts).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
