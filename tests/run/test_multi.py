"""`plopfast multi`: every job's folder is that of a run of its own, and what is wrong with the jobs is said before anything."""

import json
import re
import signal

import pytest
import torch
from helpers import build
from safetensors.torch import load_file

import plopfast as pf
from plopfast.cli.main import main
from plopfast.data.rows import DEMO
from plopfast.run.jobs import read_jobs
from plopfast.support.config import RunConfig
from plopfast.support.errors import ConfigError
from plopfast.training.together import Together

JOBS = {
    "legal": {"rank": 3, "lr": 0.01, "max_steps": 6, "score_prompts": 6},
    "support": {"rule": "q_proj,down_proj", "rank": 2, "alpha": 3.0, "seed": 4, "max_steps": 4, "schedule": "linear", "batch_rows": 3},
    "third": {"k": 1, "epochs": 0.2, "score_prompts": 5, "learn": "all"},
}  # fmt: skip


@pytest.fixture
def world(tmp_path, model_folder):
    """(options of all jobs, a file of jobs with rows of their own)"""
    lines = DEMO["train"].read_text().splitlines()
    jobs = {}
    for number, (name, job) in enumerate(JOBS.items()):
        for split, count in (("train", 30), ("test", 8)):
            file = tmp_path / f"{name}-{split}.jsonl"
            file.write_text("".join(line + "\n" for line in lines[number * 50 + (split == "test") * 35 :][:count]))
            job = {**job, split: str(file)}
        jobs[name] = job
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps({"eval_every": 2, "eval_rows": 4, "jobs": jobs}))
    return [f"--model={model_folder}", "--device=cpu", "--batch-tokens=200"], path, jobs


def words(job):
    return [f"--{name.replace('_', '-')}={value}" for name, value in job.items()]


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_each_folder_is_that_of_a_run_of_its_own(world, tmp_path, capsys):
    shared, path, jobs = world
    out = tmp_path / "out"
    assert main(["multi", "--jobs", str(path), "--out", str(out), *shared]) == 0
    table = capsys.readouterr().out
    told = json.loads((out / "multi.json").read_text())["jobs"]
    for name, job in jobs.items():
        folder, alone = out / "jobs" / name, tmp_path / f"alone-{name}"
        assert main(["run", "--out", str(alone), *shared, "--eval-every=2", "--eval-rows=4", *words(job)]) == 0
        for file in ("scores.json", "placement.json", "data.json"):
            one, other = (json.loads((at / file).read_text()) for at in (folder, alone))
            assert {k: v for k, v in one.items() if k != "seconds"} == {
                k: v for k, v in other.items() if k != "seconds"
            }, file
        ours, theirs = weights(folder), weights(alone)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (ours[key] - value).norm() <= 2e-3 * value.norm(), key
        held = [{path.name for path in (at / "adapter").iterdir()} for at in (folder, alone)]
        assert held[0] == held[1] and {"README.md", "tokenizer.json"} <= held[0]
        cards = [(at / "adapter" / "README.md").read_text().split("## Training") for at in (folder, alone)]
        assert cards[0][1].partition("validation loss")[0] == cards[1][1].partition("validation loss")[0]
        tested = [json.loads((at / "eval.json").read_text()) for at in (folder, alone)]
        assert f"| {tested[0]['base']['accuracy']:.1%} | {tested[0]['tuned']['accuracy']:.1%} |" in cards[0][0]
        for who in ("base", "tuned"):
            assert tested[0][who]["loss"] == pytest.approx(tested[1][who]["loss"], rel=1e-4)
        lines = [(at / "metrics.jsonl").read_text().splitlines() for at in (folder, alone)]
        losses = [[one.get("loss", one.get("valid_loss")) for one in map(json.loads, of)] for of in lines]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        training = json.loads((folder / "training.json").read_text())
        assert training["steps"] == told[name]["steps"] == sum('"lr"' in line for line in lines[1])
        assert "computed together: 3 adapters" in "".join(training["paths"])
        assert told[name]["after"]["loss"] == tested[0]["tuned"]["loss"] and re.search(
            rf"^{name} +{training['steps']} ", table, re.M
        )
        assert (folder / "report.html").exists() and not (folder / "checkpoints").exists()
        assert main(["verify", str(folder)]) == 0 and main(["eval", "--overwrite", "--out", str(folder)]) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["multi", "--jobs", str(path), "--out", str(out), *shared]) == 2  # its results stay
    assert (
        main(["multi", "--jobs", str(path), "--out", str(out), *shared, "--overwrite", "--max-steps=1", "--at-once=2"])
        == 0
    )


def test_a_few_at_a_time(world, tmp_path, monkeypatch):
    shared, path, _ = world
    seen, plain = set(), Together._step
    monkeypatch.setattr(Together, "_step", lambda self, meter: (seen.add(len(self._running)), plain(self, meter)))
    assert main(["multi", "--jobs", str(path), "--out", str(tmp_path / "out"), *shared, "--at-once=2"]) == 0
    assert max(seen) == 2


def test_a_job_that_diverges_ends_alone(world, tmp_path, capsys):
    shared, path, jobs = world
    jobs["legal"]["lr"] = 1e37
    path.write_text(json.dumps({"eval_every": 2, "eval_rows": 4, "jobs": jobs}))
    out = tmp_path / "out"
    assert main(["multi", "--jobs", str(path), "--out", str(out), *shared]) == 1
    assert re.search(r"^legal .*training stopped", capsys.readouterr().out, re.M)
    told = json.loads((out / "multi.json").read_text())["jobs"]
    assert "error" in told["legal"] and not any("error" in told[name] for name in ("support", "third"))
    assert not (out / "jobs" / "legal" / "adapter").exists() and (out / "jobs" / "third" / "adapter").exists()
    assert main(["multi", "--jobs", str(path), "--out", str(out), *shared, "--resume"]) == 1


def test_interrupted_and_resumed(world, tmp_path, monkeypatch, capsys):
    import os

    shared, path, _ = world
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["multi", "--jobs", str(path), "--out", str(whole), *shared]) == 0
    plain = Together._step

    def step(self, meter):
        plain(self, meter)
        if self.jobs["legal"].step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Together, "_step", step)
    assert main(["multi", "--jobs", str(path), "--out", str(parts), *shared]) == 130
    assert "legal after step 5 of 6" in capsys.readouterr().err and not (parts / "multi.json").exists()
    went_on, words = [], ["multi", "--jobs", str(path), "--out", str(parts), *shared]
    monkeypatch.setattr(
        Together, "_step", lambda self, meter: (went_on.append(self.jobs["legal"].step), plain(self, meter))
    )
    assert main(words) == 2, "unfinished jobs are not begun anew unasked"
    assert main([*words, "--resume"]) == 0 and went_on[0] == 5
    for name in JOBS:
        ours, theirs = (weights(at / "jobs" / name) for at in (parts, whole))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ({}, 'expected "jobs", a mapping of names'), ([], 'expected "jobs"'), ({"jobs": {}}, 'expected "jobs"'),
        ({"jobs": {"a": {"model": "other"}}}, "job 'a': model is None for all, as all jobs train on one base, with its tokenizer"),
        ({"jobs": {"a": {"quantize": "nf4"}}}, "one base, with its tokenizer"),
        ({"jobs": {"a": {"packing": True}}}, "packing is False for all, as all jobs are computed in one pass: .*--packing"),
        ({"jobs": {"a": {"arms": "x,y"}}}, "arms is no setting of a training"),
        ({"jobs": {"a": {"full": True}}}, "full is no setting of a training"),
        ({"jobs": {"a": {"rnk": 3}}}, "job 'a'.*unknown setting 'rnk'.*rank"), ({"jobs": {"a": {"rank": 0}}}, "job 'a': rank"),
        ({"jobs": {"a": {"rank": "x"}}}, "job 'a': rank: expected int"), ({"rank": -1, "jobs": {"a": {}}}, "rank"),
        ({"jobs": {"a": 3}}, "job 'a': expected a mapping of settings, got 3"), ({"jobs": {"../a": {}}}, "its folder has this name"),
        ({"jobs": {"a": {}, "A": {}}}, "other than another job's in any case"), ({"jobs": {"": {}}}, "its folder"),
    ],
)  # fmt: skip
def test_jobs_that_cannot_be(tmp_path, jobs, message):
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    with pytest.raises(ConfigError, match=message):
        read_jobs(path, RunConfig())


def test_settings_of_the_file_and_of_a_job(tmp_path):
    path = tmp_path / "jobs.yaml"
    path.write_text(
        "lr: 5e-4\nmax_steps: 7\nmodel: here\njobs:\n  a: {rank: 3, epochs: 2}\n  b: {lr: 1e-3, model: here}\n"
    )
    common, found = read_jobs(path, RunConfig(alpha=5.0, rank=9))
    assert (common.lr, common.max_steps, common.model) == (5e-4, 7, "here")
    assert [(c.lr, c.max_steps, c.epochs, c.rank, c.alpha, c.model) for c in found.values()] == [
        (5e-4, None, 2.0, 3, 5.0, "here"),
        (1e-3, 7, None, 9, 5.0, "here"),
    ]


def test_what_is_wrong_is_said_before_anything_is_trained(world, tmp_path, capsys):
    shared, path, jobs = world
    for change, message in (
        ({"train": str(tmp_path / "none.jsonl")}, "none.jsonl"), ({"rule": "no_proj"}, "no_proj"), ({"k": 99, "rule": "plop"}, "99"),
    ):  # fmt: skip
        path.write_text(json.dumps({"jobs": {"good": jobs["legal"], "bad": {**jobs["legal"], **change}}}))
        assert main(["multi", "--jobs", str(path), "--out", str(tmp_path / "x"), *shared, "--overwrite"]) == 2
        said = capsys.readouterr().err
        assert message in said and "job 'bad': " in said
        assert not list((tmp_path / "x").glob("jobs/*/adapter"))
    for more, message in ((["--jobs", str(tmp_path / "no.json")], "no.json"), ([], "needs --jobs FILE")):
        assert main(["multi", *more, "--out", str(tmp_path / "y"), *shared]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_a_diverged_jobs_best_adapter_is_kept(world, tmp_path, monkeypatch):
    """Where validation had seen a good one."""
    shared, path, _ = world
    plain = Together._step

    def step(self, meter):
        job = self.jobs["legal"]
        if job.step == 4:
            with torch.no_grad():
                next(iter(job.parameters.values())).fill_(float("nan"))
        plain(self, meter)

    monkeypatch.setattr(Together, "_step", step)
    out = tmp_path / "out"
    assert main(["multi", "--jobs", str(path), "--out", str(out), *shared]) == 1
    folder = out / "jobs" / "legal"
    assert not (folder / "adapter").exists()
    model = build("llama")
    assert pf.load_adapter(model, folder / "adapter-before-failure")


def test_what_stands_above_jobs_is_the_bases_too(world, tmp_path, capsys):
    """The base is the one of the file, and a job with rows of its own has no defaults of the demo's."""
    (model, *shared), path, jobs = world
    common = {"model": model.removeprefix("--model="), "dtype": "bfloat16", "eval_rows": 4}
    jobs = {"legal": jobs["legal"], "own": {k: v for k, v in jobs["third"].items() if k != "epochs"}}
    path.write_text(json.dumps({**common, "jobs": jobs}))
    assert [config.max_steps for config in read_jobs(path, RunConfig())[1].values()] == [6, None]
    path.write_text(json.dumps({**common, "jobs": {"legal": jobs["legal"]}}))
    out = tmp_path / "out"
    words = ["multi", "--jobs", str(path), "--out", str(out), *shared]
    assert main(words) == 0
    found = [json.loads((at / "config.json").read_text())["settings"] for at in (out, out / "jobs" / "legal")]
    assert all(one["dtype"] == "bfloat16" and one["model"] == common["model"] for one in found)
    assert re.search(f"^{re.escape(common['model'])}: .*torch.bfloat16", capsys.readouterr().err, re.M)
    assert main([*words, "--resume"]) == 0


def test_a_finished_multi_goes_on_with_its_own_jobs_alone(world, tmp_path, capsys):
    shared, path, jobs = world
    words = ["multi", "--jobs", str(path), "--out", str(tmp_path / "out"), *shared]
    path.write_text(json.dumps({"jobs": {"legal": jobs["legal"]}}))
    assert main(words) == 0 and main([*words, "--resume"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "jobs, which holds run folders: plopfast verify" in told and "not written by" not in told
    path.write_text(json.dumps({"jobs": jobs}))
    assert main([*words, "--resume"]) == 2
    assert "is of the jobs legal, and" in capsys.readouterr().err
    path.write_text(json.dumps({"jobs": {"legal": {**jobs["legal"], "lr": 0.5}}}))
    assert main([*words, "--resume"]) == 2
    assert "lr was 0.01, is 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "value"), [("full", True), ("compile", True), ("mlp_rows", 4), ("neftune", 5.0)])
def test_what_several_cannot_have_is_refused_at_once(tmp_path, setting, value):
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps({setting: value, "jobs": {"a": {}}}))
    with pytest.raises(ConfigError, match=f"^{setting} .*which several jobs at once cannot have"):
        read_jobs(path, RunConfig())
