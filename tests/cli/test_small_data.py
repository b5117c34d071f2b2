"""Little data on the command line: how long training takes, what validates, and what a figure is of."""

import json
from pathlib import Path

import pytest
from helpers import plopfast

from plopfast.run.evaluating import eval_lines
from plopfast.run.run import Run
from plopfast.support.config import RunConfig

FEW = ["--score-prompts", 12, "--rank", 2, "--alpha", 4]


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture
def split(data):
    """The options --train, --valid and --test with their files, one by one."""
    return {data[i].removeprefix("--"): data[i : i + 2] for i in range(0, len(data), 2)}


def test_a_file_of_60_rows_alone(model_folder, split, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("run", "--model", model_folder, *split["train"], *FEW, "--out", out) == 0
    printed = capsys.readouterr()
    training = read(out, "training")
    plan = training["plan"]
    assert (plan["rows"], plan["steps"], plan["epochs"], plan["little_data"]) == (57, 64, 8, True)
    assert "57 rows, " in printed.err and " learned): 64 steps, 8 epochs, 7.12 rows and " in printed.err
    assert training["validation"] == "3 validation rows held out from the training file, looked at every 8 steps"
    assert training["validation"] in printed.err and training["unmoved"] == {}
    found = read(out, "eval")
    assert found["rows"] == "validation" and found["tuned"]["accuracy_low"] < found["tuned"]["accuracy_high"]
    assert printed.out.count("3 validation rows)") == 2 and "95% interval" in printed.out
    assert "also chose the training step that was kept" in printed.out and "test rows" not in printed.out
    page = (out / "report.html").read_text()
    assert "Share of 3 validation rows right" in page and "No test rows." in page and "3 test rows" not in page
    assert read(out, "estimate")["rows"] == 8, "the estimate is of the steps that were taken"


def test_test_rows_are_named_too(base, split, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("run", *base, "--out", out) == 0
    printed = capsys.readouterr()
    assert read(out, "eval")["rows"] == "test"
    assert printed.out.count("40 test rows)") == 2 and "also chose" not in printed.out
    assert "8 validation rows, looked at every 2 steps" in printed.err
    copied = tmp_path / "copied.jsonl"
    copied.write_bytes(Path(split["valid"][1]).read_bytes())
    again = [*base, "--test", copied, "--out", tmp_path / "again"]
    assert plopfast("run", *again) == 0
    assert read(tmp_path / "again", "eval")["rows"] == "validation", "a copy of the validation file is no test"
    (out / "eval.json").unlink()
    assert plopfast("eval", "--out", out) == 0
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tuned ")][-1]
    assert "40 test rows)" in line


def test_the_only_row_is_not_held_out(model_folder, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "one", "completion": " two"}\n')
    given = ["--model", model_folder, "--train", file, *FEW, "--max-steps", 1, "--out", tmp_path / "run"]
    assert plopfast("run", *given) == 0
    said = read(tmp_path / "run", "training")["validation"]
    assert said == "1 validation row from the training file, which has no other row, looked at every 30 steps"


def test_how_many_validation_rows_are_looked_at(model_folder, split, tmp_path):
    given = [*split["train"], *FEW, "--max-steps", 2, "--eval-rows", 2, "--eval-every", 1, "--out", tmp_path / "run"]
    assert plopfast("run", "--model", model_folder, *given) == 0
    said = read(tmp_path / "run", "training")["validation"]
    assert said == "2 of 3 validation rows held out from the training file, looked at every step"


def test_evaluations_of_earlier_versions_are_still_read():
    old = {"loss": 0.5, "accuracy": 0.75, "metric": "choice", "examples": 4}
    lines = eval_lines({"base": old, "tuned": old})
    assert lines == [(who, "loss 0.5000, accuracy 0.7500 (choice, 4 held-out rows)") for who in ("base", "tuned")]


def test_epochs_and_steps_on_the_command_line(base, tmp_path, capsys):
    out = tmp_path / "run"
    at = base.index("--max-steps")
    steps = base[:at] + base[at + 2 :]
    assert plopfast("run", *base, "--epochs", 2, "--out", out) == 2
    assert "max_steps 4 and epochs 2 both say how long to train" in capsys.readouterr().err
    assert plopfast("run", *steps, "--epochs", 2, "--batch-rows", 6, "--out", out) == 0
    plan = read(out, "training")["plan"]
    assert (plan["steps"], plan["epochs"], plan["rows_per_step"], plan["little_data"]) == (20, 2, 6, False)
    assert plopfast("train", "--out", out, "--overwrite", "--max-steps", 3) == 0, "what is given last counts"
    assert read(out, "training")["plan"]["steps"] == 3 and read(out, "config")["settings"]["epochs"] is None


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("packing", [False, True])
def test_the_estimate_follows_batch_rows(base, rows, packing, tmp_path):
    out = tmp_path / "run"
    assert plopfast("score", *base[:8], "--score-prompts", 12, "--out", out) == 0
    assert plopfast("place", "--out", out, "--rank", 2) == 0
    how = ["--batch-tokens", 400, "--batch-rows", rows, "--packing" if packing else "--no-packing"]
    assert plopfast("estimate", "--out", out, *how) == 0
    longest = max(len(e.tokens) for e in Run(out, RunConfig(model=base[1], train=base[3])).examples("train"))
    found = read(out, "estimate")
    want = (1, min(400, rows * longest)) if packing else (min(rows, 400 // longest), longest)
    assert (found["rows"], found["row_tokens"]) == want and found["batch_tokens"] == 400
