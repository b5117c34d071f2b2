"""plopfast grpo: from prompts to adapter/, grpo.json and the page; no settings file makes code run; interruption and resume."""

import json
import re
from types import SimpleNamespace

import pytest
from helpers import everywhere, plopfast as command

from plopfast.cli.main import main
from plopfast.lora.peft_files import load_adapter
from plopfast.lora.placement import Placement
from plopfast.models.loading import load_model
from plopfast.report import kinds
from plopfast.run import grpo as stage
from plopfast.run.verify import verify
from plopfast.support.grpo_settings import LR
from plopfast.support.ledger import Ledger

GRADER = """
import os, signal
calls = []
def grade(completions, trainer_state=None, **_):
    if trainer_state is not None:
        calls.append(0)
        if len(calls) == int(os.environ.get("STOP_AT", 0)):
            os.kill(os.getpid(), signal.SIGTERM)
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]
"""
QUICK = ["--max-steps=2", "--completion-length=3", "--generations=4", "--prompts=2", "--rank=2", "--eval-rows=3"]


@pytest.fixture
def given(model_folder, tmp_path):
    """The words that a run needs, with 24 rows of prompts in prompts.jsonl and a reward in grader.py."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"dog {n} cat", "answer": n}) + "\n" for n in range(24)))
    (tmp_path / "grader.py").write_text(GRADER)
    return ["--model", str(model_folder), "--train", str(file), "--out", str(tmp_path / "out"), *QUICK]


@pytest.fixture
def code(tmp_path):
    return f"{tmp_path / 'grader.py'}:grade"


def test_from_prompts_to_the_page(given, code, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("grpo", *given, "--reward", code) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"2 steps; reward of 2 test prompts: 0\.\d+ before, 0\.\d+ after\n", said.out)
    assert "2 of the training rows, every 20th, are held out" in said.err and "learning rate 0.0002: " in said.err
    assert json.loads((out / "config.json").read_text())["settings"]["lr"] == LR
    written = kinds.read(out / "grpo.json", "plopfast grpo")
    assert written["reward"] == code and written["steps"] == 2 and len(written["samples"]) == 2
    assert [record["step"] for record in kinds.read(out / "rewards.jsonl", "plopfast grpo")] == [1, 2]
    placement = Placement.load(out / "placement.json")
    assert {rank for rank, _ in placement.modules.values()} == {2} and placement.rule == "plop"
    assert {"score", "place", "grpo"} <= {*Ledger(out).done()}
    held = {path.name for path in (out / "adapter").iterdir()}
    assert held == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    page = (out / "adapter" / "README.md").read_text()
    assert f"Reward: `grade`. The reward of 2 test prompts: {written['mean_before']:.3f} before" in page
    assert (
        "GRPO" in page
        and "| train | `prompts.jsonl` | 22 |" in page
        and "| test | every 20th training row | 2 |" in page
        and str(tmp_path) not in page
    )
    assert not (out / "grpo-checkpoints").exists()
    inputs = Ledger(out).done()["grpo"]["inputs"]
    assert {"placement.json", code.rpartition(":")[0], str(tmp_path / "prompts.jsonl")} <= {*inputs}
    assert verify(out)[0]

    model, _ = load_model(given[1])
    load_adapter(model, out / "adapter")  # plopfast reads what PEFT wrote
    assert command("report", "--out", str(out)) == 0
    page = (out / "report.html").read_text()
    assert (
        "Reinforcement learning" in page
        and f"earned {written['mean_before']:.3f} before and {written['mean_after']:.3f} after"
        in " ".join(page.split())
    )
    assert written["samples"][0]["after"] in page and (out / "report" / "rewards.csv").exists()
    assert command("merge", "--out", str(out)) == 0

    assert command("grpo", *given, "--reward", code) == 2
    assert "exists already" in capsys.readouterr().err
    assert command("train", "--out", str(out)) == 2
    assert "exists already" in capsys.readouterr().err, "an adapter of grpo is no training's to replace"


def refused(capsys, *words):
    assert command("grpo", *words) == 2
    return capsys.readouterr().err


def test_a_settings_file_makes_no_code_run(given, code, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stage, "grpo", lambda *_, **__: pytest.fail("it began"))
    marker = tmp_path / "it-ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef grade(completions, **_): return []\n")
    evil = f"{tmp_path / 'evil.py'}:grade"
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"reward": evil}))
    said = refused(capsys, *given, "--config", str(settings))
    assert "is code" in said and f"--reward {evil}" in said
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"plopfast": "config", "settings": {"reward": evil}}))
    for more in ([], ["--overwrite"], ["--resume"]):
        assert "is code" in refused(capsys, *given, *more)
    assert not marker.exists()
    assert "no function 'missing'" in refused(
        capsys, *given, "--reward", code.replace("grade", "missing").replace("missingr", "grader")
    )


def test_interrupted_and_resumed(given, code, tmp_path, capsys, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    given = [*given, "--max-steps=3"]
    assert command("grpo", *given, "--reward", code, "--out", str(whole)) == 0
    monkeypatch.setenv("STOP_AT", "2")
    assert command("grpo", *given, "--reward", code) == 143
    said = capsys.readouterr().err
    assert "stopped after step 2 of 3" in said and f"plopfast grpo --resume --out {out}" in said
    monkeypatch.delenv("STOP_AT")
    assert "--resume" in refused(capsys, "--out", str(out), "--reward", code), (
        "an unfinished one is not lost by accident"
    )
    assert "is code" in refused(capsys, "--resume", "--out", str(out))
    assert "lr" in refused(capsys, "--resume", "--out", str(out), "--reward", code, "--lr=0.5")
    assert "reward" in refused(capsys, "--resume", "--out", str(out), "--reward", "exact")
    assert command("grpo", "--resume", "--out", str(out), "--reward", code) == 0
    for name in ("rewards.jsonl", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (out / "grpo-checkpoints").exists()


def test_a_placement_that_is_there_is_taken(given, tmp_path, capsys):
    out = tmp_path / "out"
    model, _ = load_model(given[1])
    out.mkdir()
    everywhere(model, 3).save(out / "placement.json")
    assert command("grpo", *given, "--reward", "regex:a") == 0
    assert not (out / "scores.json").exists()
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 3


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ('{"prompt": "a", "answer": "4"}\n{"prompt": 3}\n', [], r"prompts\.jsonl:2: expected a row like"),
        ('{"prompt": "a", "answer": "4"}\n{"prompt": "b"}\n', [], r"prompts\.jsonl:2: the reward number compares"),
        ('{"prompt": "a", "answer": "x"}\n', ["--bad-rows=skip"], r"train: no row can be used; .*prompts\.jsonl:1"),
        ('{"prompt": "a", "answer": "4"}\n{"oops\n', [], r"prompts\.jsonl:2: not valid JSON"),
        ('{"prompt": "a", "answer": "4"}\n', ["--prompts=8"], "prompts 8: there are only 1 rows"),
        ('{"prompt": "a", "answer": "4"}\n', ["--completion-length=128"], "context leaves 0 beside"),
        ('{"prompt": "a", "answer": "4"}\n', ["--test={train}"], "test prompts are trained on"),
        ('{"prompt": "a", "answer": "4"}\n', ["--rule=nonsense"], "nonsense"),
        ('{"prompt": "a", "answer": "4"}\n', ["--device=cuda:1"], "cuda"),
    ],
)  # fmt: skip
def test_bad_input_has_one_clear_error(given, tmp_path, capsys, rows, more, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text(rows)
    assert re.search(said, refused(capsys, *given, "--reward=number", *(word.format(train=file) for word in more)))
    assert not (tmp_path / "out" / "adapter").exists()


def test_there_must_be_a_reward(given, capsys):
    assert "needs --reward: exact, number" in refused(capsys, *given)


def test_overlap_and_bad_rows_are_allowed_when_asked(given, tmp_path, capsys):
    """The reward is one that is included, which a settings file may name."""
    file, settings = tmp_path / "prompts.jsonl", tmp_path / "settings.json"
    file.write_text(file.read_text() + '{"prompt": 3}\n')
    settings.write_text(json.dumps({"reward": "regex:[aeiou]", "lr": 1e-3}))
    words = ["--test", str(file), "--allow-overlap", "--bad-rows=skip", "--max-steps=1", "--config", str(settings)]
    assert command("grpo", *given, *words) == 0
    said = capsys.readouterr().err
    assert "24 of 24 test prompts are trained on" in said and "prompts.jsonl:25" in said
    assert json.loads((tmp_path / "out" / "grpo.json").read_text())["reward"] == "regex:[aeiou]"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["settings"]["lr"] == 1e-3, "as it was chosen"


def test_torchrun_is_refused(given, capsys, monkeypatch):
    monkeypatch.setattr(stage, "machine", SimpleNamespace(launch=lambda: SimpleNamespace(size=2)))
    assert "on one device" in refused(capsys, *given, "--reward=exact")


def test_help_names_the_rewards(capsys):
    with pytest.raises(SystemExit):
        main(["grpo", "--help-all"])
    assert "number[:TOLERANCE]" in capsys.readouterr().out
