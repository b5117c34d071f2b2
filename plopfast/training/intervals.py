"""The 95 % interval of an accuracy, which says how far another sample of as many rows could move it.

- Rows that are right or wrong: Wilson's score interval (E. B. Wilson, Probable inference, the law of succession, and
  statistical inference, JASA 22, 1927). It stays within 0 and 1 and has a width where all rows are right, as the normal
  approximation has not (Brown, Cai and DasGupta, Statistical Science 16, 2001).
- A share of tokens: rows are resampled, not tokens, because the tokens of a row are right together (a percentile
  bootstrap of a ratio; Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
"""

import math
from collections.abc import Sequence

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


def of_shares(hits: Sequence[int], counts: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """Returns the interval of sum(hits) / sum(counts), where `hits` of `counts` tokens are right in each row.

    Rows that are all alike leave nothing to resample; the interval is then Wilson's for as many rows, which is the wider
    one for shares.
    """
    pairs = [(hit, count) for hit, count in zip(hits, counts, strict=True) if count]
    shares, rows = {hit / count for hit, count in pairs}, len(pairs)
    if len(shares) == 1:
        return wilson(shares.pop(), rows)
    both = torch.tensor(pairs, dtype=torch.float64).T
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for begin in range(0, RESAMPLES, size := max(1, CHUNK // rows)):
        draws = torch.randint(rows, (min(size, RESAMPLES - begin), rows), generator=generator)
        right, of = both[:, draws].sum(2)
        parts.append(right / of)
    low, high = torch.cat(parts).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
