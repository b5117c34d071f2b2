"""The scripts of docs/peft.md run as they stand there, but for their number of steps."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import plopfast as pf
from plopfast.data.rows import DEMO

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
SCRIPTS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def script_with(word):
    (script,) = (text for text in SCRIPTS if word in text and "pf.suggest(" in text)
    assert script.count("max_steps=60") == 1
    return script.replace("max_steps=60", 'max_steps=2, use_cpu=True, report_to="none", logging_steps=1')


@pytest.mark.parametrize("trainer", ["SFTTrainer(", " Trainer("])
def test_scripts(trainer, tmp_path, monkeypatch, capsys):
    lines = DEMO["train"].read_text(encoding="utf-8").splitlines()[:16]
    (tmp_path / "train.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(script_with(trainer), space)
    said = capsys.readouterr().out
    placement, model = space["placement"], space["trainer"].model
    assert str(placement) in said and "16 of 16 rows" in said
    assert isinstance(model, PeftModel) and isinstance(placement, pf.Placement)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name and bool(p.any())}
    assert len(trained) == len(placement.modules) == 90, "lora_B is zero until it is trained"
    losses = [entry["loss"] for entry in space["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))
    assert json.loads(lines[0])  # the rows are still those of the demo


def test_the_first_script_is_short():
    (script,) = (text for text in SCRIPTS if "SFTTrainer(" in text)
    lines = [line for line in script.splitlines() if line.strip()]
    assert len(lines) <= 15
