"""What the plain accounts of several files share: Student's t, a report of a table of prompts, and random rows."""

import functools
import math
import random

from plopfast.data.example import Example
from plopfast.scoring.report import ModuleScore, NFNReport

BOS = 1


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


def random_example(rng, longest=12, roles=False):
    """A row of tokens with a few learned spans, apart from each other; plain text, or with an answer at the last one."""
    count = rng.randint(2, longest)
    tokens = [rng.choice((BOS, 7, 8)), *(rng.choice((BOS, 5, 6, 7, 8, 9)) for _ in range(count - 1))]
    borders = sorted(rng.sample(range(1, count + 1), rng.choice([n for n in (2, 4) if n <= count])))
    spans = tuple(zip(borders[::2], borders[1::2], strict=True))
    kind = rng.choice(("text", "answer", "closed"))
    if kind == "text":
        spans, answer = ((1, count),), None
    else:
        begin, end = spans[-1]
        answer = (begin, max(begin, end - (kind == "closed")))
    names = tuple(rng.choice(("user", "assistant")) for _ in tokens) if roles else None
    return Example(tuple(tokens), spans, answer, None if answer is None else "text", f"row {rng.random()}", names)


def learned_of(example):
    return {i for begin, end in example.learned for i in range(begin, end)}


def examples(count, seed, **options):
    rng = random.Random(seed)
    return [random_example(rng, **options) for _ in range(count)]
