"""Models that keep codes are written in bitsandbytes' and FineGrainedFP8's formats, and read again by plopfast and by them."""

import json

import pytest
import torch
import transformers
from helpers import quantize

import plopfast as pf
from plopfast.models.linears import linear_modules
from plopfast.models.quantized import QuantizedLinear, quantized
from plopfast.models.quantized_experts import make_dense
from plopfast.models.saved import save_model
from plopfast.support.errors import ModelError

IDS = torch.arange(24).view(2, 12)
KINDS = [("nf4", False), ("nf4", True), ("int8", False), ("fp8", False)]


@pytest.fixture
def wide(tokenizer, tmp_path):
    """A model of sizes that bitsandbytes' products take, and a folder for it that has the tokenizer."""
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    torch.manual_seed(0)
    tokenizer.save_pretrained(tmp_path)
    return transformers.LlamaForCausalLM(config).eval(), tmp_path


@pytest.mark.parametrize(("kind", "nested"), KINDS)
def test_it_is_read_as_it_was(wide, kind, nested):
    model, folder = wide
    model = quantize(model, kind, nested)
    logits = model(IDS).logits
    save_model(model, folder)
    assert not hasattr(model.config, "quantization_config") and torch.equal(model(IDS).logits, logits)
    again, _ = pf.load_model(folder)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if kind == "int8" else {"rtol": 0, "atol": 0}  # scale x 127 / 127
    torch.testing.assert_close(again(IDS).logits, logits, **tolerance)
    for info in linear_modules(model):
        ours, theirs = info.module.state_dict(), again.get_submodule(info.name).state_dict()
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) for key in ours if key != "scale"
        )
    save_model(again, folder / "twice")
    assert json.loads((folder / "twice" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("kind", "nested"), KINDS[:3])
def test_transformers_reads_it_with_bitsandbytes(wide, kind, nested):
    model, folder = wide
    model.lm_head = quantized(model.lm_head, kind, nested=nested)
    model = quantize(model, kind, nested)
    save_model(model, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(theirs.lm_head).__module__.startswith("bitsandbytes")
    make_dense(theirs)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_transformers_reads_fp8(wide):
    """On a CPU it makes the weights dense."""
    model, folder = wide
    model = quantize(model, "fp8")
    save_model(model, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_no_folder_holds(wide):
    model, folder = wide
    model = quantize(model, "nf4")
    model.lm_head = quantized(model.lm_head, "int8")
    with pytest.raises(ModelError, match=r"several kinds \(int8, nf4\)"):
        save_model(model, folder)
    make_dense(model)
    save_model(model, folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model.lm_head = QuantizedLinear(128, 300, "fp8", torch.float32, block=(1, 128))
    with pytest.raises(ModelError, match="lm_head: fp8 in blocks of"):
        save_model(model, folder)
