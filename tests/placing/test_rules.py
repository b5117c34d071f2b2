"""The table of rules: one entry is all that a new rule takes, and every criterion can place."""

import dataclasses
import subprocess
import sys

import pytest
from helpers import build, random_batches

import plopfast as pf
from plopfast.cli.options import build_parser
from plopfast.data.labels import tokenize
from plopfast.data.rows import DEMO, read_jsonl
from plopfast.placing import rules
from plopfast.placing.rules import RULES, Rule, arm_names, nfn_rule
from plopfast.scoring.report import ModuleScore
from plopfast.studies.agreement import pick
from plopfast.studies.criteria import COMPUTE, Given, compared
from plopfast.studies.trial import listed_arms
from plopfast.support.errors import PlacementError

BOTH = ("kv_a_proj_with_mqa", "kv_b_proj", "kv_proj")  # keys and values in one
VALUES = ("v_proj.linear", "Wv", "self_attn.value_proj", "v_lin", "project_v")
CRITERIA = [rule.name for rule in RULES.values() if not rule.from_report]


@pytest.fixture
def report():
    scores = {
        f"model.layers.{layer}.{type_}": ModuleScore(nfn + 0.01 * layer, 0.1, 10, type_, layer, 8, 8)
        for layer in range(2)
        for type_, nfn in {"q_proj": 1.4, "v_proj": 0.6, "o_proj": 1.2}.items()
    }
    return pf.NFNReport(scores, 10, 1, 0.1, "some/model")


@pytest.fixture
def made_up(monkeypatch):
    rule = Rule(name="made-up", help="the last type by name", pick=lambda report, _k, _seed: [max(report.types)])
    monkeypatch.setitem(RULES, "made-up", rule)
    return rule


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help-all"])
    return " ".join(capsys.readouterr().out.replace("-\n", "-").split())


def test_a_made_up_rule_is_known_everywhere(made_up, report, capsys):
    assert pf.place(report, "made-up", rank=1).types == ["v_proj"]
    assert pf.place(report, "all", budget="match:made-up:r8").parameters <= 2 * 8 * 16
    assert rules.rule_of("made-up") == "made-up"
    assert "made-up (the last type by name)" in help_of("place", capsys)
    assert "made-up, strongest-module, full" in help_of("trial", capsys)
    assert listed_arms("plop,made-up") == ["plop", "made-up"]
    with pytest.raises(PlacementError, match="did you mean 'made-up'"):
        pf.place(report, "madeup")


@pytest.mark.parametrize(
    ("attention", "others"),
    [
        (["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"], ["o_proj", "mlp.gate_proj"]),  # DeepSeek
        (["Wq", "Wk", "Wv"], ["dense", "ffn.0"]),  # CTRL
        (["q_proj.linear", "v_proj.linear"], ["o_proj.linear", "fc1"]),  # Moshi
        (["self_attn.query_proj", "self_attn.key_proj", "self_attn.value_proj"], ["intermediate"]),  # ProphetNet
        (["q_lin", "k_lin", "v_lin"], ["out_lin", "lin1"]),  # XLM
        (["project_q", "project_k", "project_v"], ["attention_out"]),  # CPM-Ant
        (["kv_proj"], ["router.layer"]),  # JetMoe
    ],
    ids=lambda value: value[0],
)  # fmt: skip
def test_query_key_and_value_under_the_names_that_models_give_them(attention, others):
    scores = {f"h.0.{type_}": ModuleScore(1.0, 0.1, 10, type_, 0, 8, 8) for type_ in attention + others}
    report = pf.NFNReport(scores, 10, 1, 0.1, "some/model")
    assert sorted(pf.place(report, "attn", rank=1).types) == sorted(attention)

    without = pf.place(report, "no-qk", rank=1).types
    assert sorted(without) == sorted(others + [t for t in attention if t in BOTH or t in VALUES])


def test_a_made_up_ranking_by_nfn_decides_and_chooses_single_modules(report, monkeypatch):
    worst = Rule(name="worst", help="the k worst types", ranks_by=rules.NFN, highest=True, needs_k=True)
    monkeypatch.setitem(RULES, "worst", worst)
    for options in ({"k": 1, "rank": 2}, {"k": 2, "rank": 2}, {"granularity": "module", "budget": 32, "rank": 1}):
        found, known = pf.place(report, "worst", **options), pf.place(report, "plop-inverse", **options)
        assert dataclasses.replace(found, rule="plop-inverse") == known
    scored = pf.score(build("llama"), random_batches(8), confidence=0.9, k=1)
    assert scored.decide(2, 0.9, inverse=True).note in pf.place(scored, "worst", k=2, rank=2).notes


def test_outlier_layers_do_not_move_the_means_that_leave_them_out():
    usual, one = [1.0, 1.1, 0.9, 1.05, 0.95], 40.0
    without, middle = RULES["nfn-no-outliers"].mean, RULES["nfn-median"].mean
    assert without([*usual, one]) == without(usual) == pytest.approx(1) and middle([*usual, one]) == pytest.approx(
        1.025
    )
    assert without([2.0]) == 2 and without([1.0, 1.0, 3.0]) == pytest.approx(5 / 3), "no spread, no outlier"


def test_names_in_the_help(capsys):
    text = help_of("run", capsys)
    for name in ("plop", "plop-inverse", "attn", "mlp", "all", "random"):
        assert f"{name} ({RULES[name].help})" in text
    assert not [name for name in CRITERIA if name in text], "a run cannot place by them"
    assert "module types that plop, plop-inverse and random choose" in text
    assert arm_names() == [*RULES, "strongest-module", "full"]
    assert all(name in help_of("trial", capsys) for name in arm_names())


def test_every_rule_ranks_or_picks_and_every_criterion_is_computed():
    for name, rule in RULES.items():
        assert rule.name == name and rule.help and bool(rule.ranks_by) != bool(rule.pick)
    assert COMPUTE.keys() == {*CRITERIA, "random"}
    assert {rule.name for rule, _ in compared()} == {"input-spectrum", "condition-number", "gradient-energy", "random"}
    assert nfn_rule("plop-inverse").highest and nfn_rule("all") is nfn_rule("explicit") is None


@pytest.mark.parametrize("name", CRITERIA)
def test_each_criterion_places_what_the_audit_picks(name, tokenizer):
    model, examples = build("llama"), tokenize(read_jsonl(DEMO["train"])[:8], tokenizer)
    with_eva = pf.score(model, random_batches(), eva_rank=2)
    by_module = COMPUTE[name](Given(model, examples, 2, 0, False, lambda: with_eva, with_eva))
    placement = pf.place(with_eva, name, k=2, rank=8, criteria={name: by_module})
    rule, by_type = RULES[name], {}
    for module, score in with_eva.scores.items():
        by_type.setdefault(score.type, []).append(by_module[module])
    means = {type_: rule.mean(by_type[type_]) for type_ in with_eva.types}
    assert placement.types == pick(means, 2, rule.highest) and placement.rule == name and placement.margin is None
    assert set(placement.modules) == {n for n, s in with_eva.scores.items() if s.type in placement.types}
    best = (max if rule.highest else min)(means.values())
    assert means[placement.types[0]] == best
    matched = pf.place(with_eva, "all", budget=f"match:{name}:r8", k=2, criteria={name: by_module})
    assert 0 <= placement.parameters - matched.parameters < 80, "less than a rank of the largest module"


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_without_scores_says_how_to_get_them(name, report):
    with pytest.raises(
        PlacementError, match=f"rule '{name}' ranks by {RULES[name].ranks_by}.*criteria=.*studies.criteria"
    ):
        pf.place(report, name, k=1, rank=1)
    scores = dict.fromkeys(list(report.scores)[:-1], 1.0)
    with pytest.raises(
        PlacementError, match="expected a score for each of 6 modules, got none for 'model.layers.1.o_proj'"
    ):
        pf.place(report, name, k=1, rank=1, criteria={name: scores})
    with pytest.raises(PlacementError, match="k = 4: expected 1 to 3"):
        pf.place(report, name, k=4, rank=1, criteria={name: scores})


def test_the_table_needs_no_torch():
    code = "import sys, plopfast.placing.rules, plopfast.lora.placement; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
