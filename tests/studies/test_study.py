"""`plopfast study` on a small model: its trials, what is left, what goes on, and what is not ours."""

import json

import pytest
from helpers import edit, plopfast

from plopfast.studies import study
from plopfast.support.lock import locked


@pytest.fixture
def plan(base, tmp_path):
    """Two tasks of one model, each with two arms, as options and a file."""
    value = dict(zip((name[2:].replace("-", "_") for name in base[::2]), base[1::2], strict=True))
    files = {name: str(value.pop(name)) for name in ("train", "valid", "test")}
    model = str(value.pop("model"))
    numbers = {name: json.loads(str(text)) for name, text in value.items()}
    path = tmp_path / "plan.json"
    plan = {
        **numbers, "rank": 8, "arms": "plop,all", "lrs": "1e-2",
        "models": {"small": {"model": model}}, "tasks": {"a": {**files, "seed": 1}, "b": {**files, "seed": 2}},
        "budgets": {"r8": {}},
    }  # fmt: skip
    path.write_text(json.dumps(plan))
    return path


def changed(plan, **more):
    plan.write_text(json.dumps(json.loads(plan.read_text()) | more))
    return plan


def call(plan, out):
    return plopfast("study", "--plan", plan, "--out", out)


def test_a_whole_study(plan, tmp_path, capsys, monkeypatch):
    """Each trial is one that `plopfast trial` makes, one model is loaded, and a second call does nothing again."""
    out, loads = tmp_path / "study", []
    plain = study.run_trial
    monkeypatch.setattr(study, "run_trial", lambda run: (loads.append(run), plain(run))[1])
    assert call(plan, out) == 0
    first = capsys.readouterr()
    assert len(loads) == 2 and loads[1].model is loads[0].model, "loaded once"
    found = json.loads((out / "study.json").read_text())
    assert [row["name"] for row in found["trials"]] == ["small-a-r8", "small-b-r8"] and found["left"] == {}
    for row in found["trials"]:
        trial = json.loads((out / row["name"] / "trial.json").read_text())
        assert [arm["loss"] for arm in row["arms"]] == [arm["loss"] for arm in trial["arms"]]
        assert trial["criteria"]["plop"]["types"] and row["same"] == trial["same"]
        best = min(row["arms"], key=lambda arm: arm["valid_loss"])
        assert row["best"] == best["name"]
        assert row["regret"]["all"]["nats"] == pytest.approx(
            next(arm["loss"] for arm in row["arms"] if arm["name"] == "all") - best["loss"]
        )
    assert {row["name"] for row in found["regret"]} == {"plop", "all"} and all(
        row["pairs"] == 2 for row in found["regret"]
    )
    assert (
        "What each pick costs" in first.out and "small-b-r8" in first.out and "study: small-b-r8, 2 of 2" in first.err
    )
    assert plopfast("report", "--out", out / "small-a-r8") == 0
    capsys.readouterr()
    assert call(plan, out) == 0 and not loads[2].is_loaded and capsys.readouterr().out == first.out
    assert json.loads((out / "study.json").read_text()) == found


def test_a_trial_that_cannot_be_run_leaves_the_others(plan, tmp_path, capsys):
    value = json.loads(plan.read_text())
    value["tasks"]["a"]["arms"] = "plop,atn"
    out = tmp_path / "study"
    assert call(changed(plan, tasks=value["tasks"]), out) == 1
    printed = capsys.readouterr()
    found = json.loads((out / "study.json").read_text())
    assert "small-a-r8: arms: expected some of" in printed.err and "'atn'" in found["left"]["small-a-r8"]
    assert [row["name"] for row in found["trials"]] == ["small-b-r8"]
    assert call(changed(plan, trials=["small-a-r8"]), out) == 2
    assert "no trial of" in (said := capsys.readouterr().err) and "'atn'" in said


def test_it_goes_on_where_it_was_interrupted(plan, tmp_path, capsys, monkeypatch):
    out, plain = tmp_path / "study", study.run_trial

    def interrupted(run):
        monkeypatch.setattr("plopfast.studies.arms.look", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        return plain(run)

    monkeypatch.setattr(study, "run_trial", interrupted)
    with monkeypatch.context() as patch:
        patch.setattr("plopfast.studies.trial.look", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call(plan, out) == 130
    before = {path: path.stat().st_mtime_ns for path in out.glob("small-a-r8/trial/*/*/result.json")}
    assert before and not (out / "small-a-r8" / "trial.json").exists()
    monkeypatch.undo()
    assert call(plan, out) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "no training is done again"
    capsys.readouterr()


def test_a_trial_that_another_process_holds_is_left_to_it(plan, tmp_path, capsys, monkeypatch):
    """As far as this process knows, the lock is somebody else's."""
    out = tmp_path / "study"
    with locked(out / "small-a-r8"):
        monkeypatch.setattr("plopfast.support.lock._held", set())
        assert call(plan, out) == 1
    assert "in use by" in capsys.readouterr().err
    assert "in use by" in json.loads((out / "study.json").read_text())["left"]["small-a-r8"]


def test_other_settings_than_a_trial_had_are_named(plan, tmp_path, capsys):
    """Of a finished one, too: its results are of other settings than the plan says."""
    out = tmp_path / "study"
    assert call(changed(plan, trials=["small-a-r8"]), out) == 0
    assert call(changed(plan, lrs="2e-2", trials=["small-a-r8", "small-b-r8"]), out) == 1
    assert "began with other inputs: lrs was 1e-2, is 2e-2" in capsys.readouterr().err
    assert [row["name"] for row in json.loads((out / "study.json").read_text())["trials"]] == ["small-b-r8"]


def test_a_trial_of_an_earlier_version_is_named(plan, tmp_path, capsys):
    out = tmp_path / "study"
    assert call(changed(plan, trials=["small-a-r8"]), out) == 0
    path = out / "small-a-r8" / "trial.json"
    value = json.loads(path.read_text())
    del value["criteria"]
    path.write_text(json.dumps(value))
    assert call(plan, out) == 2
    assert "small-a-r8/trial.json: of an earlier version" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", '{"mine": 1}'])
def test_a_file_of_somebody_else_stays(plan, tmp_path, capsys, text):
    out = tmp_path / "study"
    out.mkdir()
    (out / "study.json").write_text(text)
    assert call(plan, out) == 2
    assert "study.json: in the way, and not a study of plopfast" in capsys.readouterr().err
    assert (out / "study.json").read_text() == text


def test_what_it_needs(plan, tmp_path, capsys):
    assert plopfast("study", "--plan", plan) == 2 and "--out DIR" in capsys.readouterr().err
    assert plopfast("study", "--out", tmp_path / "x") == 2 and "--plan FILE" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    options = edit(["--plan", plan], "--plan", tmp_path / "absent.json")
    assert plopfast("study", *options, "--out", tmp_path / "x") == 2 and "absent.json" in capsys.readouterr().err
