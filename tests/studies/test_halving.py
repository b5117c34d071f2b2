"""Successive halving, equal placements and arms by other criteria, in a trial of a small model."""

import json

import pytest
from helpers import edit, plopfast

from plopfast.studies import by_criterion
from plopfast.studies.arms import trainings

ARMS = "plop,all,attn,weight-nfn,weight-size,nfn-median,gradient-energy,input-spectrum,condition-number"


def read(out):
    return json.loads((out / "trial.json").read_text())


@pytest.fixture
def options(base):
    return [*edit(base, "--rank", 4), "--lrs", "1e-2", "--seeds", "0,1,2"]


def test_the_better_half_gets_another_seed(options, tmp_path, capsys):
    """And what is left in the end has all of them; the first arm stays, as all others are held against it."""
    out = tmp_path / "run"
    words = ["--arms", "k_proj,q_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "--finalists", "2"]
    assert plopfast("trial", *options, *words, "--out", out) == 0
    trial = read(out)
    losses = {
        path.parents[1].name: json.loads(path.read_text())["valid_loss"]
        for path in out.glob("trial/*/lr-0.01-seed-0/result.json")
    }
    assert len(losses) == 7
    others = sorted(losses.keys() - {"k_proj"}, key=losses.get)
    second = {"k_proj", *others[:3]}
    assert {path.parents[1].name for path in out.glob("trial/*/lr-0.01-seed-1/result.json")} == second
    finalists = {arm["name"] for arm in trial["arms"]}
    assert len(finalists) == 2 and "k_proj" in finalists < second and trial["reference"] == "k_proj"
    assert {path.parents[1].name for path in out.glob("trial/*/lr-0.01-seed-2/result.json")} == finalists
    assert [len(arm["runs"]) for arm in trial["dropped"]] == [1 + (arm["name"] in second) for arm in trial["dropped"]]
    assert {arm["name"] for arm in trial["dropped"]} == losses.keys() - finalists
    assert all(
        arm["accuracy"] == pytest.approx(sum(r["accuracy"] for r in arm["runs"]) / len(arm["runs"]))
        for arm in trial["dropped"]
    )
    assert len(list(out.glob("trial/*/*/result.json"))) == 7 + 4 + 2 == trainings(7, 1, 3, 2)
    told = capsys.readouterr()
    assert "13/13" in told.err and "no further seed for" in told.err
    assert "Not all seeds" in told.out and all(name in told.out for name in losses)
    for path in out.glob("trial/*/*/test.json"):
        test = json.loads(path.read_text())
        assert sum(test["nats"]) / sum(test["tokens"]) == pytest.approx(test["loss"])
    assert plopfast("report", "--out", out) == 0
    page = (out / "report.html").read_text()
    assert all(arm["name"] in page for arm in trial["dropped"])


@pytest.mark.parametrize("scored", [False, True])
def test_arms_by_other_criteria(scored, options, tmp_path, monkeypatch, capsys):
    """Each places what its scores say, equal ones are trained once, and a resumed trial computes none again."""
    out = tmp_path / "run"
    words = ["--arms", f"{ARMS},strongest-module", "--finalists", "2", "--max-steps", "1"]
    options = edit(options, "--rank", 16)  # so that ranks can be shared out to 1 %
    if scored:
        assert plopfast("score", *options[:8], "--score-prompts", 12, "--out", out) == 0
    assert plopfast("trial", *options, *words, "--out", out) == 0
    trial = read(out)
    told = {arm["name"]: arm for arm in (*trial["arms"], *trial["dropped"])}
    assert {*told, *trial["same"]} >= {*ARMS.split(",")} | {"strongest-module"}
    assert not {*told} & {*trial["same"]} and {*trial["same"].values()} <= {*told}
    for name, of in trial["criteria"].items():
        order = sorted(of["types"], key=of["types"].get, reverse=of["chooses"] == "highest")
        assert set(told[trial["same"].get(name, name)]["types"]) == set(order[:3]), name
    kept = json.loads((out / "trial" / "criteria.json").read_text())
    assert {*trial["criteria"]} == {"plop", *kept} and len(kept) == 6
    one = told["strongest-module"]
    assert len(one["types"]) == 1 and one["parameters"] <= trial["budget"] * 1.01

    (out / "trial.json").unlink()
    monkeypatch.setattr(by_criterion, "COMPUTE", {})
    assert plopfast("trial", *options, *words, "--out", out, "--resume") == 0
    assert read(out)["criteria"] == trial["criteria"]
    capsys.readouterr()
