"""Every public name's docstring has an example, and it runs as it stands there."""

import csv
import doctest
import inspect
import json

import peft
import pytest
import torch
from helpers import build, random_batches

import plopfast as pf

SLOW = {  # what their examples need, beyond a small model
    "grpo": "a training of minutes: docs/grpo.md's runs in tests/integrations/test_grpo.py",
    "load_model": "the default model in NF4: tests/models/test_quantized.py loads it",
}
OF_ANOTHER = {  # shown in the example of that one, which they belong to
    "TrainResult": "Trainer", "load_adapter": "save_adapter", "restore": "accelerate", "unload": "save_adapter",
    "unmerge_adapter": "merge_adapter",
}  # fmt: skip
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
ROWS = [{"prompt": f"Definition: a bird of {n} colours\nCategory:", "completion": " animal"} for n in range(20)]


@pytest.fixture
def space(tokenizer, tmp_path, monkeypatch):
    """What the examples stand among: a small model and its data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with (tmp_path / "more.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS[:3])
    rows = [(f"row {number}", row) for number, row in enumerate(ROWS, 1)]
    torch.manual_seed(0)
    x, weight, lora_A, lora_B = torch.randn(6, 32), torch.randn(48, 32), torch.randn(4, 32), torch.randn(48, 4)
    return {
        "pf": pf, "torch": torch, "peft": peft, "model": build("llama"), "tokenizer": tokenizer, "rows": rows,
        "examples": pf.tokenize(rows, tokenizer), "batches": random_batches(), "x": x, "weight": weight, "lora_A": lora_A,
        "lora_B": lora_B,
    }  # fmt: skip


def test_every_public_name_has_an_example():
    without = {name for name in pf.__all__ if ">>>" not in (inspect.getdoc(getattr(pf, name)) or "")}
    assert without <= {*OF_ANOTHER, "grpo"}
    for name, other in OF_ANOTHER.items():
        shown = inspect.getdoc(getattr(pf, other)) or ""
        assert f"pf.{name}(" in shown or name == "TrainResult", f"{other}'s example does not show {name}"


@pytest.mark.parametrize("name", [name for name in pf.__all__ if name not in {*OF_ANOTHER, *SLOW}])
def test_the_example_runs(name, space):
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(getattr(pf, name)), space, name, None, None)
    said = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert test.examples and not said, "".join(said)
