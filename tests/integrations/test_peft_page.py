"""The scripts of docs/peft.md run as they stand there, but for fewer steps, on the CPU."""

import math
import re
from pathlib import Path

import pytest
from peft import PeftModel

import plopfast as pf
from plopfast.data.rows import DEMO

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
SCRIPTS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
FEW = 'max_steps=1, use_cpu=True, bf16=False, save_strategy="no", report_to="none", logging_steps=1'


def script_with(word):
    (script,) = (text for text in SCRIPTS if word in text and "pf.suggest(" in text)
    assert script.count("max_steps=60") == 1
    return script.replace("max_steps=60", FEW)


@pytest.mark.parametrize(("trainer", "small"), [("SFTTrainer(", False), (" Trainer(", True)])
def test_scripts(trainer, small, tmp_path, monkeypatch, capsys, llama, tokenizer):
    lines = DEMO["train"].read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "train.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    if small:  # the other one shows the default model
        monkeypatch.setattr(pf, "load_model", lambda: (llama, tokenizer))
    space = {}
    exec(script_with(trainer), space)
    placement, model = space["placement"], space["trainer"].model
    assert "8 of 8 rows (prompt and completion as text)" in (said := capsys.readouterr().out)
    assert f"accelerated: {len(placement.modules)} LoRA layers" in said
    assert str(placement) in said and isinstance(model, PeftModel)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name and bool(p.any())}
    assert len(trained) == len(placement.modules) == (9 if small else 90), "lora_B is zero until it is trained"
    (loss,) = (entry["loss"] for entry in space["trainer"].state.log_history if "loss" in entry)
    assert math.isfinite(loss)


def test_the_first_script_is_short():
    (script,) = (text for text in SCRIPTS if "SFTTrainer(" in text)
    assert len([line for line in script.splitlines() if line.strip()]) <= 15
