"""The stopping rule and the intervals against a slow, plain account of them, on many small random tables of prompts.

A table has modules of several types and layers, with a head, with prompts that some modules or all of them saw nothing
of, and with tokens of other numbers. Each figure is checked from both sides: neither too wide nor too narrow.
"""

import math
import random
from statistics import NormalDist

import pytest
import torch
from oracle import report_of, t_quantile, t_tail

from plopfast.scoring.report import ModuleScore, NFNReport
from plopfast.scoring.stopping import averages, decide, intervals, next_look, student_t

EXACT = 0.012  # relative: what the approximate t-quantile may differ, at 7 degrees of freedom and far tails


def table(rng, prompts=None):
    """(stats [2, modules, prompts], types): a small random table, its modules in random order."""
    kinds = [f"type{i}" for i in range(rng.randint(1, 5))]
    types = [kind for kind in kinds for _ in range(rng.randint(1, 3))] + [""] * rng.randint(0, 1)
    rng.shuffle(types)
    prompts = prompts or rng.choice((8, 9, 16, 33))
    centre = {kind: rng.uniform(0.5, 1.5) for kind in [*kinds, ""]}
    lengths = [rng.randint(1, 30) for _ in range(prompts)]
    stats = torch.zeros(2, len(types), prompts, dtype=torch.float64)
    for module, kind in enumerate(types):
        for prompt in range(prompts):
            count = 0 if rng.random() < 0.1 else lengths[prompt] if rng.random() < 0.8 else rng.randint(1, 30)
            stats[:, module, prompt] = torch.tensor([count * (centre[kind] + rng.gauss(0, 0.1)), count])
        stats[:, module, 0] = torch.tensor([2 * centre[kind], 2])  # each module sees a token
    return stats, types


def tables(count, seed):
    rng = random.Random(seed)
    return [table(rng) for _ in range(count)]


def nfn_of(stats, types):
    """Type -> NFN, from plain sums, in the order in which the types first come."""
    sums, counts = stats.tolist()
    found = {}
    for kind in dict.fromkeys(filter(None, types)):
        ratios = [sum(s) / sum(c) for s, c, t in zip(sums, counts, types, strict=True) if t == kind]
        found[kind] = math.fsum(ratios) / len(ratios)
    return found


def error_of_gap(stats, types, one, other):
    """The standard error of the difference of two types' NFN: each prompt's linear part of both, paired."""
    sums, counts = stats.tolist()
    seen = [p for p in range(stats.shape[2]) if any(c[p] for c in counts)]
    parts = []
    for p in seen:
        part = 0.0
        for kind, sign in ((one, 1), (other, -1)):
            modules = [m for m, t in enumerate(types) if t == kind]
            for m in modules:
                ratio, mean_count = sum(sums[m]) / sum(counts[m]), sum(counts[m]) / len(seen)
                part += sign * (sums[m][p] - ratio * counts[m][p]) / mean_count / len(modules)
        parts.append(part)
    mean = math.fsum(parts) / len(parts)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in parts) / (len(parts) - 1) / len(parts)), len(parts)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_decision_is_what_plain_tests_of_all_pairs_say(inverse):
    rng, close = random.Random(inverse), 0
    for stats, types in tables(60, seed=10 + inverse):
        values = nfn_of(stats, types)
        k, confidence, looks = rng.randint(1, len(values)), rng.choice((0.6, 0.9, 0.95)), [1] * rng.randint(1, 4)
        order = sorted(values, key=lambda kind: values[kind], reverse=inverse)
        found = decide(stats, types, k, confidence, looks, inverse)
        assert found.types == order[:k] and found.k == k and found.confidence == confidence
        if k == len(values):
            assert found.decided and found.margin is None
            continue
        assert found.margin == pytest.approx(abs(values[order[k]] - values[order[k - 1]]))
        level = (1 - confidence) * 6 / (math.pi * len(looks)) ** 2 / (k * (len(values) - k))
        ties, sure = [], True
        for one in order[:k]:
            for other in order[k:]:
                error, prompts = error_of_gap(stats, types, one, other)
                half, gap = t_quantile(level / 2, prompts - 1) * error, abs(values[one] - values[other])
                sure &= abs(gap / half - 1) > EXACT
                ties += [[one, other]] * (gap <= half)
                if (one, other) == (order[k - 1], order[k]):
                    assert found.margin_high - found.margin == pytest.approx(half, rel=EXACT)
                    assert found.margin - found.margin_low == pytest.approx(half, rel=EXACT)
        if sure:
            assert found.near_ties == sorted(ties, key=lambda pair: abs(values[pair[0]] - values[pair[1]]))
            assert found.decided == (not ties)
        close += not sure
        assert found.prompts == prompts
    assert close < 10, "most of the tables say something"


@pytest.mark.parametrize("k, types", [(1, 2), (3, 7), (2, 4)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_all_looks_and_pairs_together_spend_the_error_that_is_allowed(k, types, confidence):
    """The error that each test spends is read from the width of the margin's interval. Over all pairs and ever more looks
    it adds up to 1 - confidence: not more, and not much less."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(types, 40, generator=generator, dtype=torch.float64)
    stats = torch.stack([values * 7, torch.full_like(values, 7)])
    names = [f"type{i}" for i in range(types)]
    spent = 0.0
    for look in range(1, 41):
        found = decide(stats, names, k, confidence, list(range(1, look + 1)))
        first_out = sorted(range(types), key=lambda i: float(values[i].mean()))[k]
        gaps = values[names.index(found.types[-1])] - values[first_out]
        t = (found.margin_high - found.margin) / float(gaps.std() / math.sqrt(40))
        spent += 2 * t_tail(t, 39) * k * (types - k)
    assert 0.96 * (1 - confidence) <= spent <= (1 - confidence), spent


def test_looks_end_at_the_powers_of_two_from_16():
    for prompts in range(300):
        assert next_look(prompts) == min(look for look in (16, 32, 64, 128, 256, 512) if look > prompts)


def test_the_t_quantile_on_both_sides():
    """It moves with the degrees of freedom, and is the normal one where these are many."""
    for freedom, close in ((7, 3e-3), (8, 2e-3), (15, 1e-4), (31, 1e-5), (63, 1e-5)):
        for tail in (0.25, 0.05, 0.01, 0.001, 0.0001):
            assert student_t(1 - tail, freedom) == pytest.approx(t_quantile(tail, freedom), rel=close)
    assert student_t(0.975, 10**7) == pytest.approx(NormalDist().inv_cdf(0.975), rel=1e-6)


def test_equal_types_are_never_told_apart():
    """Whatever rounding makes of them, and in the order in which they come."""
    for prompts in (8, 16, 64):
        noise = 1e-9 * torch.rand(3, prompts, generator=torch.Generator().manual_seed(prompts), dtype=torch.float64)
        noise[1] += 1e-8  # each prompt agrees that the second type is higher, by less than float32 can tell
        counts = torch.full_like(noise, 5.0)
        for inverse in (False, True):
            found = decide(torch.stack([(1 + noise) * counts, counts]), ["a", "b", "c"], 1, 0.5, [prompts], inverse)
            assert not found.decided and len(found.near_ties) == 2


@pytest.mark.parametrize("prompts, decided", [(7, False), (8, True)])
def test_the_fewest_prompts(prompts, decided):
    values = torch.tensor([[1.0], [9.0]], dtype=torch.float64) + 0.01 * torch.rand(
        2, prompts, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    stats = torch.stack([values * 3, torch.full_like(values, 3)])
    empty = torch.zeros(2, 2, 5, dtype=torch.float64)  # prompts without a token do not make up for them
    for given in (stats, torch.cat([stats, empty], 2)):
        found = decide(given, ["a", "b"], 1, 0.95, [prompts])
        assert found.decided is decided and (found.margin_low is None) is not decided and found.prompts == prompts


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.99])
def test_intervals_are_those_of_the_t_test_where_prompts_are_normal(confidence):
    """Prompts of one length with normal scores: the bootstrap-t interval is mean +- t s / sqrt(n)."""
    generator = torch.Generator().manual_seed(5)
    for prompts in (60, 240):
        half = []
        for seed in range(8):
            values = 1 + 0.2 * torch.randn(1, prompts, generator=generator, dtype=torch.float64)
            stats = torch.stack([values * 4, torch.full_like(values, 4)])
            low, high = intervals(stats, ["m"], ["a"], confidence, seed).modules["m"]
            exact = t_quantile((1 - confidence) / 2, prompts - 1) * float(values.std()) / math.sqrt(prompts)
            assert low < float(values.mean()) < high
            half.append((high - low) / 2 / exact)
        assert sum(half) / len(half) == pytest.approx(1, abs=0.03), half
        assert all(0.85 < ratio < 1.15 for ratio in half)


def plain_interval(sums, counts, draws, confidence):
    """Bootstrap-t of a ratio of sums, resample by resample."""

    def ratio_and_error(rows):
        ratio = sum(sums[p] for p in rows) / sum(counts[p] for p in rows)
        squares = math.fsum((sums[p] - ratio * counts[p]) ** 2 for p in rows)
        return ratio, math.sqrt(squares) / sum(counts[p] for p in rows)

    value, error = ratio_and_error(range(len(sums)))
    t = []
    for rows in draws:
        if sum(counts[p] for p in rows):
            ratio, spread = ratio_and_error(rows)
            t += [(ratio - value) / spread] if spread > 1e-6 * value else []
    t = torch.tensor(t, dtype=torch.float64)
    high, low = t.quantile((1 + confidence) / 2), t.quantile((1 - confidence) / 2)
    return float(value - high * error), float(value - low * error)


def test_intervals_are_what_a_plain_loop_says():
    rng = random.Random(3)
    for number in range(4):
        stats, types = table(rng, prompts=rng.choice((8, 11)))
        names, seed, confidence = [f"m{i}" for i in range(len(types))], rng.randint(0, 9), rng.choice((0.8, 0.95))
        found = intervals(stats, names, types, confidence, seed)
        seen = stats[:, :, stats[1].any(0)]
        count = seen.shape[2]
        draws = torch.randint(count, (2000, count), generator=torch.Generator().manual_seed(seed)).tolist()
        module = rng.randrange(len(types))
        expected = plain_interval(*seen[:, module].tolist(), draws, confidence)
        assert found.modules[names[module]] == pytest.approx(expected), number
        kind = rng.choice(averages(types)[0])
        rows = [m for m, t in enumerate(types) if t == kind]
        scaled = sum(seen[:, m] / seen[1, m].mean() for m in rows) / len(rows)
        assert found.types[kind] == pytest.approx(plain_interval(*scaled.tolist(), draws, confidence)), number
        assert list(found.types) == list(dict.fromkeys(filter(None, types))) and list(found.modules) == names
        assert found.confidence == confidence


def test_order_of_prompts_and_of_modules_does_not_matter():
    """Neither to a decision, nor (modules) to the intervals of a seed; a report passes on what it is asked."""
    rng = random.Random(4)
    for stats, types in tables(12, seed=5):
        values = nfn_of(stats, types)
        k, confidence = rng.randint(1, len(values)), rng.choice((0.6, 0.95))
        inverse, seed = rng.random() < 0.5, rng.randint(1, 9)
        looks = [16, stats.shape[2]]
        found = decide(stats, types, k, confidence, looks, inverse)
        prompts, modules = list(range(stats.shape[2])), list(range(len(types)))
        rng.shuffle(prompts), rng.shuffle(modules)
        moved, kinds = stats[:, modules][:, :, prompts], [types[m] for m in modules]
        other = decide(moved, kinds, k, confidence, looks, inverse)
        assert other.types == found.types and other.near_ties == found.near_ties and other.note == found.note
        names = [f"m{m}" for m in modules]
        assert intervals(stats[:, modules], names, kinds, confidence, seed).types == {
            kind: pytest.approx(bounds)
            for kind, bounds in intervals(
                stats, [f"m{m}" for m in range(len(types))], types, confidence, seed
            ).types.items()
        }
        report = report_of(stats, types)
        assert report.types == {kind: pytest.approx(value) for kind, value in values.items()}
        assert list(report.types) == sorted(values, key=lambda kind: values[kind])
        report.decision = found
        assert report.decide(k, confidence, inverse) == found
        report.decision = None
        assert report.decide(k, confidence, inverse) == decide(stats, types, k, confidence, [stats.shape[2]], inverse)
        for asked in (0.5, 0.9):
            kinds_as_reported = ["" if s.layer is None else s.type for s in report.scores.values()]
            expected = intervals(stats, list(report.scores), kinds_as_reported, asked, seed)
            assert report.intervals(asked, seed) == expected
        assert report.intervals(0.9, seed) != report.intervals(0.9, seed + 1)


def test_robust_distances_are_standard_deviations_of_normal_scores():
    """Over many layers with normal scores they have the deviation 1 and the centre 0; what is far off on either side is
    an outlier, in each type by its own median and spread."""
    rng = random.Random(6)
    scores = {}
    for kind, centre, spread in (("a", 1.0, 0.1), ("b", 2.0, 0.02)):
        for layer in range(2000):
            scores[f"{layer}.{kind}"] = ModuleScore(rng.gauss(centre, spread), 0, 1, kind, layer, 8, 8)
        for name, z in (("low", -8), ("high", 8), ("near", 3)):
            scores[f"{name}.{kind}"] = ModuleScore(centre + z * spread, 0, 1, kind, 3000, 8, 8)
    scores["head"] = ModuleScore(9.0, 0, 1, "head", None, 8, 8)
    report = NFNReport(scores, 1, 1, 0.0)
    z = report.z_scores()
    assert list(z) == list(scores)[:-1], "the head is in no type"
    for kind in "ab":
        own = [value for name, value in z.items() if name.endswith(kind) and name[0].isdigit()]
        assert math.sqrt(sum(v * v for v in own) / len(own)) == pytest.approx(1, abs=0.05)
        assert sum(own) / len(own) == pytest.approx(0, abs=0.08)
        assert z[f"low.{kind}"] == pytest.approx(-8, rel=0.06) and z[f"high.{kind}"] == pytest.approx(8, rel=0.06)
    outliers = report.outliers()
    assert {"low.a", "high.a", "low.b", "high.b"} <= set(outliers) and not {"near.a", "near.b"} & set(outliers)
    table = report.types_table(None, ["b"])
    for kind, row in zip("ab", table.rows, strict=True):
        values = [score.nfn for score in scores.values() if score.type == kind]
        assert row[0] == kind and row[1:5] == pytest.approx((sum(values) / len(values), min(values), max(values), 2003))
        assert row[5] == (kind == "b")
    # a long tail does not move the median, nor what is measured from it
    moved = dict(scores)
    for layer in range(400):
        moved[f"{layer}.a"] = ModuleScore(50.0, 0, 1, "a", layer, 8, 8)
    assert NFNReport(moved, 1, 1, 0.0).z_scores()["high.a"] == pytest.approx(8, rel=0.35)
