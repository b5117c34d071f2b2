"""Run folders on the command line: nothing of the user's is lost, whatever --out names, and whenever the process ends."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from plopfast.cli import main
from plopfast.run.folder import ARTEFACTS
from plopfast.run.run import Run
from plopfast.support.config import RunConfig
from plopfast.support.errors import FileError
from plopfast.support.files import SCRATCH
from plopfast.support.ledger import HISTORY, Ledger
from plopfast.support.lock import locked


@pytest.fixture
def options(model_folder, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"a word {i}", "completion": f" kind {i % 3}"}) + "\n" for i in range(24))
    )
    given = {"--model": model_folder, "--train": data, "--max-steps": 2, "--rank": 2, "--k": 1, "--score-prompts": 8}
    return [str(word) for pair in given.items() for word in pair]


def plopfast(*arguments):
    return main.main([str(argument) for argument in arguments])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


USERS = {
    "names of plopfast's": ("model/notes.txt", "trial/notes.txt", "merged/a", "checkpoints/b", "tensorboard/c", "report/d", "adapter/e", "search.db"),
    "a model": ("config.json", "model.safetensors"),
    "a history": ("history.jsonl",),
    "a project": ("train.py", "adapter/adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", USERS)
@pytest.mark.parametrize("command", ["run", "train", "trial", "search"])
def test_a_folder_of_the_users_is_refused(options, tmp_path, kind, command, capsys):
    home = tmp_path / "home"
    for name in USERS[kind]:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("{}")
    before = contents(home)
    assert plopfast(command, *options[:6], "--out", home, "--overwrite") == 2
    assert str(home) in capsys.readouterr().err and contents(home) == before


def test_a_run_from_python_asks_the_same(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match="holds notes.txt"), Run(tmp_path, RunConfig()).stage("data"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_out_that_is_no_folder(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert plopfast("run", *options, "--out", "file", "--overwrite") == 2
    assert "a file, where --out names a folder" in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "file").unlink()
    with pytest.raises(SystemExit):
        plopfast("run", *options, "--out", "", "--overwrite")
    assert contents(tmp_path) == before


def test_inputs_inside_the_folder_are_refused(options, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("run", *options, "--out", out) == 0 and plopfast("merge", "--out", out) == 0
    (out / "rows.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    before = contents(out)
    capsys.readouterr()
    other = tmp_path / "train.jsonl"
    for inside in (
        ["--model", out / "merged"], ["--train", out / "rows.jsonl"], ["--valid", out / "rows.jsonl"],
        ["--train", out / "rows.jsonl", other], ["--train", f"{out / 'adapter'}:train", other],
    ):  # fmt: skip
        assert plopfast("run", *options, *inside, "--out", out, "--overwrite") == 2
        assert (
            f"{str(inside[1]).partition(':')[0]}: lies in --out" in capsys.readouterr().err and contents(out) == before
        )
    model = Path(options[1])
    held = contents(model)
    assert plopfast("run", *options, "--out", model, "--overwrite") == 2 and contents(model) == held


def test_earlier_results_stay_until_the_new_ones_are_complete(options, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert plopfast("run", *options, "--out", out) == 0
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr("plopfast.run.evaluating.evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert plopfast("run", *options, "--seed", 5, "--out", out, "--overwrite") == 130
    assert "the earlier results wait in" in capsys.readouterr().err
    assert (out / "previous" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert json.loads((out / "previous" / "config.json").read_text())["settings"]["seed"] == 0
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() != adapter
    monkeypatch.undo()
    assert plopfast("run", "--out", out, "--resume") == 0
    assert not (out / "previous").exists() and (out / "notes.txt").read_text() == "mine"
    assert set(Ledger(out).done()) >= {"data", "score", "place", "train", "eval", "report", "run"}


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_failure_before_anything_new_brings_the_earlier_results_back(options, tmp_path, command, monkeypatch, capsys):
    out = tmp_path / "run"
    assert plopfast("run", *options, "--out", out) == 0
    before, config = contents(out / "adapter"), (out / "config.json").read_bytes()
    monkeypatch.setattr(
        "plopfast.training.trainer.Trainer.fit", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    monkeypatch.setattr("plopfast.run.run.Run.described", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    assert plopfast(command, *options[:6], "--out", out, "--overwrite") == 130
    assert contents(out / "adapter") == before and not (out / "previous").exists()
    assert command == "train" or (out / "config.json").read_bytes() == config
    assert "train" in Ledger(out).done()


def test_a_link_in_the_folder_is_refused_before_anything_moves(options, tmp_path, capsys):
    out, own = tmp_path / "run", tmp_path / "own"
    assert plopfast("run", *options, "--out", out) == 0
    (out / "adapter").rename(own)
    (out / "adapter").symlink_to(own)
    before, held = contents(out), contents(own)
    for command in ("run", "train"):
        assert plopfast(command, *options[:6], "--out", out, "--overwrite") == 2
        assert "adapter: in the way" in capsys.readouterr().err
    assert contents(own) == held and (out / "scores.json").exists() and set(contents(out)) == set(before)


def test_copies_are_read_but_not_replaced(options, tmp_path, capsys):
    """Scores and placements of another folder can be copied into a new one."""
    out, new = tmp_path / "run", tmp_path / "new"
    assert plopfast("run", *options, "--out", out) == 0
    new.mkdir()
    for name in ("scores.json", "scores.safetensors", "placement.json", "config.json"):
        (new / name).write_bytes((out / name).read_bytes())
    assert plopfast("train", "--out", new) == 0 and (new / "adapter").exists()
    assert plopfast("place", "--out", new, "--overwrite") == 2
    assert "placement.json: in the way" in capsys.readouterr().err


def test_a_training_that_was_not_noted_as_done_goes_on(options, tmp_path, capsys):
    """Killed between its last files: the adapter is there, training.json is not."""
    out = tmp_path / "run"
    assert plopfast("run", *options, "--out", out) == 0
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    lines = (out / HISTORY).read_text().splitlines()
    last = next(i for i, line in enumerate(lines) if '"event": "done"' in line and '"stage": "train"' in line)
    kept = [line for i, line in enumerate(lines) if i < last or '"event": "done"' not in line]
    (out / HISTORY).write_text("\n".join(kept) + "\n")
    for name in ("training.json", "eval.json", "report.html"):
        (out / name).unlink()
    assert plopfast("run", "--out", out, "--resume") == 0
    again = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(again[name].equal(adapter[name]) for name in adapter) and (out / "training.json").exists()


def test_what_a_kill_left_is_cleared_away(options, tmp_path):
    """Checkpoints of a training that is done, and a swap that was not ended."""
    out = tmp_path / "run"
    assert plopfast("run", *options, "--out", out) == 0
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "step-00000002.safetensors").write_text("")
    scratch = out / f".adapter.abcd1234{SCRATCH}"
    scratch.mkdir()
    (out / "adapter").rename(scratch / "old")
    assert plopfast("place", "--out", out, "--overwrite") == 0
    assert not (out / "checkpoints").exists() and not scratch.exists() and (out / "adapter").exists()


def test_a_merged_model_of_the_users_stays(options, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("run", *options, "--out", out) == 0
    (out / "merged").mkdir()
    (out / "merged" / "config.json").write_text("mine")
    assert (
        plopfast("merge", "--out", out, "--overwrite") == 2 and (out / "merged" / "config.json").read_text() == "mine"
    )
    assert "merged: in the way" in capsys.readouterr().err


def test_another_process_in_the_same_folder_is_refused(options, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with locked(out):
            os.write(told, b"x")
            time.sleep(60)
        os._exit(0)
    try:
        os.read(ready, 1)
        assert plopfast("run", *options, "--out", out) == 2
        assert "in use by `plopfast" in (err := capsys.readouterr().err) and f"(process {child} on" in err
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert plopfast("data", *options[:4], "--out", out) == 0


def test_verify_names_what_changed(options, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("run", *options, "--out", out) == 0 and plopfast("merge", "--out", out) == 0
    capsys.readouterr()
    assert plopfast("verify", out) == 0
    said = capsys.readouterr().out
    assert "files are as they were" in said and "\nchanged" not in said and "unfinished" not in said
    placement = json.loads((out / "placement.json").read_text())
    (out / "placement.json").write_text(json.dumps(placement | {"rule": "mine"}))
    (out / "eval.json").unlink()
    (out / "notes.txt").write_text("mine")
    (tmp_path / "train.jsonl").write_text(
        (tmp_path / "train.jsonl").read_text() + '{"prompt": "a", "completion": " b"}\n'
    )
    config = Path(options[1]) / "config.json"
    config.write_text(config.read_text() + "\n")
    assert plopfast("verify", out) == 1
    lines = [" ".join(line.split()[:5]) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "changed placement.json output of place",
        "changed placement.json input of train",
        "missing eval.json output of eval",
    ):
        assert line in lines, line
    assert f"changed {tmp_path / 'train.jsonl'} input of score" in lines and f"changed {config} input of score" in lines
    assert f"not written by plopfast: {out / 'notes.txt'}" in lines
    assert plopfast("verify", tmp_path) == 2 and "history.jsonl: no such file" in capsys.readouterr().err


def test_rows_in_a_folder_or_on_the_hub_are_not_compared(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    sources = [str(tmp_path / "set"), f"{tmp_path / 'set'}:train", "owner/rows", str(tmp_path / "gone.jsonl")]
    data = [{"file": source, "sha256": "0" * 64} for source in sources]
    ledger = Ledger(tmp_path / "run")
    for stage in ("score", "place"):
        ledger.add("begin", stage=stage, command="c", data={"train": data})
        ledger.add("done", stage=stage, command="c", seconds=1, peak_mib=1)
    assert plopfast("verify", tmp_path / "run") == 1
    said = capsys.readouterr().out
    assert "0 of 1 files" in said and said.count("gone.jsonl") == 2 and said.count("not compared") == 3
    assert all(f"not compared: {source}, " in said for source in sources[:3])


def test_the_history_holds_what_each_command_did(options, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["plopfast", "run", "--train", "https://me:pw@host/rows?token=abc"])
    assert plopfast("run", *options, "--out", out) == 0
    begun, done = (
        next(e for e in Ledger(out).events() if (e["event"], e["stage"]) == (kind, "score"))
        for kind in ("begin", "done")
    )
    assert begun["settings"]["rank"] == 2 and begun["versions"]["torch"] and begun["time"].endswith("+00:00")
    assert "pw" not in begun["command"] and "abc" not in begun["command"] and "***" in begun["command"]
    assert set(done["outputs"]) == {"config.json", "scores.json", "scores.safetensors"} and done["seconds"] > 0
    assert {Path(name).name for name in done["inputs"]} >= {"model.safetensors", "config.json"}
    assert Path(begun["data"]["train"]["file"]).name == "train.jsonl"


def test_every_result_is_a_name_of_one_stage():
    """But for an adapter, which `train` and `grpo` make: each is refused where the other's is."""
    names = [name for of in ARTEFACTS.values() for name in of]
    assert {name for name in names if names.count(name) > 1} == {"adapter"}


def test_a_model_is_the_same_from_another_folder(options, tmp_path, monkeypatch):
    model, out = Path(options[1]), tmp_path / "run"
    monkeypatch.chdir(model.parent)
    assert plopfast("score", "--model", model.name, *options[2:4], "--score-prompts", "6", "--out", out) == 0
    assert json.loads((out / "config.json").read_text())["settings"]["model"] == str(model)


def test_a_placement_of_another_model_is_named(options, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "run"
    shutil.copytree(options[1], other)
    assert plopfast("run", *options, "--out", out) == 0
    capsys.readouterr()
    assert plopfast("train", "--model", other, "--out", out, "--overwrite") == 0
    assert (
        f"the placement was made for {options[1]}, whose modules are alike; it is trained on {other}"
        in capsys.readouterr().err
    )


def test_a_url_is_no_model_and_is_not_written_down(options, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("score", "--model", "https://me:secret@host/model", *options[2:4], "--out", out) == 2
    assert "a URL" in capsys.readouterr().err and not out.exists()


def test_what_a_kill_leaves_inside_a_trial_is_plopfasts(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.claim({"trial": ARTEFACTS["trial"]["trial"]})
    for folder in ("trial", "trial/plop/lr-0.1-seed-0"):
        scratch = tmp_path / folder / f".inputs.json.abc{SCRATCH}"
        scratch.mkdir(parents=True)
        (scratch / "inputs.json").write_text("{")
    ledger.check(["trial"])
