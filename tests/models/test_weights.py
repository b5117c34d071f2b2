"""Weights that are missing, too many, of another shape, or not finite are refused; what may differ is not."""

import json
import math

import pytest
import torch
import transformers
from helpers import CONFIGS, SMALL, build, logits
from safetensors.torch import load_file, save_file

import plopfast as pf
from plopfast.models import weights
from plopfast.support.errors import ModelError


def change(folder, edit):
    """Edits the tensors of a model folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def layers(folder, count):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))


def drop(part):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("layers.1.mlp.up_proj"), r"1 missing \(model.layers.1.mlp.up_proj.weight\)"),
        (drop("layers.2."), r"9 missing \(model.layers.2.input_layernorm.weight, .*, \.\.\.\)"),
        (drop("lm_head"), r"1 missing \(lm_head.weight\)"),
        (drop("embed_tokens"), r"1 missing \(model.embed_tokens.weight\)"),
        (drop(""), r"missing|cannot be loaded"),
        (lambda t: t.update(extra=torch.zeros(2)), r"1 not expected \(extra\)"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(300, 31)}), "cannot be loaded|of another shape"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(math.nan), r"NaN or infinity in 1 .*up_proj"),
        (lambda t: t["lm_head.weight"][5].fill_(-math.inf), r"NaN or infinity in 1 .*\(lm_head.weight\)"),
        (lambda t: t["lm_head.weight"][5].fill_(math.inf), r"NaN or infinity in 1 .*\(lm_head.weight\)"),
    ],
)
def test_damaged_weights_are_refused(model_folder, edit, message):
    change(model_folder, edit)
    with pytest.raises(ModelError, match=message):
        pf.load_model(model_folder)


def test_more_or_fewer_layers_than_the_file_has(model_folder):
    layers(model_folder, 4)
    with pytest.raises(ModelError, match=r"9 missing \(model.layers.3"):
        pf.load_model(model_folder)
    layers(model_folder, 2)
    with pytest.raises(ModelError, match=r"9 not expected \(model.layers.2"):
        pf.load_model(model_folder)


def test_shards(model_folder):
    tensors = load_file(model_folder / "model.safetensors")
    names, index = sorted(tensors), model_folder / "model.safetensors.index.json"
    save_file({k: tensors[k] for k in names[:9]}, model_folder / "one.safetensors")
    save_file({k: tensors[k] for k in names[9:]}, model_folder / "two.safetensors")
    (model_folder / "model.safetensors").unlink()
    places = {k: f"{'one' if k in names[:9] else 'two'}.safetensors" for k in names}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    pf.load_model(model_folder)
    second = model_folder / "two.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-50])
    with pytest.raises(ModelError, match="cannot be loaded"):
        pf.load_model(model_folder)
    second.unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded: .*two.safetensors"):
        pf.load_model(model_folder)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names[:9], "one.safetensors")}))
    with pytest.raises(ModelError, match=r"\d+ missing"):
        pf.load_model(model_folder)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_every_architecture_loads_what_it_saved(architecture, tmp_path, tokenizer):
    model = build(architecture)
    model.resize_token_embeddings(304)  # Qwen2's tokenizer adds a token
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(pf.load_model(tmp_path)[0]), logits(model))


def test_what_may_be_absent_or_left_over(tmp_path, tokenizer):
    """A tied head, rotary buffers, and the masks and names without prefix of old GPT-2 files."""
    tied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True))
    old = transformers.GPT2LMHeadModel(CONFIGS["gpt2"]())
    for name, model in (("tied", tied), ("old", old)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    change(tmp_path / "tied", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))

    def as_of_old(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)

    change(tmp_path / "old", as_of_old)
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    for name, model in (("tied", tied), ("old", old)):
        torch.testing.assert_close(logits(pf.load_model(tmp_path / name)[0]), logits(model.eval()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite(dtype, value):
    tensor = torch.randn(7, 5).to(dtype)
    assert (
        weights.is_finite(tensor)
        and weights.is_finite(tensor[:0])
        and weights.is_finite(torch.ones(2, dtype=torch.int))
    )
    tensor[3, 2] = value
    assert not weights.is_finite(tensor)


def test_a_conversion_is_checked_too(monkeypatch, tmp_path):
    """A GGUF file without one of its tensors."""
    found = {"missing_keys": {"model.layers.0.mlp.up_proj.weight"}, "unexpected_keys": set(), "mismatched_keys": set()}

    def loaded(*_, **options):
        assert options["output_loading_info"]
        return build("llama"), found

    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model.gguf': .* 1 missing \(model.layers.0.mlp.up_proj.weight\)"):
        pf.load_model(tmp_path / "model.gguf")
    assert not (tmp_path / "cache").exists()
