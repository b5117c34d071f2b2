"""Intervals and the stopping rule: against plain loops, and in simulations of the errors they promise to bound."""

import math

import pytest
import torch

from plopfast.scoring.stopping import FIRST_LOOK, averages, decide, intervals, next_look, student_t
from plopfast.support.errors import ConfigError

LAYERS = 4


def draw(means, prompts, generator, spread=0.15):
    """Statistics of prompts like real ones: log-normal lengths, longer ones with higher scores, a skewed part that all
    types share and one of each type's own. `means` are what sum / count tends to, layer by layer."""
    lengths = torch.exp(3 + 0.6 * torch.randn(prompts, generator=generator, dtype=torch.float64)).round().clamp(min=2)
    types = len(means)

    def skewed(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).exp() - math.exp(0.5)

    shared = skewed(prompts) + 0.5 * (lengths / lengths.new_tensor(math.exp(3.18)) - 1)
    own = skewed(types, 1, prompts) + 0.3 * skewed(types, LAYERS, prompts)
    layers = 0.2 * (torch.arange(LAYERS, dtype=torch.float64) - (LAYERS - 1) / 2)[None, :, None]
    value = torch.tensor(means, dtype=torch.float64)[:, None, None] + layers + spread * (0.3 * shared + own)
    return torch.stack([value * lengths, lengths.expand_as(value)]).reshape(2, types * LAYERS, prompts)


def types_of(count):
    return [f"type{i}" for i in range(count) for _ in range(LAYERS)]


def run_rule(means, k, confidence, generator, budget=200):
    """The decision with which scoring would have ended."""
    stats, looks, seen = draw(means, budget, generator), [], 0
    while seen < budget:
        seen = min(next_look(seen), budget)
        looks.append(seen)
        decision = decide(stats[:, :, :seen], types_of(len(means)), k, confidence, looks)
        if decision.decided:
            break
    return decision


@pytest.mark.parametrize(
    "means, k",
    [([1.0, 1.0], 1), ([0.6, 0.9, 1.0, 1.0, 1.2, 1.3, 1.5], 3), ([1.0] * 4, 2)],
    ids=["two tied types", "a tie at the border of seven", "all four tied"],
)
def test_the_error_rate_is_kept(means, k):
    """Between exactly tied types every decision is an error; 20 % are allowed, over up to five looks."""
    generator, runs = torch.Generator().manual_seed(1), 400
    wrong = sum(run_rule(means, k, 0.8, generator).decided for _ in range(runs))
    assert wrong / runs <= 0.2, wrong / runs
    if len(means) == 2:
        assert wrong, "the simulation can see errors at all"


def test_the_nominal_95_percent_are_kept():
    generator, runs = torch.Generator().manual_seed(2), 1000
    wrong = sum(run_rule([1.0, 1.0], 1, 0.95, generator).decided for _ in range(runs))
    assert 0 < wrong / runs <= 0.05, wrong / runs


def test_looking_repeatedly_without_the_correction_would_err_more():
    """What the rule guards against: the same test at every look, each at the full 5 %."""
    generator, runs, wrong = torch.Generator().manual_seed(2), 500, 0
    for _ in range(runs):
        stats = draw([1.0, 1.0], 200, generator)
        looks = (16, 32, 64, 128, 200)
        wrong += any(decide(stats[:, :, :n], types_of(2), 1, 1 - 0.05 * math.pi**2 / 6, [n]).decided for n in looks)
    assert wrong / runs > 0.07, wrong / runs


def test_clear_cases_need_few_prompts_and_are_right():
    generator = torch.Generator().manual_seed(3)
    means = [1.2, 0.6, 1.6, 0.8, 1.4, 1.1, 1.3]
    runs = [run_rule(means, 2, 0.95, generator) for _ in range(100)]
    assert all(set(run.types) == {"type1", "type3"} for run in runs if run.decided)
    assert sum(run.decided for run in runs) >= 98
    assert sorted(run.prompts for run in runs)[50] <= 64


def test_a_decision_says_what_it_knows():
    generator = torch.Generator().manual_seed(4)
    stats = draw([0.5, 0.9, 0.9, 1.5], 64, generator)
    near = decide(stats, types_of(4), 2, 0.95, [16, 32, 64])
    assert near.types[0] == "type0" and not near.decided and near.looks == [16, 32, 64]
    tie = {"type1", "type2"}
    assert set(near.near_ties[0]) == tie and near.near_ties[0][0] == near.types[1]
    assert "near-tie between type" in near.note and "64 prompts" in near.note
    assert near.margin_low < 0 < near.margin < near.margin_high and near.margin_low + near.margin_high == pytest.approx(
        2 * near.margin
    )
    clear = decide(stats, types_of(4), 3, 0.95, [16, 32, 64])
    assert clear.decided and clear.types[-1] in tie and not clear.near_ties and clear.margin_low > 0
    inverse = decide(stats, types_of(4), 1, 0.95, [64], inverse=True)
    assert inverse.types == ["type3"] and inverse.decided and inverse.rule == "plop-inverse"
    assert decide(stats, types_of(4), 4, 0.95, [64]).decided, "nothing is left out"
    for k in (0, 5):
        with pytest.raises(ConfigError, match=f"k = {k}: expected 1 to 4, this model's module types \\(type0, type1"):
            decide(stats, types_of(4), k, 0.95, [64])


def test_the_test_is_the_paired_t_test_where_lengths_are_equal():
    values = torch.rand(2, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    stats = torch.stack([values * 7, torch.full_like(values, 7)])
    decision = decide(stats, ["a", "b"], 1, 0.9, [30])
    gap = (values[1] - values[0]) * (1 if decision.types == ["a"] else -1)
    half = student_t(1 - 0.05 * 6 / math.pi**2, 29) * gap.std() / math.sqrt(30)
    assert decision.margin == pytest.approx(float(gap.mean()))
    assert decision.margin_high - decision.margin == pytest.approx(float(half))


@pytest.mark.parametrize(
    "prompts, words", [(1, "one prompt, of which no interval is possible"), (7, "7 prompts: too few")]
)
def test_few_prompts_decide_nothing(prompts, words):
    stats = draw([0.1, 9.0], prompts, torch.Generator().manual_seed(6), spread=0.0)
    decision = decide(stats, types_of(2), 1, 0.95, [prompts])
    assert not decision.decided and words in decision.note and decision.margin_low is None


def test_looks_double():
    looks = [next_look(0)]
    while looks[-1] < 500:
        looks.append(next_look(looks[-1]))
    assert looks == [FIRST_LOOK, 32, 64, 128, 256, 512]
    assert next_look(17) == 32 and next_look(15) == 16


@pytest.mark.parametrize("freedom", [7, 15, 63])
def test_students_t(freedom):
    for p in (0.9, 0.99, 0.999, 0.9999):
        t, steps = student_t(p, freedom), 20000
        middle = (torch.arange(steps, dtype=torch.float64) + 0.5) * t / steps
        constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        area = float((constant * (1 + middle**2 / freedom) ** (-(freedom + 1) / 2)).sum() * t / steps)
        assert 0.5 - area == pytest.approx(1 - p, rel=0.02)


def test_intervals_cover_what_they_say():
    """The types' true means lie within 95 % intervals of 60 prompts about 93 times in 100."""
    generator, means, runs, hits = torch.Generator().manual_seed(7), [0.7, 1.0, 1.4], 150, 0
    everything = draw(means, 400_000, generator)
    truth = averages(types_of(3))[1] @ (everything[0].sum(1) / everything[1].sum(1))
    for seed in range(runs):
        known = intervals(draw(means, 60, generator), list(range(12)), types_of(3), 0.95, seed)
        hits += sum(low <= float(v) <= high for (low, high), v in zip(known.types.values(), truth, strict=True))
    assert 0.9 <= hits / (3 * runs) <= 0.98, hits / (3 * runs)


def test_intervals_equal_a_loop_and_are_seeded():
    stats = draw([0.7, 1.2], 9, torch.Generator().manual_seed(8))
    names = [f"m{i}" for i in range(8)]
    known = intervals(stats, names, types_of(2), 0.9, seed=3)
    assert (
        known == intervals(stats, names, types_of(2), 0.9, seed=3) != intervals(stats, names, types_of(2), 0.9, seed=4)
    )

    def ratio_and_error(sums, counts):
        ratio = sums.sum() / counts.sum()
        return ratio, (sums - ratio * counts).square().sum().sqrt() / counts.sum()

    draws = torch.randint(9, (2000, 9), generator=torch.Generator().manual_seed(3))
    # lengths are the same in all modules, so that a type's sums are its modules' mean
    type_sums = (stats[0, 4:].mean(0), stats[1, 0])
    for got, (sums, counts) in ((known.modules["m5"], stats[:, 5]), (known.types["type1"], type_sums)):
        value, error = ratio_and_error(sums, counts)
        t = torch.stack([(r - value) / e for r, e in (ratio_and_error(sums[row], counts[row]) for row in draws)])
        assert got == pytest.approx((value - t.quantile(torch.tensor([0.95, 0.05]).double()) * error).tolist())


def test_intervals_refuse():
    """From two prompts they would have no width, as each resample is one prompt alone or both."""
    stats = draw([0.7, 1.2], 8, torch.Generator().manual_seed(9))
    for prompts in (1, 2, 7):
        with pytest.raises(ConfigError, match=f"{prompts} prompts?: an interval over prompts needs 8 or more"):
            intervals(stats[:, :, :prompts], range(8), types_of(2))
    with pytest.raises(ConfigError, match="above 0 and below 1, got 95"):
        intervals(stats, range(8), types_of(2), 95)


def test_prompts_that_are_alike_give_an_interval_of_one_point():
    """Also where the single prompts differ by as much as float32 rounds."""
    noise = 1e-8 * torch.rand(8, 20, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    for off in (torch.zeros_like(noise), noise):
        counts = torch.full_like(noise, 7.0)
        known = intervals(torch.stack([(1.3 + off) * counts, counts]), list(range(8)), types_of(2))
        for bounds in (*known.types.values(), *known.modules.values()):
            assert bounds == pytest.approx((1.3, 1.3), rel=1e-6)


def test_a_confidence_is_not_rounded_up():
    stats = draw([0.5, 1.5], 32, torch.Generator().manual_seed(12))
    assert "decided at 99.9% confidence" in decide(stats, types_of(2), 1, 0.999, [32]).note


def test_prompts_without_tokens_do_not_count():
    stats = draw([0.7, 1.2], 20, torch.Generator().manual_seed(10))
    padded = torch.cat([stats, torch.zeros(2, 8, 5, dtype=torch.float64)], 2)
    assert decide(padded, types_of(2), 1, 0.95, [20]) == decide(stats, types_of(2), 1, 0.95, [20])
    assert intervals(padded, range(8), types_of(2)) == intervals(stats, range(8), types_of(2))
