"""`quantize=`: codes are made while a model is read, and what is wrong with the model is said as for a dense one."""

import copy
import json
import math
import sys

import pytest
import torch
import transformers
from helpers import CONFIGS, SMALL, build, everywhere, logits, random_batches
from safetensors.torch import load_file, save_file
from torch import nn

import plopfast as pf
from plopfast.models.quantized import KINDS, QuantizedLinear, quantized
from plopfast.models.quantized_experts import make_dense
from plopfast.models.quantizer import Encoding
from plopfast.models.running import output_head
from plopfast.models.weights import is_finite
from plopfast.support.errors import ConfigError, ModelError
from plopfast.support.memory import mapped_files

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Writes a model to a folder, with the small tokenizer."""

    def save(model, **more):
        model.save_pretrained(tmp_path / "model", **more)
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def quantized_after(model, kind, head=False):
    """The model as it is, with the modules replaced one by one once it is in memory."""
    for info in pf.linear_modules(model, include_head=head):
        linear = info.module
        if info.transposed:
            linear = nn.Linear(info.n_in, info.n_out)
            linear.weight, linear.bias = nn.Parameter(info.module.weight.T.contiguous()), info.module.bias
        model.set_submodule(info.name, quantized(linear, kind))
    return model


def codes_in(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def edited(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "architecture", sorted(CONFIGS.keys() - {"qwen2"})
)  # transformers adds a token to its tokenizer
def test_codes_are_those_of_the_dense_weights(architecture, kind, saved):
    model = build(architecture)
    loaded, _ = pf.load_model(saved(model), quantize=kind)
    assert codes_in(loaded) == [info.name for info in pf.linear_modules(model)], "neither embedding nor head"
    assert {info.frozen.kind for info in pf.linear_modules(loaded)} == {kind}
    assert torch.equal(logits(loaded), logits(quantized_after(copy.deepcopy(model), kind)))
    assert not torch.equal(logits(loaded), logits(model))
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values()) and not loaded.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_is_that_of_products_and_of_what_stays_dense(dtype, kind, model_folder):
    loaded, _ = pf.load_model(model_folder, dtype=dtype, quantize=kind)
    assert (
        loaded.model.embed_tokens.weight.dtype == loaded.model.norm.weight.dtype == loaded.lm_head.weight.dtype == dtype
    )
    assert {info.frozen.dtype for info in pf.linear_modules(loaded)} == {dtype}
    after = quantized_after(pf.load_model(model_folder, dtype=dtype)[0], kind)
    assert logits(loaded).dtype == dtype and torch.equal(logits(loaded), logits(after))


def test_shards(saved):
    model = build("llama")
    folder = saved(model, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(logits(pf.load_model(folder, quantize="nf4")[0]), logits(quantized_after(model, "nf4")))


def test_the_head_is_quantised_on_request(model_folder, llama):
    loaded, _ = pf.load_model(model_folder, quantize="int8", quantize_head=True)
    assert "lm_head" in codes_in(loaded) and output_head(loaded) is loaded.lm_head
    assert torch.equal(logits(loaded), logits(quantized_after(llama, "int8", head=True)))


def test_a_tied_head_stays(saved):
    folder = saved(build("gpt2"))
    assert "lm_head" not in codes_in(pf.load_model(folder, quantize="int8")[0])
    with pytest.raises(
        ModelError, match=r"output head \(lm_head\) is tied to the embedding.*leave out --quantize-head"
    ):
        pf.load_model(folder, quantize="int8", quantize_head=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.weight"), rf"1 missing \({UP}.weight\)"),
        (lambda t: t.pop("model.norm.weight"), r"1 missing \(model.norm.weight\)"),
        (lambda t: t.update(extra=torch.zeros(2)), r"1 not expected \(extra\)"),
        (lambda t: t.update({f"{UP}.weight": torch.zeros(48, 31)}), rf"1 of another shape \({UP}.weight "),
        (lambda t: t.update({f"{UP}.weight": torch.zeros(32, 48)}), rf"1 of another shape \({UP}.weight "),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), "cannot be loaded|of another shape .*norm"),
        (lambda t: t[f"{UP}.weight"][3, 4].fill_(math.nan), rf"NaN or infinity in 1 of its weights \({UP}.weight\)"),
        (lambda t: t[f"{UP}.weight"][3, 4].fill_(-math.inf), rf"NaN or infinity in 1 of its weights \({UP}.weight\)"),
        (
            lambda t: t["lm_head.weight"][3, 4].fill_(math.nan),
            r"NaN or infinity in 1 of its weights \(lm_head.weight\)",
        ),
    ],
)
def test_damaged_weights_are_refused(kind, change, message, model_folder):
    with pytest.raises(ModelError, match=message):
        pf.load_model(edited(model_folder, change), quantize=kind)


def test_wrong_settings(model_folder):
    with pytest.raises(ConfigError, match=r"quantize: expected one of nf4, int8, fp8, got 'int4'"):
        pf.load_model(model_folder, quantize="int4")
    with pytest.raises(ConfigError, match="quantize_head needs quantize"):
        pf.load_model(model_folder, quantize_head=True)


def test_an_odd_number_of_values(saved):
    odd = {
        "hidden_size": 33,
        "intermediate_size": 45,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
    }
    folder = saved(transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL | odd)))
    with pytest.raises(ModelError, match=r"gate_proj: nf4 puts two values into a byte, and 45 x 33 is an odd number"):
        pf.load_model(folder, quantize="nf4")
    pf.load_model(folder, quantize="int8")


class OwnLinear(nn.Linear):
    """As Falcon's: what it computes is its own matter."""

    def forward(self, x):
        return x @ self.weight.T


def test_modules_that_compute_in_a_way_of_their_own(llama):
    infos = pf.linear_modules(llama)
    for info in infos[1:]:
        info.module.__class__ = OwnLinear
    Encoding("int8", head=False).swap(llama)
    assert codes_in(llama) == [infos[0].name]
    llama.set_submodule(infos[0].name, infos[1].module)
    with pytest.raises(ModelError, match=r"its linear modules \(OwnLinear\) are neither nn.Linear nor Conv1D"):
        Encoding("int8", head=False).swap(llama)


@pytest.mark.slow  # its path from the conversion on is that of any folder
def test_the_default_model(default_model):
    """It comes from a GGUF file, which is converted to float32 once and quantised from that."""
    dense, _ = default_model
    loaded, _ = pf.load_model(quantize="int8")
    assert loaded.name_or_path == dense.name_or_path and len(codes_in(loaded)) == 210
    assert (logits(loaded) - logits(dense)).norm() < 0.1 * logits(dense).norm()


def test_nan_in_fp8():
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    wrong = ~codes.float().isfinite()
    assert wrong.sum() == 2 and is_finite(codes[~wrong])
    assert not any(is_finite(code) for code in codes[wrong].split(1))


def test_nothing_marks_it_but_what_refuses_to_save(model_folder, tmp_path):
    loaded, _ = pf.load_model(model_folder, quantize="nf4")
    assert not hasattr(loaded, "is_quantized") and not hasattr(loaded, "quantization_method")
    for module in loaded.modules():
        config = getattr(module, "config", None)
        assert config is None or not {"quantization_config", "_is_quantized"} & vars(config).keys()
    with pytest.raises(ModelError, match=r"keeps codes in 21 modules \(model.layers.0.self_attn.q_proj, \.\.\.\)"):
        loaded.save_pretrained(tmp_path / "out")
    assert make_dense(loaded)
    loaded.save_pretrained(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(loaded))


def test_copies_training_and_peft(model_folder):
    """What others do with a model works on one that keeps codes, too."""
    from peft import LoraConfig, get_peft_model

    loaded, _ = pf.load_model(model_folder, quantize="nf4")
    other = copy.deepcopy(loaded)
    assert torch.equal(logits(other), logits(loaded))
    pf.inject(other, everywhere(other))
    batch = random_batches(count=1)[0]
    other(**batch).loss.backward()
    assert all(p.grad is not None for name, p in other.named_parameters() if "lora_B" in name)
    before = logits(loaded)
    peft = get_peft_model(loaded, LoraConfig(r=2, target_modules=["lm_head"]))
    assert torch.equal(logits(peft), before)
    peft(**batch).loss.backward()


def test_a_model_of_another_kind_keeps_its_generation_config(model_folder):
    file = model_folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top_k": 7}))
    loaded, _ = pf.load_model(model_folder, quantize="int8")
    assert loaded.generation_config.top_k == 7 and loaded.name_or_path == str(model_folder)


def test_files_are_let_go(model_folder):
    """A dense model lies in its file, as it is mapped into memory. One whose layers are codes must not keep that there."""

    def in_a_file(model):
        return [name for name, p in model.named_parameters() if any(p.data_ptr() in where for where in mapped_files())]

    dense, _ = pf.load_model(model_folder)
    assert "model.embed_tokens.weight" in in_a_file(dense) or sys.platform != "linux"
    loaded, _ = pf.load_model(model_folder, quantize="nf4")
    assert in_a_file(loaded) == [] and loaded.lm_head.weight is not loaded.model.embed_tokens.weight
