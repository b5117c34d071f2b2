"""Paired comparison: its errors in simulated trials with and without differences, its corrections, and odd cases."""

import pytest
import torch

from plopfast.studies.paired import accuracies, compare, holm

ARMS, SEEDS, ROWS = 5, 3, 200


def simulated(generator, *, seed_noise, gain=0.0):
    """right [arms, seeds, rows]: rows differ in difficulty, arms in the rows they know, runs by their seeds' luck, part of
    which all arms share; the third arm is better by `gain`."""

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    luck = seed_noise * (noise(1, SEEDS, 1) + noise(ARMS, SEEDS, 1))
    ease = 1.3 + 1.5 * noise(1, 1, ROWS) + 0.5 * noise(ARMS, 1, ROWS) + 0.5 * noise(ARMS, SEEDS, ROWS) + luck
    ease[2] += gain
    return (ease > 0).double()


@pytest.mark.parametrize(("seed_noise", "power"), [(0.0, 0.9), (0.1, 0.6), (0.5, 0.0)])
def test_errors_stay_at_the_level_and_differences_are_found(seed_noise, power):
    """In trials without a difference, one is claimed between any arms in at most 5 %, whether rows or seeds are the noise;
    a real one of about 9 points is found where the noise allows it."""
    generator, trials, claims, finds, covered = torch.Generator().manual_seed(0), 120, 0, 0, 0
    for number in range(trials):
        null = compare(simulated(generator, seed_noise=seed_noise), seed=number, resamples=1000)
        claims += any(versus.verdict != "no difference shown" for versus in null)
        covered += null[0].low <= 0 <= null[0].high
    for number in range(40):
        found = compare(simulated(generator, seed_noise=seed_noise, gain=0.6), seed=number, resamples=1000)
        finds += found[1].verdict == "better"
    assert claims <= 10, "10 or fewer of 120 have a chance of 0.94 or more where the error is 5 %"
    assert covered >= 0.92 * trials
    assert finds >= power * 40


def test_the_level_is_not_far_off_where_the_first_arm_varies_most():
    """Its seeds three times as much as the others', which the method takes to be alike."""
    generator, trials, claims = torch.Generator().manual_seed(0), 200, 0
    more = 0.1 * torch.tensor([3.0, 1, 1, 1, 1]).view(ARMS, 1, 1)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    for number in range(trials):
        ease = 1.3 + 1.5 * noise(1, 1, ROWS) + 0.5 * noise(ARMS, SEEDS, ROWS) + more * noise(ARMS, SEEDS, 1)
        found = compare((ease > 0).double(), seed=number, resamples=500)
        claims += any(versus.verdict != "no difference shown" for versus in found)
    assert claims <= 0.1 * trials


def test_verdicts_and_their_figures():
    generator = torch.Generator().manual_seed(1)
    first = (torch.rand(1, SEEDS, ROWS, generator=generator) < 0.5).double()
    worse, better = first.clone(), first.clone()
    worse[:, :, :60] = 0
    better[:, :, :60] = 1
    same, down, up = compare(torch.cat([first, first, worse, better]))
    assert same.difference == 0 and same.p_corrected > 0.9 and same.low < 0 < same.high
    assert same.verdict == "no difference shown" and down.verdict == "worse" and up.verdict == "better"
    assert down.difference == pytest.approx(float((worse - first).mean()))
    assert down.low < down.difference < down.high < 0 < up.low < up.difference < up.high
    assert 0 < up.p <= up.p_corrected < 0.05


def test_arms_that_are_alike_have_no_noise():
    right = (torch.rand(1, 3, 50, generator=torch.Generator().manual_seed(0)) < 0.5).double().expand(3, -1, -1)
    for versus in compare(right):
        assert (versus.difference, versus.low, versus.high, versus.p, versus.p_corrected) == (0, 0, 0, 1, 1)


def test_the_same_seed_draws_the_same():
    right = simulated(torch.Generator().manual_seed(0), seed_noise=0.1)
    assert compare(right, seed=3) == compare(right, seed=3) != compare(right, seed=4)
    assert accuracies(right, seed=3) == accuracies(right, seed=3)


def test_accuracy_intervals_hold_the_truth():
    generator, held = torch.Generator().manual_seed(0), 0
    for number in range(100):
        right = (torch.rand(2, 3, 80, generator=generator) < 0.7).double()
        (mean, low, high), _ = accuracies(right, seed=number, resamples=1000)
        assert mean == pytest.approx(float(right[0].mean())) and low < mean < high
        held += low <= 0.7 <= high
    assert held >= 90


def test_accuracies_stay_between_0_and_1():
    right = torch.ones(2, 3, 40, dtype=torch.float64)
    right[1, 1] = 0
    for mean, low, high in accuracies(right):
        assert 0 <= low <= mean <= high <= 1


def test_a_wider_confidence_is_a_wider_interval():
    right = simulated(torch.Generator().manual_seed(0), seed_noise=0.1)
    narrow, wide = (compare(right, confidence=confidence)[0] for confidence in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high and wide.p == narrow.p


def test_the_verdict_rests_on_the_confidence_asked_for():
    right = torch.zeros(2, 3, 1000, dtype=torch.float64)
    right[0, :, :20] = right[1, :, 20:50] = 1
    sure, surer = (compare(right, confidence=confidence)[0] for confidence in (0.6, 0.9999))
    assert 0.0001 < sure.p_corrected == surer.p_corrected < 0.4
    assert (sure.verdict, surer.verdict) == ("better", "no difference shown")


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        ([0.04], [0.04]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([], []),
    ],
)
def test_holm(p, corrected):
    assert holm(p) == pytest.approx(corrected)
