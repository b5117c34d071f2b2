"""plopfast estimate --model-config: what is printed and written, and what is refused."""

import json
from pathlib import Path

import pytest
from helpers import SMALL, plopfast


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SMALL, "model_type": "llama"}))
    return path


def said(capsys, *words):
    code = plopfast("estimate", *words)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_table_and_the_same_as_json(config, tmp_path, capsys):
    out = tmp_path / "figures.json"
    code, text, _ = said(
        capsys, "--model-config", config, "--rule", "v_proj,o_proj", "--rank", 4, "--max-length", 64, "--out", out
    )
    value = json.loads(out.read_text())
    assert code == 0 and value["plopfast"] == "estimate of shapes" and value["types"] == ["v_proj", "o_proj"]
    assert (value["rows"], value["row_tokens"], value["label_tokens"], value["rank"]) == (1, 64, 63, 4)
    assert value["parameters"] == 3 * 4 * ((32 + 16) + (32 + 32)) and f"{value['parameters']:,} trained" in text
    assert sum(value["parts"].values()) == pytest.approx(value["total_mib"])
    for part, mib in value["parts"].items():
        assert any(line.startswith(part) and f"{mib / 1024:.3f}" in line for line in text.splitlines()), part
    assert "which cannot be counted" in text and "bfloat16 on a GPU" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "figures.json"], "no run folder"
    assert said(capsys, "--model-config", config, "--rule", "all", "--out", out)[0] == 2
    assert (
        said(capsys, "--model-config", config, "--rule", "all", "--max-length", 64, "--out", out, "--overwrite")[0] == 0
    )


def test_without_a_rule_every_module_counts(config, capsys):
    code, text, _ = said(capsys, "--model-config", config, "--max-length", 64)
    assert code == 0 and text.startswith("no --rule: adapters on every linear module")


def test_fit_is_said_first(config, capsys):
    words = ("--model-config", config, "--rule", "attn", "--max-length", 128, "--batch-rows", 8)
    _, plain, _ = said(capsys, *words)
    peak = float(next(line for line in plain.splitlines() if line.startswith("peak")).split()[-2])
    code, text, _ = said(capsys, *words, "--fit", f"{0.8 * peak:.4f}GiB")
    assert code == 0 and "fit " in text.splitlines()[0] and "--checkpointing" in text


REFUSED = [
    (["--rule", "plop"], "rule 'plop' chooses by scores, and a configuration alone has none"),
    (["--rule", "plop-inverse"], "--rule attn, mlp, all"),
    (["--rule", "atn"], "'atn' is neither a module type nor a module"),
    (["--budget", "match:plop:r4"], "rule 'plop' chooses by scores"),
    (["--ranks", "proportional", "--budget", "1MB"], "ranks 'proportional' needs scores"),
    (["--train", "rows.jsonl"], "without weights and data, so --train cannot apply"),
    (["--model", "some/model"], "so --model cannot apply"),
    (["--max-length", "4096"], "takes at most 128 tokens"),
    (["--max-length", "1"], "at least two tokens"),
    (["--rank", "33"], "rank 33 does not fit"),
    (["--fit", "six"], "expected a size of memory such as 6GB"),
    (["--out", "a-folder"], "it is a file, such as estimate.json"),
    (["--quantize-head"], "quantize_head needs --quantize"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "error"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_is_refused(config, capsys, words, error):
    code, out, err = said(capsys, "--model-config", config, *words)
    assert (code, out) == (2, "") and error in err and err.count("error:") == 1


def test_a_run_folder_has_a_model_of_its_own(model_folder, data, config, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("data", "--model", model_folder, *data, "--out", out) == 0
    capsys.readouterr()
    code, _, err = said(capsys, "--model-config", config, "--out", out)
    assert (
        code == 2
        and "it is a file, such as estimate.json, not a run folder" in err
        and Path(out, "config.json").exists()
    )
    code, _, err = said(capsys, "--model-config", config, "--config", out / "config.json")
    assert code == 2 and "without weights and data, so --model, --train, " in err
