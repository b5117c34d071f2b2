"""--quantize through the commands: a run, its resume, merging, info and doctor; and what does not go with it."""

import json

import pytest
import torch
import transformers
from helpers import logits, plopfast

import plopfast as pf
from plopfast.cli import doctor
from plopfast.models.quantized import QuantizedLinear


def test_a_whole_run(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert plopfast("run", *base, "--quantize", "nf4", "--quantize-head", "--stream", "--out", out) == 0
    said = capsys.readouterr().err
    assert "nf4 codes in 22 linear modules" in said and "streamed: 3 blocks" in said
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["quantize"] == "nf4" and settings["quantize_head"] is True
    assert plopfast("run", *base, "--quantize", "int8", "--out", out, "--resume") == 2
    assert "quantize" in capsys.readouterr().err
    assert plopfast("estimate", "--out", out, "--overwrite") == 0
    assert plopfast("merge", "--out", out) == 0
    assert "nf4 codes in 22 linear modules: all of its weights are dense now" in capsys.readouterr().out
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    model, _ = pf.load_model(base[1], quantize="nf4", quantize_head=True)
    pf.load_adapter(model, out / "adapter")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert plopfast("merge", "--out", out, "--requantize", "--overwrite") == 0
    assert "of their norm, by rounding to codes" in capsys.readouterr().out
    again, _ = pf.load_model(out / "merged")
    assert isinstance(again.lm_head, QuantizedLinear)
    assert 0 < (logits(again) - logits(model)).norm() < 0.2 * logits(model).norm()


def test_a_dense_model_is_not_quantised_by_merging(model_folder, llama, tmp_path, capsys):
    pf.inject(llama, pf.Placement({"model.layers.0.mlp.up_proj": (2, 4.0)}, [], "", 0))
    adapter, out = pf.save_adapter(llama, tmp_path / "adapter"), tmp_path / "out"
    assert plopfast("merge", "--model", model_folder, "--adapter", adapter, "--out", out, "--requantize") == 2
    assert "--requantize is for a quantised model" in capsys.readouterr().err and not (out / "merged").exists()


def test_a_checkpoint_of_codes(base, tmp_path, capsys):
    """As bitsandbytes writes it; settings say nothing of it."""
    from transformers import BitsAndBytesConfig

    folder = tmp_path / "codes"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base[1], quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base[1]).save_pretrained(folder)
    options = ["--model", folder, *base[2:]]
    assert plopfast("score", "--model", folder, *base[2:8], "--score-prompts", "4", "--out", tmp_path / "out") == 0
    assert "int8 codes in 21 linear modules" in capsys.readouterr().err
    assert plopfast("run", *options, "--full", "--out", tmp_path / "full") == 2
    assert "--full trains all weights, and" in (said := capsys.readouterr().err) and "int8 codes in 21" in said
    assert plopfast("run", *options, "--quantize", "nf4", "--out", tmp_path / "twice") == 2
    assert "its weights are int8 already: leave out --quantize" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--full", "--quantize", "nf4"], "--quantize freezes weights as codes, --full trains them"),
        (["--parallel", "fsdp", "--quantize", "int8"], "--parallel fsdp spreads dense weights, --quantize keeps codes"),
        (["--quantize-head"], "quantize_head needs --quantize"),
        (["--quantize", "int4"], "expected one of nf4, int8, fp8, got 'int4'; did you mean 'nf4'"),
    ],
)
def test_what_does_not_go_together(options, message, base, tmp_path, capsys):
    try:
        code = plopfast("run", *base, *options, "--out", tmp_path / "out")
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_info_and_doctor(kind, model_folder, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CASES", doctor.CASES[3:4])
    assert plopfast("info", "--model", model_folder, "--quantize", kind) == 0
    assert f"{kind} codes in 21 linear modules" in capsys.readouterr().out
    assert plopfast("doctor", "--model", model_folder, "--quantize", kind, "--seconds", "1") == 0
    said = capsys.readouterr().out
    assert f"{kind} codes in 21 linear modules" in said and "up_proj: relative difference" in said


def test_every_weight_counts_once(model_folder, llama):
    from plopfast.models.linears import number_of_weights

    dense = sum(p.numel() for p in llama.parameters())
    assert number_of_weights(llama) == dense
    for kind in ("nf4", "fp8"):
        model, _ = pf.load_model(model_folder, quantize=kind)
        assert (
            any(isinstance(module, QuantizedLinear) for module in model.modules()) and number_of_weights(model) == dense
        )


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "fp8"))])
def test_the_default_model_is_placed_as_when_it_is_dense(kind, tmp_path):
    """SmolLM2-135M-Instruct keeps the order of its types."""
    out = tmp_path / "out"
    assert plopfast("score", "--quantize", kind, "--score-prompts", "16", "--confidence", "0", "--out", out) == 0
    types = json.loads((out / "scores.json").read_text())["types"]
    assert sorted(types, key=types.__getitem__)[:3] == ["v_proj", "up_proj", "down_proj"]


@pytest.mark.slow  # minutes
def test_the_default_run_learns_its_task_on_nf4(tmp_path):
    assert plopfast("run", "--quantize", "nf4", "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["tuned"]["accuracy"] >= 0.80
