"""Rules and budgets against slow, plain accounts of them, on many small random models; and at their limits.

A model here has types whose names are parts of others' names, of other numbers of layers and other shapes, equal scores,
and an output head, which no rule may choose.
"""

import math
import random
from decimal import Decimal
from statistics import fmean, median

import pytest

import plopfast as pf
from plopfast.placing.budget import allowed_parameters, parameters_at, share_out
from plopfast.placing.rules import RULES, arm_names, command_rules, rule_of
from plopfast.scoring.report import ModuleScore, NFNReport
from plopfast.support.errors import PlacementError

TYPES = ("q_proj", "proj", "attn.q", "attn.o", "up_proj", "mlp.c_proj", "c_proj", "a", "aa")
SCORES = (0.0, 0.5, 0.5, 1.0, 1.0, 1.5)  # with ties


def model(rng, most_types=5, ties=True):
    """A report of a random model: its modules layer by layer, as a model has them."""
    types = rng.sample(TYPES, rng.randint(1, most_types))
    shapes = {kind: (rng.randint(2, 6), rng.randint(2, 6)) for kind in types}
    layers = {kind: rng.sample(range(12), rng.randint(1, 3)) for kind in types}
    scores = {"lm_head": ModuleScore(0.01, 0.1, 10, "lm_head", None, 4, 50)}
    for layer in range(12):
        for kind in types:
            if layer in layers[kind]:
                nfn = rng.choice(SCORES) if ties else rng.uniform(0.1, 2)
                scores[f"layers.{layer}.{kind}"] = ModuleScore(nfn, 0.1, 10, kind, layer, *shapes[kind])
    return NFNReport(scores, 10, 1, 0.1, f"model {rng.random()}")


def models(count, seed, **options):
    rng = random.Random(seed)
    return [(rng, model(rng, **options)) for _ in range(count)]


def layered(report):
    return {name: score for name, score in report.scores.items() if score.layer is not None}


def type_means(report):
    """Type -> mean NFN, lowest first; equal means in the order in which the model has the types."""
    kinds = list(dict.fromkeys(score.type for score in layered(report).values()))
    means = {kind: fmean(s.nfn for s in layered(report).values() if s.type == kind) for kind in kinds}
    return {kind: means[kind] for kind in sorted(kinds, key=lambda kind: (means[kind], kinds.index(kind)))}


def modules_of(report, types):
    return [name for name, score in layered(report).items() if score.type in types]


def size_of(report, modules, rank):
    return sum(rank * (report.scores[name].n_in + report.scores[name].n_out) for name in modules)


def full(score):
    return min(score.n_in, score.n_out)


@pytest.mark.parametrize("rule, sign", [("plop", 1), ("plop-inverse", -1)])
def test_the_k_lowest_and_highest_types_for_every_k(rule, sign):
    for rng, report in models(25, seed=sign):
        means = type_means(report)
        kinds = list(means)
        order = sorted(kinds, key=lambda kind: (sign * means[kind], kinds.index(kind)))
        for k in range(1, len(order) + 1):
            rank, alpha = rng.randint(1, 2), rng.uniform(0.5, 40)
            found = pf.place(report, rule, k=k, rank=rank, alpha=alpha)
            assert found.types == order[:k] and list(found.modules) == modules_of(report, order[:k])
            assert set(found.modules.values()) == {(rank, alpha)} and found.rule == rule
            assert found.parameters == size_of(report, found.modules, rank) and found.model == report.model
            assert found.shapes == {n: (report.scores[n].n_out, report.scores[n].n_in) for n in found.modules}
            if k == len(order):
                assert found.margin is None
            else:
                assert found.margin == pytest.approx(abs(means[order[k]] - means[order[k - 1]])) and found.margin >= 0
        for k in (0, len(order) + 1, -1):
            with pytest.raises(PlacementError):
                pf.place(report, rule, k=k, rank=1)


def without_outliers(values):
    """The mean of those within 3.5 times 1.4826 median absolute deviations of the median."""
    apart = [abs(value - median(values)) for value in values]
    return fmean(
        v for v, far in zip(values, apart, strict=True) if far <= 3.5 * 1.4826 * median(apart) or not median(apart)
    )


# rule -> (what makes a type's score of its modules', whether the highest is chosen), as the papers have it
RANKINGS = {
    "input-spectrum": (fmean, True),  # EVA: where the inputs lie along a few directions
    "condition-number": (lambda values: math.exp(fmean(map(math.log, values))), False),  # KappaTune: a ratio's mean
    "gradient-energy": (fmean, True),
    "nfn-median": (median, False),
    "nfn-no-outliers": (without_outliers, False),
    "nfn-per-size": (fmean, False),
    "weight-nfn": (fmean, False),
    "weight-size": (fmean, True),
}


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.from_report])
def test_other_scores_rank_by_their_mean_and_from_their_end(rule):
    mean, highest = RANKINGS[rule]
    other_mean = 0
    for rng, report in models(30, seed=3):
        given = {name: math.exp(rng.uniform(-3, 3)) for name in report.scores}
        given["lm_head"] = 1e9 if highest else 1e-9  # no part of any type
        means = {k: mean([given[n] for n in modules_of(report, [k])]) for k in type_means(report)}
        order = sorted(means, key=lambda kind: -means[kind] if highest else means[kind])
        arithmetic = {k: fmean([given[n] for n in modules_of(report, [k])]) for k in means}
        other_mean += order != sorted(means, key=lambda kind: -arithmetic[kind] if highest else arithmetic[kind])
        for k in range(1, len(order) + 1):
            assert pf.place(report, rule, k=k, rank=1, criteria={rule: given}).types == order[:k]
        for absent in layered(report):
            with pytest.raises(PlacementError):
                some = {name: value for name, value in given.items() if name != absent}
                pf.place(report, rule, k=1, rank=1, criteria={rule: some})
        pf.place(report, rule, k=1, rank=1, criteria={rule: {n: given[n] for n in layered(report)}})
    assert (other_mean > 0) == (mean is not fmean)


def test_names_choose_exactly_what_they_name():
    for rng, report in models(40, seed=4):
        known = [*type_means(report), *layered(report)]
        names = rng.sample(known, rng.randint(1, min(3, len(known))))
        found = pf.place(report, names, rank=1)
        chosen = [name for name, score in layered(report).items() if name in names or score.type in names]
        assert list(found.modules) == chosen and found.margin is None
        kinds = {report.scores[name].type for name in chosen}
        assert found.types == [kind for kind in type_means(report) if kind in kinds], "lowest NFN first"
        for wrong in ("lm_head", "layers", "layers.0", "proj.", ""):
            with pytest.raises(PlacementError):
                pf.place(report, [*names, wrong], rank=1)


def test_a_random_choice_depends_on_the_names_and_the_seed_alone():
    """Not on the scores, nor on the order of the modules; each type is drawn as often as another."""
    drawn = dict.fromkeys(TYPES, 0)
    rng = random.Random(5)
    reports = []
    for _ in range(2):
        kinds = rng.sample(TYPES, len(TYPES))
        scores = {f"layers.0.{kind}": ModuleScore(rng.uniform(0.5, 2), 0.1, 10, kind, 0, 4, 4) for kind in kinds}
        reports.append(NFNReport(scores, 10, 1, 0.1))
    for seed in range(300):
        one, other = (pf.place(report, "random", k=3, rank=1, seed=seed).types for report in reports)
        assert one == other and len(set(one)) == 3
        for kind in one:
            drawn[kind] += 1
    assert all(abs(count - 100) < 5 * math.sqrt(300 * 2 / 9) for count in drawn.values()), drawn


def slow_shares(budget, modules, proportional):
    """Ranks one by one: to the module with the most weight for each rank it would then have, of those that have room."""
    order = sorted(modules, key=lambda name: modules[name].nfn)
    given = dict.fromkeys(modules, 1)
    while True:
        left = budget - sum(given[n] * (s.n_in + s.n_out) for n, s in modules.items())
        room = [n for n in order if modules[n].n_in + modules[n].n_out <= left and given[n] < full(modules[n])]
        if not room:
            return given
        price = {n: (given[n] + 1) * (modules[n].nfn if proportional else 1) for n in room}
        given[min(room, key=lambda n: (price[n], order.index(n)))] += 1


@pytest.mark.parametrize("proportional", [False, True])
def test_a_budget_is_shared_out_rank_by_rank(proportional):
    for rng, report in models(40, seed=6):
        modules = layered(report)
        least, most = size_of(report, modules, 1), sum(size_of(report, [n], full(s)) for n, s in modules.items())
        for budget in {least, most, *(rng.randint(least, most) for _ in range(6))}:
            found = share_out(budget, modules, proportional)
            assert found == slow_shares(budget, modules, proportional) and list(found) == list(modules)
            spent = sum(parameters_at(rank, modules[name]) for name, rank in found.items())
            room = [s.n_in + s.n_out for n, s in modules.items() if found[n] < full(s)]
            assert spent <= budget and budget - spent < min(room, default=math.inf)
        assert share_out(least, modules, proportional) == dict.fromkeys(modules, 1)
        assert share_out(most, modules, proportional) == {name: full(score) for name, score in modules.items()}
        for budget in (least - 1, most + 1, 0, -1):
            with pytest.raises(PlacementError):
                share_out(budget, modules, proportional)


def test_a_budget_in_a_placement_is_that_of_its_modules():
    """At every budget that a placement's own modules allow, and at none beside; what is noted of it is true."""
    for rng, report in models(25, seed=7):
        rule, k, seed = rng.choice(command_rules()), rng.randint(1, len(type_means(report))), rng.randint(0, 9)
        try:
            modules = {n: report.scores[n] for n in pf.place(report, rule, k=k, rank=1, seed=seed).modules}
        except PlacementError:
            continue  # a rule that knows none of the types
        most = sum(size_of(report, [n], full(s)) for n, s in modules.items())
        for budget in (size_of(report, modules, 1), rng.randint(size_of(report, modules, 1), most), most):
            for ranks in ("equal", "proportional"):
                options = {"k": k, "seed": seed, "budget": budget, "ranks": ranks, "alpha": 3.5}
                found = pf.place(report, rule, **options)
                shares = slow_shares(budget, modules, ranks == "proportional")
                assert found.modules == {name: (rank, 3.5) for name, rank in shares.items()}
                assert found.parameters == sum(size_of(report, [n], r) for n, r in shares.items()) <= budget
                assert f"{budget - found.parameters:,} of them left" in found.notes[-1]
                # a rank other than the one that was asked for is said, also where it is one for all
                asked = pf.place(report, rule, rank=1, **options)
                moved = set(shares.values()) != {1}
                kept = pf.place(report, rule, k=k, seed=seed, rank=1).notes
                assert len(asked.notes) == len(kept) + 1 + moved


def test_a_matched_budget_is_that_of_the_other_rule():
    """With the same k, seed and scores: k types at rank r are matched by themselves, to the parameter."""
    for rng, report in models(40, seed=8):
        k, seed = rng.randint(1, len(type_means(report))), rng.randint(0, 9)
        least = min(full(score) for score in layered(report).values())
        rank = rng.randint(1, least)
        for rule in ("plop", "plop-inverse", "all", "random"):
            own = pf.place(report, rule, k=k, seed=seed, rank=rank)
            matched = pf.place(report, rule, k=k, seed=seed, rank=7, budget=f"match:{rule}:r{rank}")
            assert matched.modules == own.modules and matched.parameters == own.parameters


def slow_modules(report, budget, rank, cap, highest):
    """Modules by NFN, each paid at `rank` (at full rank where that is less), until one cannot be paid."""
    names = sorted(layered(report), key=lambda n: -report.scores[n].nfn if highest else report.scores[n].nfn)
    taken = []
    for name in names:
        score = report.scores[name]
        if cap is not None and [report.scores[n].type for n in taken].count(score.type) == cap:
            continue
        paid = sum(size_of(report, [n], min(rank, full(report.scores[n]))) for n in [*taken, name])
        if paid > budget:
            break
        taken.append(name)
    return [name for name in layered(report) if name in taken]


@pytest.mark.parametrize("rule", ["plop", "plop-inverse"])
def test_single_modules_one_by_one_while_the_budget_lasts(rule):
    exact = 0
    for rng, report in models(40, seed=9):
        rank, cap = rng.randint(1, 7), rng.choice((None, 1, 2))
        sizes = [size_of(report, [n], min(rank, full(s))) for n, s in layered(report).items()]
        for budget in (min(sizes) - 1, min(sizes), rng.randint(min(sizes), sum(sizes)), sum(sizes) - 1, sum(sizes)):
            taken = slow_modules(report, budget, rank, cap, rule == "plop-inverse")
            options = {"rank": rank, "budget": budget, "cap": cap, "granularity": "module"}
            if not taken or budget > sum(size_of(report, [n], full(report.scores[n])) for n in taken):
                with pytest.raises(PlacementError):
                    pf.place(report, rule, **options)
                continue
            found = pf.place(report, rule, **options)
            assert list(found.modules) == taken and found.parameters <= budget
            kinds = {report.scores[name].type for name in taken}
            assert found.types == [kind for kind in type_means(report) if kind in kinds]
            assert {n: r for n, (r, _) in found.modules.items()} == slow_shares(
                budget, {n: report.scores[n] for n in taken}, False
            )
            exact += sum(size_of(report, [n], min(rank, full(report.scores[n]))) for n in taken) == budget
        for wrong in ({"rank": 0}, {"rank": 1, "cap": 0}):
            with pytest.raises(PlacementError):
                pf.place(report, rule, budget=sum(sizes), granularity="module", **wrong)
        with pytest.raises(PlacementError):
            pf.place(report, rule, rank=1, cap=1)
    assert exact > 5, "budgets that pay exactly were met"


def test_ranks_up_to_full_rank_and_none_above():
    for _, report in models(20, seed=10):
        fulls = {name: full(score) for name, score in layered(report).items()}
        most = min(fulls.values())
        assert pf.place(report, "all", rank=most).parameters == size_of(report, layered(report), most)
        for rank in range(1, max(fulls.values()) + 1):
            ranks = {name: given for name, (given, _) in pf.place(report, "all", rank=rank).modules.items()}
            assert ranks == {name: min(rank, most) for name, most in fulls.items()}
        for rank in (0, max(fulls.values()) + 1):
            with pytest.raises(PlacementError):
                pf.place(report, "all", rank=rank)


def test_budgets_in_every_unit_are_exact():
    rng, units = random.Random(11), {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}
    inbytes = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for unit, one in {**units, **inbytes}.items():
        for _ in range(20):
            number = rng.choice((f"{rng.randint(0, 9999)}", f"{rng.randint(0, 99)}.{rng.randint(0, 999):03}"))
            whole = Decimal(number) * one / (4 if unit in inbytes else 1)
            for text in (f"{number}{unit}", f" {number} {unit} "):
                assert allowed_parameters(text, lambda *_: 0) == int(whole), text
    asked = []
    assert allowed_parameters("match:all:r12", lambda *given: asked.append(given) or 5) == 5 and asked == [("all", 12)]
    assert allowed_parameters(7, lambda *_: 0) == 7
    for wrong in (True, False, "", "-1", "1e3", "1 XB", "M", "match:all", "match:all:r", "1.5.2", None):
        with pytest.raises(PlacementError):
            allowed_parameters(wrong, lambda *_: 0)


def test_the_attention_and_the_mlp_by_their_last_names_and_parents():
    kinds = {
        "attn.q": "attn", "self_attn.k_proj": "attn", "qkv_proj": "attn", "attn.o": "", "o_proj": "", "mlp.c_fc": "mlp",
        "c_proj": "", "mlp.c_proj": "mlp", "gate_up_proj": "mlp", "dense": "mlp", "q_norm": "",
    }  # fmt: skip
    parents = {"dense": "ffn.", "c_proj": "attn."}
    scores = {
        f"mlp_tower.layers.0.{parents.get(kind, '')}{kind}": ModuleScore(1.0, 0.1, 10, kind, 0, 8, 8) for kind in kinds
    }
    report = NFNReport(scores, 10, 1, 0.1)
    for rule in ("attn", "mlp"):
        assert pf.place(report, rule, rank=1).types == [kind for kind, part in kinds.items() if part == rule]
    assert pf.place(report, "all", rank=1).types == list(kinds)


def test_a_setting_names_a_rule_or_a_list():
    for name in RULES:
        assert rule_of(name) == name
    assert rule_of(" q_proj , layers.0.up ,, ") == ["q_proj", "layers.0.up"]
    assert rule_of("plop,") == ["plop"] and rule_of("") == []
    assert arm_names() == [*RULES, "strongest-module", "full"] and {*command_rules()} < {*RULES}
