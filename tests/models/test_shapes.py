"""Models without values: known ones have the sizes that their publishers give, and odd configurations are one clear error."""

import json

import pytest
import torch
from helpers import CONFIGS, SMALL, build, quantize

from plopfast.models.known import KNOWN
from plopfast.models.linears import number_of_weights
from plopfast.models.loading import load_model
from plopfast.models.quantized import QuantizedLinear
from plopfast.models.shapes import config_of, miniature, model_of
from plopfast.support.errors import ConfigError, ModelError

PARAMETERS = {  # as the models' pages and papers give them
    "meta-llama-3-8b": 8_030_261_248, "meta-llama-3-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "mistral-7b-v0.3": 7_248_023_552, "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360, "smollm2-135m": 134_515_008,
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_the_published_number_of_weights(name):
    """Also as codes, which have others."""
    assert number_of_weights(model_of(name)) == number_of_weights(model_of(name, quantize="nf4")) == PARAMETERS[name]


def test_a_name_is_known_by_its_repository_too():
    assert config_of("meta-llama/Meta-Llama-3-8B")[0].hidden_size == config_of("META-LLAMA-3-8B")[0].hidden_size == 4096


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_it_is_the_model_that_a_configuration_describes(tmp_path, architecture):
    CONFIGS[architecture]().save_pretrained(tmp_path)
    real, made = build(architecture), model_of(str(tmp_path), dtype=torch.float32)
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.float32 for p in made.parameters())
    small = miniature(made)
    assert type(small) is type(made) and {type(m) for m in small.modules()} == {type(m) for m in made.modules()}
    assert sum(p.numel() for p in small.parameters()) < 300_000


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_codes_have_the_shapes_of_those_that_are_loaded(tmp_path, kind):
    model = quantize(build("qwen2"), kind)
    model.config.save_pretrained(tmp_path)
    made = model_of(str(tmp_path), dtype=torch.float32, quantize=kind)
    assert {n: (p.shape, p.dtype) for n, p in made.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in model.named_parameters()
    }


def test_a_configuration_may_say_that_weights_are_codes(tmp_path):
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "llama", "quantization_config": how}))
    made = model_of(str(tmp_path / "config.json"))
    assert {m.kind for m in made.modules() if isinstance(m, QuantizedLinear)} == {"nf4"}
    with pytest.raises(ModelError, match="weights are nf4 already: leave out --quantize"):
        model_of(str(tmp_path), quantize="int8")


def test_a_repository_in_the_cache_is_read(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "llama"}))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(tmp_path / file))
    assert config_of("some/model")[0].vocab_size == 300


LLAMA = {**SMALL, "model_type": "llama"}
ODD = {  # what config.json holds -> what is said
    "{": "not valid JSON", "[1]": "expected a JSON object", "{}": "model_type is None, which transformers",
    json.dumps({"model_type": "no-such"}): "model_type is 'no-such', which transformers .* does not know",
    json.dumps({"model_type": ["llama"]}): "does not know",
    json.dumps({"model_type": "t5"}): "t5 is not a causal language model",
    json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}): "BertForMaskedLM is not a causal",
    json.dumps({**LLAMA, "num_hidden_layers": 10**6}): "num_hidden_layers: expected a whole number from 1 to 1000",
    json.dumps({**LLAMA, "vocab_size": 0}): "vocab_size: expected a whole number",
    json.dumps({**LLAMA, "hidden_size": "wide"}): "hidden_size|not a configuration",
    json.dumps({**LLAMA, "num_attention_heads": 0}): "no model can be built|not a configuration",
    json.dumps({**LLAMA, "quantization_config": {"quant_method": "gptq"}}): "'gptq'.*not supported",
    "[" * 100_000: "not valid JSON",
}  # fmt: skip


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[-40:])
def test_odd_configurations(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=ODD[text]) as error:
        model_of(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_unknown_names(tmp_path):
    with pytest.raises(ModelError, match="did you mean 'meta-llama-3-8b'"):
        config_of("meta-lama-3-8b")
    for name in ("no/such/model", "no such model", "owner/name"):
        with pytest.raises(ModelError, match="a hub repository in the cache, or one of meta-llama-3-8b"):
            config_of(name)
    with pytest.raises(ModelError, match="no such file"):
        config_of(str(tmp_path / "gone.json"))
    with pytest.raises(ModelError, match="no such file"):
        config_of(str(tmp_path))


def test_what_cannot_be_quantised():
    with pytest.raises(ConfigError, match="expected one of nf4, int8, fp8"):
        model_of("smollm2-135m", quantize="nf3")
    with pytest.raises(ModelError, match="tied to the embedding.*leave out --quantize-head"):
        model_of("smollm2-135m", quantize="nf4", quantize_head=True)


def test_shapes_take_no_code_of_a_files_own(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({**LLAMA, "auto_map": {"AutoConfig": "x.C"}, "_attn_implementation": "owner/kernel"})
    )
    assert type(model_of(str(tmp_path))).__name__ == "LlamaForCausalLM"
    with pytest.raises(ModelError):
        load_model(str(tmp_path))
