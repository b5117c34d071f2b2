"""What a study makes of its trials, on made-up trials whose answers are known."""

import itertools
import math
from statistics import fmean, stdev

import pytest
import torch

from plopfast.studies.agreement import kendall_tau
from plopfast.studies.evidence import Trial, _exact_p, _mean, evidence
from plopfast.studies.plan import Cell
from plopfast.support.config import RunConfig

TYPES = ("q", "k", "v", "o", "gate", "up", "down")
ROWS = 60


def trial(losses, scores, *, name="m-t-b", others=None, same=None, control=False, noise=0.0, seeds=3, seed=0):
    """Each type of TYPES alone has its loss in `losses`; `others` are arms of several types. Rows and seeds scatter by `noise`."""
    generator = torch.Generator().manual_seed(seed)
    model, task, budget = name.split("-")
    tokens = torch.full((ROWS,), 2.0, dtype=torch.float64)
    arms, nats = [], {}
    for arm, loss in {**losses, **(others or {})}.items():
        scatter = noise * torch.randn(seeds, ROWS, generator=generator, dtype=torch.float64)
        nats[arm] = tokens * loss * (1 + scatter)
        mean = float(nats[arm].sum() / tokens.sum() / seeds)
        means = (nats[arm].sum(1) / tokens.sum()).tolist()
        runs = [{"valid_loss": loss, "loss": mean, "accuracy": 1 - loss, "seed": n} for n, mean in enumerate(means)]
        arms.append({"name": arm, "types": [arm] if arm in TYPES else ["q", "k"], "parameters": 9, "lr": 1e-3, "loss": mean,
                     "accuracy": 1 - loss, "forgetting": 10 * loss, "runs": runs})  # fmt: skip
    value = {
        "arms": arms, "dropped": [], "same": same or {}, "metric": "choice", "test_rows": ROWS, "seconds": 1.0,
        "base": {"loss": 2.0}, "criteria": {
            name: {"types": dict(zip(TYPES, of, strict=True)), "chooses": chooses} for name, (of, chooses) in scores.items()
        },
    }  # fmt: skip
    return Trial(Cell(name, model, task, budget, RunConfig(), control), value, nats, tokens)


def give(one, name, key, value):
    """Another value of an arm, at every seed."""
    arm = one.arm(name)
    arm[key] = value
    for run in arm["runs"]:
        run[key] = value


def alone(*losses):
    return dict(zip(TYPES, losses, strict=True))


UP = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
LOSSES = alone(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SCORES = {"plop": (UP, "lowest"), "energy": (UP, "highest"), "mixed": ([2.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0], "lowest")}


def test_tau_of_one_trial():
    found = evidence([trial(LOSSES, SCORES)])["trials"][0]["tau"]
    assert found["plop"]["valid"] == found["plop"]["test"] == 1 and found["energy"]["test"] == -1
    assert found["plop"]["p"] == found["energy"]["p"] == pytest.approx(2 / math.factorial(7))
    assert found["mixed"]["test"] == pytest.approx(19 / 21), "one of 21 pairs is exchanged"
    assert found["mixed"]["p"] == pytest.approx(2 * 7 / math.factorial(7)), (
        "6 neighbours to exchange, and the order itself"
    )
    assert found["plop"]["low"] == found["plop"]["high"] == 1, "nothing scatters"


def test_the_exact_p_is_that_of_a_count_by_hand():
    scores, losses = [3.0, 1.0, 2.0, 2.0], [0.4, 0.1, 0.3, 0.2]
    tau = abs(kendall_tau(scores, losses))
    count = [
        abs(kendall_tau([scores[i] for i in order], losses)) >= tau - 1e-9 for order in itertools.permutations(range(4))
    ]
    assert _exact_p([(scores, losses)]) == pytest.approx(sum(count) / 24)


def test_the_order_that_is_counts_among_random_ones():
    """Above eight types. p is never 0."""
    wide = [float(n) for n in range(12)]
    assert _exact_p([(wide, wide)]) == pytest.approx(1e-4)


def test_tasks_of_one_model_are_not_independent():
    """The same results three times tell no more than once: the order is tried on all of them."""
    trials = [trial(LOSSES, SCORES, name=f"m-t{n}-b") for n in range(3)]
    by_model = evidence(trials)["tau_by_model"]
    (row,) = [row for row in by_model if row["criterion"] == "mixed"]
    assert row["p"] == pytest.approx(14 / math.factorial(7)) and row["trials"] == 3 and row["types"] == 7


def test_intervals_grow_with_what_scatters():
    widths = []
    for noise in (0.0, 0.3, 3.0):
        of = evidence([trial(LOSSES, SCORES, noise=noise)])["trials"][0]["tau"]["plop"]
        assert of["low"] <= of["test"] <= of["high"]
        widths.append(of["high"] - of["low"])
    assert widths[0] == 0 < widths[1] < widths[2]


def test_rows_scatter_where_all_seeds_agree():
    """Half of the rows say the opposite of the other half, and a little more count for the order."""
    one = trial(LOSSES, SCORES)
    for number, nats in enumerate(one.nats.values()):
        nats[:, ::2] = 2.0 * (0.75 - 0.1 * number)
    of = evidence([one])["trials"][0]["tau"]["plop"]
    assert of["low"] < 0 < of["high"]


def test_seeds_scatter_too():
    """The rows are alike. What a seed does to all arms alike leaves their order; what it does to some of them does not."""
    for alike in (True, False):
        one = trial(LOSSES, SCORES, seeds=4)
        for number, nats in enumerate(one.nats.values()):
            factors = torch.tensor([0.2, 0.5, 2.0, 4.0], dtype=torch.float64)
            nats *= (factors if alike else factors.roll(number))[:, None]
        of = evidence([one])["trials"][0]["tau"]["plop"]
        assert (of["low"] == 1) == alike


def test_regret_is_held_against_the_best_by_validation_rows():
    one = trial(LOSSES, SCORES, others={"plop": 0.35, "all": 0.05, "full": 0.01}, same={"mlp": "all"})
    one.value["arms"][-1]["types"] = []  # all weights: no placement
    found = evidence([one])["trials"][0]
    assert (
        found["best"] == "all"
        and found["regret"]["plop"]["nats"] == pytest.approx(0.3)
        and "full" not in found["regret"]
    )
    assert found["regret"]["plop"]["accuracy"] == pytest.approx(0.3)
    assert found["regret"]["mlp"] == found["regret"]["all"] and found["regret"]["all"]["nats"] == 0
    give(one, "all", "loss", 0.4)
    assert evidence([one])["trials"][0]["regret"]["q"]["nats"] == pytest.approx(-0.3), "test rows can say otherwise"


def test_arms_are_compared_on_the_seeds_of_both():
    """The third seed is hard for all: an arm that was dropped before it is not the better for that, and neither is a type."""
    one = trial(LOSSES, SCORES, others={"plop": 0.3, "all": 0.15})
    for arm in one.value["arms"]:
        for key in ("loss", "valid_loss"):
            arm["runs"][2][key] += 5.0
        arm["loss"] += 5.0 / 3
    dropped = [arm for arm in one.value["arms"] if arm["name"] in ("q", "v")]
    for arm in dropped:
        del arm["runs"][2]
        one.nats[arm["name"]] = one.nats[arm["name"]][:2]
        arm["loss"] -= 5.0 / 3
    one.value["dropped"] = dropped
    one.value["arms"] = [arm for arm in one.value["arms"] if arm not in dropped]
    found = evidence([one])["trials"][0]
    assert found["best"] == "all" and found["regret"]["v"]["nats"] == pytest.approx(0.3 - 0.15)
    assert found["regret"]["v"]["above_plop"] == pytest.approx(0.0) and found["regret"]["q"][
        "above_plop"
    ] == pytest.approx(-0.2)
    assert found["tau"]["plop"]["test"] == found["tau"]["plop"]["valid"] == 1


def pairs(count, plop=0.3, all_=0.1, **more):
    return [
        trial(LOSSES, SCORES, others={"plop": plop + 0.01 * n, "all": all_ + 0.02 * n}, name=f"m{n % 2}-t{n}-b", **more)
        for n in range(count)
    ]


def test_means_over_pairs_average_budgets_first():
    many = [trial(LOSSES, SCORES, others={"plop": loss, "all": 0.05}, name=f"m-{task}-{budget}")
            for task, budget, loss in (("a", "r1", 0.2), ("a", "r2", 0.4), ("b", "r1", 0.9))]  # fmt: skip
    del many[0].value["arms"][-1]  # "all" is at one budget of a alone, and is held against plop there
    rows = {row["name"]: row for row in evidence(many)["regret"]}
    assert rows["all"]["versus"]["mean"] == pytest.approx((-0.35 - 0.85) / 2) and rows["all"]["pairs"] == 2
    row = rows["plop"]
    assert row["pairs"] == 2 and row["mean"] == pytest.approx(((0.1 + 0.35) / 2 + 0.85) / 2)


def test_the_interval_of_a_mean_is_students():
    values = [0.3, 0.1, 0.4, 0.1, 0.5, 0.9]
    found = _mean(dict(enumerate(values)), 0.95)
    half = 2.5706 * stdev(values) / math.sqrt(6)  # t of five degrees, from a table
    assert (found["low"], found["high"]) == pytest.approx((fmean(values) - half, fmean(values) + half), rel=1e-2)
    assert _mean({0: 0.3}, 0.95) == {"mean": 0.3, "low": None, "high": None, "pairs": 1}


def test_a_pick_against_plops():
    rows = {row["name"]: row for row in evidence(pairs(6))["regret"]}
    versus = rows["all"]["versus"]
    assert versus["mean"] == pytest.approx(-0.2 + 0.01 * 2.5) and versus["high"] < 0 and rows["plop"]["versus"] is None
    assert versus["p"] == pytest.approx(2 / 2**6), "all six differ in the same direction"
    assert versus["p_corrected"] >= versus["p"] and all(
        row["versus"]["p_corrected"] <= 1 for row in rows.values() if row["versus"]
    )


def test_a_pick_against_plops_of_each_model():
    rows = {(row["model"], row["name"]): row for row in evidence(pairs(6))["above_plop_by_model"]}
    assert rows["m0", "all"]["mean"] == pytest.approx(-0.2 + 0.01 * 2) and rows["m0", "all"]["pairs"] == 3
    assert rows["m1", "all"]["mean"] == pytest.approx(-0.2 + 0.01 * 3) and rows["m1", "all"]["p"] == 2 / 2**3
    assert ("m0", "plop") not in rows


def test_controls_are_shown_and_in_no_mean():
    more = trial(LOSSES, SCORES, others={"plop": 9.0, "all": 1.0}, name="noise-t-b", control=True)
    with_it, without = evidence([*pairs(6), more]), evidence(pairs(6))
    assert with_it["regret"] == without["regret"] and with_it["tau"] == without["tau"] and len(with_it["trials"]) == 7
    for part in ("tau_by_model", "above_plop_by_model"):
        assert {row["model"] for row in with_it[part]} == {"m0", "m1", "noise"}


def test_the_default_is_chosen_on_one_half_and_confirmed_on_the_other():
    found = evidence(pairs(8))["default"]
    assert found["chosen_on"] == ["m0 x t0", "m0 x t2", "m0 x t4", "m0 x t6"] and len(found["confirmed_on"]) == 4
    assert found["confirmed"] is False or found["versus"]["high"] < 0
    assert found["chosen"] == min(found["means"], key=found["means"].get)
    mixed = pairs(8)
    for number, one in enumerate(mixed):
        give(one, "all", "loss", 0.1 + 2.0 * (number in (1, 5)))  # bad on the half that confirms
        one.value["arms"] = [arm for arm in one.value["arms"] if arm["name"] in ("plop", "all")]
    found = evidence(mixed)["default"]
    assert found["chosen"] == "all" and not found["confirmed"] and found["versus"]["high"] > 0
    assert evidence(pairs(3))["default"] is None


def test_where_plop_is_best_nothing_is_confirmed():
    trials = [trial(LOSSES, SCORES, others={"plop": 0.01, "all": 0.5}, name=f"m-t{n}-b") for n in range(6)]
    found = evidence(trials)["default"]
    assert found["chosen"] == "plop" and found["versus"] is None and not found["confirmed"]
