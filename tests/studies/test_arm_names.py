"""What the names of a trial's arms stand for."""

import json

import pytest
from helpers import edit, plopfast

from plopfast.placing.by_settings import placed
from plopfast.placing.rules import arm_names
from plopfast.scoring.report import ModuleScore, NFNReport
from plopfast.studies.arm_names import rules_of_arms
from plopfast.support.config import PlaceSettings
from plopfast.support.errors import ConfigError

TYPES = ("q_proj", "v_proj", "down_proj")


def report(layers, types=TYPES, slope=1.0):
    scores = {
        f"layers.{layer}.{type_}": ModuleScore(4.0 + slope * number, 0.0, 1, type_, layer, 8, 8)
        for layer in range(layers)
        for number, type_ in enumerate(types)
    }
    return NFNReport(scores, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["plop", "full"], {"plop": "plop", "full": "full"}),
        (["v_proj", "all"], {"v_proj": "v_proj", "all": "all"}),
        (["down_proj+q_proj"], {"down_proj+q_proj": "down_proj,q_proj"}),
        (["layers.1.v_proj+q_proj"], {"layers.1.v_proj+q_proj": "layers.1.v_proj,q_proj"}),
        (["plop", "each-type"], {"plop": "plop", "q_proj": "q_proj", "v_proj": "v_proj", "down_proj": "down_proj"}),
    ],
)
def test_names(names, expected):
    assert list(rules_of_arms(names, report(4)).items()) == list(expected.items())


def test_every_rule_is_an_arm():
    assert rules_of_arms(arm_names(), report(2)) == {name: name for name in arm_names()}


@pytest.mark.parametrize("layers", [3, 4, 5, 6, 30])
def test_thirds_hold_each_module_once_and_are_alike(layers):
    found = rules_of_arms(["each-layer-third"], report(layers))
    assert list(found) == ["layers-first", "layers-middle", "layers-last"]
    of = [[*placed(report(layers), PlaceSettings(rule=rule, rank=2)).modules] for rule in found.values()]
    assert sorted(name for names in of for name in names) == sorted(report(layers).scores)
    in_layers = [[int(name.split(".")[1]) for name in names] for names in of]
    assert max(in_layers[0]) < min(in_layers[1]) and max(in_layers[1]) < min(in_layers[2])
    assert max(map(len, of)) - min(map(len, of)) <= len(TYPES)


@pytest.mark.parametrize(
    ("names", "layers", "message"),
    [
        (["v_prj"], 4, "did you mean 'v_proj'"),
        (["plopp"], 4, "did you mean 'plop'"),
        (["v_proj+"], 4, "got ''"),
        (["v_proj+plop"], 4, "got 'plop'"),
        (["v_proj+v_proj"], 4, "twice"),
        (["each-type", "v_proj"], 4, "'v_proj' is there twice"),
        (["each-layer-third"], 2, "this model has 2"),
    ],
)
def test_names_that_cannot_be(names, layers, message):
    with pytest.raises(ConfigError, match=message):
        rules_of_arms(names, report(layers))


def test_types_are_in_the_models_order_whatever_their_scores():
    """A resumed trial has scores, which it began without, and its reference stays the first arm."""
    expected = list(rules_of_arms(["each-type"], report(4)))
    assert list(report(4, slope=-1.0).types) == expected[::-1]
    assert list(rules_of_arms(["each-type"], report(4, slope=-1.0))) == expected


def test_a_single_type_is_nothing_to_compare():
    with pytest.raises(ConfigError, match="each-type needs two module types"):
        rules_of_arms(["each-type"], report(4, types=TYPES[:1]))


def test_a_trial_of_module_types(base, tmp_path, capsys):
    """Each is adapted alone, with as many parameters, whatever NFN says of it."""
    options = edit(base, "--rank", 4)
    settings = ["--arms", "all,v_proj,o_proj+down_proj", "--lrs", "1e-2", "--out", tmp_path / "run"]
    assert plopfast("trial", *options, *settings) == 0, capsys.readouterr().err
    trial = json.loads((tmp_path / "run" / "trial.json").read_text())
    arms = {arm["name"]: arm for arm in trial["arms"]}
    assert list(arms) == ["all", "v_proj", "o_proj+down_proj"] and trial["reference"] == "all"
    assert arms["v_proj"]["types"] == ["v_proj"] and sorted(arms["o_proj+down_proj"]["types"]) == [
        "down_proj",
        "o_proj",
    ]
    assert all(abs(arm["parameters"] / trial["budget"] - 1) <= 0.01 for arm in arms.values())
    assert arms["v_proj"]["rank_low"] > arms["all"]["rank_low"]
    assert plopfast("report", "--out", tmp_path / "run") == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "o_proj+down_proj" in page


def test_an_unknown_type_is_named_before_any_work(base, tmp_path, capsys):
    assert plopfast("trial", *base, "--arms", "all,v_porj", "--out", tmp_path / "run") == 2
    assert "did you mean 'v_proj'" in capsys.readouterr().err and not (tmp_path / "run").exists()
