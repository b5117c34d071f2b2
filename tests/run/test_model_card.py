"""adapter/: the model card, whose lines load the adapter as they are printed, and the tokenizer."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers import plopfast
from safetensors.torch import save_file

import plopfast as pf
from plopfast.lora.peft_files import WEIGHTS
from plopfast.lora.placement import Placement
from plopfast.models.loading import DEFAULT_HUB_ID
from plopfast.run.model_card import BEGIN, END, NOT_YET, Base, Source, card, loading, results_of, with_results
from plopfast.support import files
from plopfast.support.ledger import HISTORY, Ledger

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
IDS = torch.tensor([[5, 6, 7, 8]])


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def ours(base, adapter, **more):
    model, _ = pf.load_model(base, **more)
    pf.load_adapter(model, adapter)
    return logits(model)


@pytest.fixture
def talking(model_folder):
    """The small model with a chat template and a license."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model_folder)
    (model_folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Small\n")
    return model_folder


def test_a_run_describes_its_adapter(base, talking, tmp_path):
    out = tmp_path / "out"
    assert plopfast("run", *base, "--out", out) == 0
    adapter, text = out / "adapter", (out / "adapter" / "README.md").read_text()
    assert front_matter(text) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "license": "apache-2.0", "tags": ["lora", "plopfast"],
    }  # fmt: skip
    placement = Placement.load(out / "placement.json")
    for row in (
        "| base | `small-llama` |", "| license of the base | apache-2.0 |", "| rank | 2 |", "| alpha | 4 |", "| chosen by | `plop` |",
        f"| trained parameters | {placement.parameters:,} |", f"| module types | {', '.join(f'`{t}`' for t in placement.types)} |",
    ):  # fmt: skip
        assert row in text, row
    for split, rows in ("train", 60), ("valid", 8), ("test", 40):
        assert f"| {split} | `{split}.jsonl` | {rows} | `{files.sha256(tmp_path / f'{split}.jsonl')}` |" in text
    tested = json.loads((out / "eval.json").read_text())
    assert f"| accuracy | {tested['base']['accuracy']:.1%} | {tested['tuned']['accuracy']:.1%} |" in text
    assert f"| loss | {tested['base']['loss']:.4f} | {tested['tuned']['loss']:.4f} |" in text
    assert "40 test rows; the likeliest of the possible answers counts" in text and NOT_YET not in text
    for file in adapter.iterdir():
        if file.name != "adapter_config.json":  # PEFT finds the base by it
            assert str(tmp_path).encode() not in file.read_bytes(), file
    assert plopfast("verify", out) == 0


def test_its_lines_load_it_as_printed(base, talking, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert plopfast("run", *base, "--out", out) == 0
    monkeypatch.chdir(out)
    (lines,) = snippets((out / "adapter" / "README.md").read_text())
    found = {}
    exec(lines, found)
    torch.testing.assert_close(logits(found["model"]), ours(talking, "adapter"))
    assert type(found["model"]).__name__ == "PeftModelForCausalLM"
    theirs = transformers.AutoTokenizer.from_pretrained(talking)
    assert found["tokenizer"].get_vocab() == theirs.get_vocab() and found["tokenizer"].chat_template == TEMPLATE


def test_the_default_model_loads_offline_as_printed(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    less = ["--score-prompts", 4, "--max-steps", 1, "--rank", 2, "--eval-rows", 4, "--confidence", 0]
    assert plopfast("score", *data, "--score-prompts", 4, "--out", out) == 0
    for command in ("place", "--rank", 2), ("train", *less[2:4]):
        assert plopfast(*command, "--out", out) == 0
    text = (out / "adapter" / "README.md").read_text()
    said = front_matter(text)
    assert said["base_model"] == DEFAULT_HUB_ID and said["license"] == "apache-2.0"
    assert f"base_model:adapter:{DEFAULT_HUB_ID}" in said["tags"] and NOT_YET in text
    assert (
        json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == DEFAULT_HUB_ID
    )
    monkeypatch.chdir(out)
    offline, by_name = snippets(text)
    found = {}
    exec(offline, found)
    torch.testing.assert_close(logits(found["model"]), ours(None, "adapter"), atol=2e-3, rtol=0)  # of logits up to 30
    assert found["tokenizer"].chat_template and "AutoPeftModelForCausalLM" in by_name
    kept = transformers.AutoTokenizer.from_pretrained("adapter")
    assert kept.chat_template == found["tokenizer"].chat_template
    with pytest.raises(OSError, match="couldn't connect"):  # why the offline lines are there
        exec(by_name, {})


@pytest.mark.filterwarnings("ignore")
def test_with_codes_as_printed(base, talking, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert plopfast("run", *base, "--quantize", "nf4", "--out", out) == 0
    shutil.copytree(out / "adapter", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    _, lines = snippets((out / "adapter" / "README.md").read_text())
    found = {}
    exec(lines, found)
    torch.testing.assert_close(logits(found["model"]), ours(talking, "adapter", quantize="nf4"))


@pytest.mark.parametrize(
    ("place", "name", "codes", "calls"),
    [
        ("hub", "Qwen/Qwen3-0.6B", None, []),
        ("hub", "Qwen/Qwen3-0.6B", "int8", ['pf.load_model("Qwen/Qwen3-0.6B", quantize="int8")']),
        ("wheel", DEFAULT_HUB_ID, "nf4", ["pf.load_model()", 'pf.load_model(quantize="nf4")']),
        ("gguf", "/home/me/a b.gguf", None, ['pf.load_model("a b.gguf")']),
        ("folder", "/home/me/model", "nf4", ['pf.load_model("model", quantize="nf4")']),
    ],
)
def test_the_lines_of_each_kind_of_base(place, name, codes, calls):
    text = loading(Base(name, place, None, codes))
    found = snippets(text)
    for lines in found:
        compile(lines, "card", "exec")
    assert re.findall(r"pf\.load_model\(.*\)", text) == calls and "/home" not in text
    assert ("AutoPeftModelForCausalLM" in text) == (place != "gguf")


def test_names_cannot_break_the_card_or_tell_secrets():
    placement = Placement({"a.b": (2, 4.0), "a.c": (3, 4.0)}, ["b`|\n"], "b|\n# x", 12)
    base = Base("/home/me/hf_token=abc", "folder", license={"license": "mit"})
    sources = [Source("train", "/home/me/a|`\n---\nlicense: x"), Source("test", "https://me:pw@host/rows?token=abc")]
    text = card(base, placement, [], [*sources, Source("valid", "owner/rows:test")], {})
    assert front_matter(text) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "license": "mit", "datasets": ["owner/rows"],
        "tags": ["lora", "plopfast"],
    }  # fmt: skip
    assert all(word not in text for word in ("abc", "pw@", "/home"))
    assert all(
        line.count("|") == 5 for line in text.splitlines() if line.startswith(("| train |", "| test |", "| valid |"))
    )
    assert "\n# x" not in text and "| rank | 2 to 3 |" in text and "| alpha | 4 |" in text


def test_rows_that_were_held_out_have_no_file(base, tmp_path):
    assert plopfast("run", *base[:4], *base[8:], "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "| train | `train.jsonl` | 57 |" in text and "| valid | every 20th training row | 3 |" in text
    assert "| test |" not in text and "3 validation rows" in text and "they flatter the adapter" in text


def test_evaluated_again_only_the_figures_change(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert plopfast("run", *base, "--out", out) == 0
    path = out / "adapter" / "README.md"
    assert plopfast("merge", "--out", out) == 0
    mine = path.read_text().replace("# LoRA adapter", "Ask me.\n\n# LoRA adapter").replace("| accuracy |", "| old |")
    path.write_text(mine)
    assert plopfast("verify", out) == 1 and "README.md" in capsys.readouterr().out
    assert plopfast("eval", "--out", out, "--overwrite") == 0
    assert path.read_text() == mine.replace("| old |", "| accuracy |")
    assert plopfast("verify", out) == 0, "the card is no input of merge"
    assert plopfast("train", "--out", out, "--overwrite") == 0
    assert "Ask me" not in path.read_text() and NOT_YET in path.read_text(), "another adapter, another card"


@pytest.mark.parametrize("whose", ["marks are gone", "a link", "none", "not written by plopfast"])
def test_other_cards_stay(base, tmp_path, whose, capsys):
    out = tmp_path / "out"
    assert plopfast("run", *base, "--out", out) == 0
    path = out / "adapter" / "README.md"
    text = path.read_text()
    path.unlink()
    if whose == "marks are gone":
        path.write_text(text.replace(END, ""))
    elif whose == "a link":
        (tmp_path / "mine.md").write_text(text)
        path.symlink_to(tmp_path / "mine.md")
    elif whose == "not written by plopfast":
        path.write_text(text)
        lines = (out / HISTORY).read_text()
        (out / HISTORY).write_text(lines.replace('"README.md", ', "").replace(', "README.md"', ""))
    before = path.read_text() if path.exists() else None
    capsys.readouterr()
    assert plopfast("eval", "--out", out, "--overwrite") == 0
    assert (path.read_text() if path.exists() else None) == before
    assert ("so it stays without the figures" in capsys.readouterr().err) == (whose != "none")
    if whose in ("a link", "not written by plopfast"):
        assert plopfast("train", "--out", out, "--overwrite") == 2
        assert "in the way" in capsys.readouterr().err and path.read_text() == text


def test_an_adapter_from_elsewhere_changes_no_card(base, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    assert plopfast("run", *base, "--out", out) == 0
    before = (out / "adapter" / "README.md").read_bytes()
    shutil.copytree(out / "adapter", other)
    tensors, facts = files.read_tensors(other / WEIGHTS, "plopfast train")
    save_file({key: 50 * tensor for key, tensor in tensors.items()}, other / WEIGHTS, facts)
    assert plopfast("eval", "--out", out, "--adapter", other, "--overwrite") == 0
    assert (out / "adapter" / "README.md").read_bytes() == (other / "README.md").read_bytes() == before


def test_what_an_interrupted_training_left_is_replaced(base, tmp_path):
    """Also a file of its tokenizer that has no successor."""
    out = tmp_path / "out"
    assert plopfast("run", *base, "--out", out) == 0
    Ledger(out).claim({"adapter": ["chat_template.jinja"]}, "claim")
    (out / "adapter" / "chat_template.jinja").write_text("old")
    lines = (out / HISTORY).read_text().splitlines()
    last = next(i for i, line in enumerate(lines) if '"event": "done"' in line and '"stage": "train"' in line)
    (out / HISTORY).write_text(
        "".join(line + "\n" for i, line in enumerate(lines) if i < last or '"event": "done"' not in line)
    )
    for name in ("training.json", "eval.json", "report.html"):
        (out / name).unlink()
    assert plopfast("run", "--out", out, "--resume") == 0
    assert not (out / "adapter" / "chat_template.jinja").exists()
    assert Path(out / "adapter" / "README.md").exists() and plopfast("verify", out) == 0


def test_figures_between_the_marks():
    text = f"head {BEGIN} a {END} tail"
    assert with_results(text, "b") == f"head {BEGIN}\nb\n{END} tail"
    for odd in ("", BEGIN, f"{END} {BEGIN}", text + BEGIN, END + text, text + text):
        assert with_results(odd, "b") is None, odd


def test_figures_of_validation_rows_say_so():
    one = {"loss": 0.5, "accuracy": 0.25, "metric": "token", "examples": 1200, "tokens": 5}
    said = results_of({"base": one, "tuned": one, "rows": "validation"})
    assert "1,200 validation rows; every token of the answers counts" in said and "they flatter the adapter" in said
    assert "interval" not in said and "flatter" not in results_of({"base": one, "tuned": one, "rows": "test"})
