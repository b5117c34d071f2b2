"""What the plain accounts of several files share: Student's t, and a report of a table of prompts."""

import functools
import math

from plopfast.scoring.report import ModuleScore, NFNReport


def t_tail(t, freedom):
    """P(T > t) of Student's t, by Simpson's rule over an angle: sqrt(freedom) tan(angle) = t."""
    steps, begin = 100, math.atan(t / math.sqrt(freedom))
    width = (math.pi / 2 - begin) / steps
    heights = [math.cos(begin + i * width) ** (freedom - 1) for i in range(steps)] + [0.0 if freedom > 1 else 1.0]
    area = width / 3 * sum(h * (1 if i in (0, steps) else 4 if i % 2 else 2) for i, h in enumerate(heights))
    return area * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)


@functools.cache
def t_quantile(tail, freedom):
    low, high = 0.0, 1e3
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > tail else (low, middle)
    return low


def report_of(stats, types):
    sums, counts = stats.sum(2).tolist()
    scores = {
        f"m{i}": ModuleScore(s / c, 0.1, int(c), t or "head", 0 if t else None, 8, 8)
        for i, (s, c, t) in enumerate(zip(sums, counts, types, strict=True))
    }
    return NFNReport(scores, int(sum(counts)), stats.shape[2], 0.0, prompt_stats=stats)
