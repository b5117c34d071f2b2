"""Paired comparisons, their corrections, and agreement of rankings: against closed forms and slow, plain accounts."""

import itertools
import math
import random
from statistics import NormalDist

import pytest
import torch
from oracle import report_of, t_quantile, t_tail

from plopfast.data.overlap import overlaps
from plopfast.placing.rules import ranked
from plopfast.scoring.stopping import averages
from plopfast.studies.agreement import agreement, doubled_below, kendall_tau, pick, subset_rows, tau_of
from plopfast.studies.paired import accuracies, compare, holm
from plopfast.support.errors import ConfigError


def runs_of(arms, seeds, rows, seed, row_noise=0.0, seed_noise=0.0, shared=0.0):
    """right [arms, seeds, rows]: shares that differ between rows, and between the seeds of each arm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return 0.5 + row_noise * normal(arms, 1, rows) + seed_noise * normal(arms, seeds, 1) + shared * normal(1, seeds, 1)


def seeds_error(right, paired):
    """(standard error of an arm's mean, or of the difference of two, that comes from seeds; degrees of freedom), plainly:
    the residuals of the arms' means after the arm's effect and, where `paired`, the seed's."""
    means = right.mean(2).tolist()
    arms, seeds = len(means), len(means[0])
    whole = sum(map(sum, means)) / arms / seeds
    square = 0.0
    for a, s in itertools.product(range(arms), range(seeds)):
        of_seed = sum(means[b][s] for b in range(arms)) / arms
        expected = sum(means[a]) / seeds + (of_seed - whole if paired else 0)
        square += (means[a][s] - expected) ** 2
    freedom = (arms - 1) * (seeds - 1) if paired else arms * (seeds - 1)
    return math.sqrt((2 if paired else 1) * square / freedom / seeds), freedom


SIZES = [(2, 2), (2, 3), (3, 3), (5, 3), (2, 8)]


@pytest.mark.parametrize("arms, seeds", SIZES)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_where_only_seeds_differ_the_intervals_are_those_of_students_t(arms, seeds, confidence):
    """Rows that are all alike: difference +- t error, with the residuals' degrees of freedom. What all arms share of a
    seed does not widen a difference, but it does an accuracy."""
    right = runs_of(arms, seeds, 6, seed=1, seed_noise=0.01, shared=0.02)
    error, freedom = seeds_error(right, paired=True)
    half = t_quantile((1 - confidence) / 2, freedom) * error
    for number, versus in enumerate(compare(right, confidence, seed=2), 1):
        gap = float(right[number].mean() - right[0].mean())
        assert versus.difference == pytest.approx(gap)
        assert versus.low == pytest.approx(gap - half, abs=0.1 * half)
        assert versus.high == pytest.approx(gap + half, abs=0.1 * half)
    error, freedom = seeds_error(right, paired=False)
    half = t_quantile((1 - confidence) / 2, freedom) * error
    for arm, (mean, low, high) in zip(right, accuracies(right, confidence, seed=2), strict=True):
        assert mean == pytest.approx(float(arm.mean()))
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_where_only_rows_differ_the_intervals_are_normal(confidence):
    """Many rows, and seeds that are all alike: mean +- z s / sqrt(rows), of the rows' differences and not of two means."""
    right = runs_of(3, 3, 400, seed=3, row_noise=0.05).expand(3, 3, 400).clone()
    right += 0.2 * torch.rand(1, 1, 400, generator=torch.Generator().manual_seed(0))  # hard rows are hard for all arms
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for number, versus in enumerate(compare(right, confidence, seed=4), 1):
        gaps = (right[number] - right[0]).mean(0)
        half = z * float(gaps.std()) / 20
        mean = float(gaps.mean())
        assert (versus.low, versus.high) == pytest.approx((mean - half, mean + half), abs=0.08 * half)
    for arm, (mean, low, high) in zip(right, accuracies(right, confidence, seed=4), strict=True):
        half = z * float(arm.mean(0).std()) / 20
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.08 * half)


def test_rows_and_seeds_add_their_variances():
    right = runs_of(4, 3, 300, seed=5, row_noise=0.1, seed_noise=0.004)
    error, freedom = seeds_error(right, paired=True)
    for number, versus in enumerate(compare(right, 0.8, seed=6), 1):
        gaps = (right[number] - right[0]).mean(0)
        generator = torch.Generator().manual_seed(7)
        chi = torch.randn(freedom, 100_000, generator=generator, dtype=torch.float64).square().mean(0).sqrt()
        drawn = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
        both = (float(gaps.std()) / math.sqrt(300) * drawn[0] + error * drawn[1] / chi).quantile(0.9)
        assert (versus.high - versus.low) / 2 == pytest.approx(float(both), rel=0.05)


@pytest.mark.parametrize("arms, seeds", SIZES)
def test_p_is_that_of_the_two_sided_t_test(arms, seeds):
    for gap in (0.0, 0.7, -1.5, 3.0, -6.0):
        right = runs_of(arms, seeds, 4, seed=8, seed_noise=0.01)
        error, freedom = seeds_error(right, paired=True)
        right = right - right.mean((1, 2), keepdim=True) + 0.5
        right[1] += gap * error
        exact = min(1.0, 2 * t_tail(abs(gap), freedom))
        versus = compare(right, seed=9)[0]
        # twice a share of 10,000 draws
        assert versus.p == pytest.approx(exact, abs=5 * math.sqrt(exact / 2 / 10_000) + 4e-4)
        assert 2 / 10_001 <= versus.p <= 1
        few = compare(right, seed=9, resamples=1500)[0].p  # no multiple of the draws that are made at a time
        assert few == pytest.approx(exact, abs=5 * math.sqrt(exact / 2 / 1500) + 3e-3)


def test_p_has_its_ends():
    """No draw on the other side gives the least p that so many draws can show; all on both sides give 1."""
    apart = torch.zeros(2, 2, 3, dtype=torch.float64)
    apart[1] = 1
    for resamples in (1, 100, 1000, 1001):
        (far,) = compare(apart, resamples=resamples)
        assert far.p == pytest.approx(min(1, 2 / (1 + resamples)))
        (same,) = compare(apart[:1].expand(2, -1, -1), resamples=resamples)
        assert same.p == 1 and same.verdict == "no difference shown"
    (down,) = compare(1 - apart)
    (up,) = compare(apart)
    assert (down.difference, down.verdict, up.difference, up.verdict) == (-1, "worse", 1, "better")


def test_verdicts_go_by_the_corrected_p_and_the_first_arm():
    """Several arms: each difference is to the first, and a p that only holds alone claims nothing."""
    right = runs_of(6, 4, 60, seed=10, row_noise=0.02, seed_noise=0.01)
    right = right - right.mean((1, 2), keepdim=True) + 0.5
    right += torch.tensor([0, 0.02, -0.02, 0.002, 0.01, -0.004]).view(6, 1, 1)
    checked = set()
    for confidence in (0.5, 0.7, 0.9, 0.95, 0.99):
        found = compare(right, confidence, seed=11)
        assert [v.difference for v in found] == pytest.approx([0.02, -0.02, 0.002, 0.01, -0.004])
        assert [v.p_corrected for v in found] == pytest.approx(holm([v.p for v in found]))
        for versus in found:
            claims = versus.p_corrected < 1 - confidence
            word = ("better" if versus.difference > 0 else "worse") if claims else "no difference shown"
            assert versus.verdict == word
            checked.add((claims, versus.p < 1 - confidence))
    assert checked == {(True, True), (False, True), (False, False)}, "p alone would have claimed more"


def test_seeds_of_the_resampling():
    right = runs_of(3, 3, 40, seed=12, row_noise=0.05, seed_noise=0.01)
    for made in (compare, accuracies):
        assert made(right, seed=1) == made(right, seed=1) != made(right, seed=2)
        few, many = ([made(right, seed=seed, resamples=n)[0].low for seed in range(12)] for n in (200, 3200))
        # the spread over seeds falls with the root of the resamples, also where they come in chunks
        assert 2 < float(torch.tensor(few).std() / torch.tensor(many).std()) < 8


def test_what_holds_without_being_asked():
    """95 %, the seed 0 and 10,000 resamples."""
    right = runs_of(2, 3, 12, seed=12, row_noise=0.05, seed_noise=0.01)
    assert compare(right) == compare(right, 0.95, 0, 10_000) and accuracies(right) == accuracies(right, 0.95, 0, 10_000)


def test_accuracies_end_at_0_and_1():
    right = torch.zeros(2, 2, 4, dtype=torch.float64)
    right[1] = 1
    right[:, 1, :2] = 0.5
    (_, low, _), (_, _, high) = accuracies(right)
    assert (low, high) == (0, 1)


def test_arms_in_another_order_and_relabelled_rows_and_seeds():
    right = runs_of(4, 3, 50, seed=12, row_noise=0.05, seed_noise=0.01)
    found = compare(right, seed=13)
    moved = compare(right[[0, 3, 1, 2]], seed=13)
    for versus, other in zip((found[2], found[0], found[1]), moved, strict=True):
        assert (other.difference, other.low, other.high, other.p) == pytest.approx(
            (versus.difference, versus.low, versus.high, versus.p)
        )
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for versus, other in zip(found, compare(right[:, [2, 0, 1]][:, :, order], seed=13), strict=True):
        width = versus.high - versus.low
        assert (other.low, other.high) == pytest.approx((versus.low, versus.high), abs=0.1 * width)


def closed_testing(p):
    """The corrected p of each hypothesis by closed testing: the largest Bonferroni p of all sets that hold it."""
    sets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size)]
    return [max(min(1.0, len(s) * min(p[i] for i in s)) for s in sets if one in s) for one in range(len(p))]


def test_holm_is_closed_testing():
    rng = random.Random(14)
    for size in (1, 2, 3, 4, 6):
        for _ in range(40):
            p = [rng.choice((0.0, 0.001, 0.01, 0.01, 0.03, 0.2, 0.5, 1.0, rng.random())) for _ in range(size)]
            assert holm(p) == pytest.approx(closed_testing(p)), p


def plain_tau(one, other):
    agree = ties_one = ties_other = pairs = 0
    for i, j in itertools.combinations(range(len(one)), 2):
        a, b = one[i] - one[j], other[i] - other[j]
        agree += (a * b > 0) - (a * b < 0)
        ties_one, ties_other, pairs = ties_one + (a == 0), ties_other + (b == 0), pairs + 1
    below = math.sqrt((pairs - ties_one) * (pairs - ties_other))
    return agree / below if below else 0.0


def test_tau_and_picks_are_what_all_pairs_say():
    rng = random.Random(15)
    for size in range(1, 8):
        for _ in range(30):
            one, other = ([rng.choice((0.0, 1.0, 1.0, 2.0, 3.0, rng.random())) for _ in range(size)] for _ in "ab")
            assert kendall_tau(one, other) == pytest.approx(plain_tau(one, other)), (one, other)
            names = [f"type{i}" for i in range(size)]
            base, against = dict(zip(names, one, strict=True)), dict(zip(names, other, strict=True))
            shuffled = {name: against[name] for name in rng.sample(names, size)}
            assert tau_of(base, shuffled) == pytest.approx(plain_tau(one, other))
            assert tau_of(base, shuffled, highest=True) == pytest.approx(plain_tau(one, [-x for x in other]))
            for k in range(1, size + 1):
                for highest in (False, True):
                    # equal scores keep their order, whichever end is wanted
                    places = sorted(range(size), key=lambda i: (-one[i] if highest else one[i], i))
                    assert pick(base, k, highest) == ranked(base, highest)[:k] == [names[i] for i in places[:k]]


def test_agreement_of_several_rankings():
    base = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    same_set, other_set = {"b": 1.0, "a": 2.0, "c": 3.0, "d": 4.0}, {"a": 1.0, "c": 2.0, "b": 3.0, "d": 4.0}
    opposite = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
    row = agreement("kind", "what", base, [same_set, other_set, opposite], 2)
    taus = [plain_tau(list(base.values()), [other[name] for name in base]) for other in (same_set, other_set, opposite)]
    assert (row["tau"], row["tau_low"]) == pytest.approx((sum(taus) / 3, min(taus)))
    assert row["same_pick"] == pytest.approx(1 / 3) and row["repeats"] == 3


@pytest.mark.parametrize("number", range(6))
def test_subsets_of_all_but_one_prompt_are_the_nine_that_there_are(number):
    """Random subsets of 8 of 9 prompts: their tau is on average that of leaving each prompt out once, and their least is
    the least of these; prompts that no module saw are not drawn."""
    rng = random.Random(number)
    types = ["a", "b", "a", "c", "", "d", "b", "e"]
    values = torch.tensor([[rng.gauss(1, 0.5) for _ in range(9)] for t in types], dtype=torch.float64)
    counts = torch.tensor([[rng.randint(1, 20) for _ in range(9)] for _ in types], dtype=torch.float64)
    counts[2, 4] = 0  # a prompt that one module alone did not see is drawn
    counts[0] *= 9  # a module of many tokens weighs as much as another of its type
    stats = torch.stack([values * counts, counts])
    unseen = torch.zeros(2, len(types), 3, dtype=torch.float64)
    report = report_of(torch.cat([unseen, stats], 2), types)
    names, mean_TM = averages(types)

    def scores(kept):
        return dict(zip(names, (mean_TM @ (stats[0, :, kept].sum(1) / stats[1, :, kept].sum(1))).tolist(), strict=True))

    whole, subsets = scores(list(range(9))), [scores([p for p in range(9) if p != out]) for out in range(9)]
    taus = [tau_of(whole, other) for other in subsets]
    same = [set(pick(other, 2)) == set(pick(whole, 2)) for other in subsets]
    assert len(set(taus)) > 1, "the data says something"
    (row,) = subset_rows(report, 2, seed=1, repeats=2000)
    assert row["what"] == "8 prompts" and row["repeats"] == 2000
    spread = math.sqrt(sum((t - sum(taus) / 9) ** 2 for t in taus) / 9 / 2000)
    assert row["tau"] == pytest.approx(sum(taus) / 9, abs=4 * spread) and row["tau_low"] == pytest.approx(min(taus))
    share = sum(same) / 9
    assert row["same_pick"] == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 2000))
    assert subset_rows(report, 2, seed=1, repeats=50) == subset_rows(report, 2, seed=1, repeats=50)
    assert subset_rows(report, 2, seed=1, repeats=50) != subset_rows(report, 2, seed=2, repeats=50)
    with pytest.raises(ConfigError):  # one prompt less leaves no subset
        subset_rows(report_of(torch.cat([unseen, stats[:, :, :8]], 2), types), 2)


def test_sizes_double_below_the_limit():
    for limit in range(1, 300):
        assert doubled_below(limit) == [size for size in (8, 16, 32, 64, 128, 256) if size < limit]


WORDS = ("a", "b", "")


def random_row(rng):
    """A row of few words, so that many are equal."""
    kind = rng.choice(("pair", "text", "messages", "chat"))
    unused = {"id": rng.randint(0, 1)} if rng.random() < 0.5 else {}
    if kind == "text":
        return {"text": rng.choice("ab"), **unused}
    if kind == "pair":
        columns = {"prompt": rng.choice(WORDS), "completion": rng.choice("ab"), **unused}
        return dict(rng.sample(sorted(columns.items()), len(columns)))
    roles = ["user", "assistant"] * rng.randint(1, 2)
    messages = [dict(rng.sample([("role", r), ("content", rng.choice("ab"))], 2)) for r in roles]
    tools = {"tools": [{"name": "f"}]} if rng.random() < 0.3 else {}
    if kind == "messages":
        return {"messages": messages, **tools, **unused}
    return {"prompt": messages[:1], "completion": messages[1:], **tools, **unused}


def said_of(row):
    """(what a row is: what compares equal for equal rows; the prompt before its last answer; those before all answers)"""
    if "text" in row:
        return ("text", row["text"]), None, []
    if isinstance(row.get("prompt"), str):
        return (
            ("pair", row["prompt"], row["completion"]),
            row["prompt"] or None,
            [row["prompt"]] if row["prompt"] else [],
        )
    given = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    talk = [(m["role"], m["content"]) for m in given]
    prompts = [("talk", *talk[:n]) for n, (role, _) in enumerate(talk) if role == "assistant"]
    return ("talk", bool(row.get("tools")), *talk), prompts[-1], prompts


def test_overlaps_are_what_two_loops_say():
    rng = random.Random(17)
    for _ in range(40):
        splits = {
            name: [(f"{name}:{i}", random_row(rng)) for i in range(1, rng.randint(1, 7))]
            for name in ("train", "valid", "test")
        }
        for found in overlaps(splits):
            ours, theirs = splits[found.first], splits[found.second]
            same = [(o, t) for o, one in ours for t, other in theirs if said_of(one)[0] == said_of(other)[0]]
            asked = [(o, t) for o, one in ours for t, other in theirs if said_of(other)[1] in said_of(one)[2]]
            assert found.rows == len({t for _, t in same}) and found.prompts == len({t for _, t in asked})
            assert found.total == len(theirs) and bool(found) == bool(same or asked)
            for example, pairs in ((found.same_row, same), (found.same_prompt, asked)):
                assert example in pairs if pairs else example is None
        pairs = [(found.first, found.second) for found in overlaps(splits)]
        assert pairs == [("train", "valid"), ("train", "test"), ("valid", "test")]
