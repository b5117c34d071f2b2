"""Experts whose weights are codes compute what the decoded weights compute: alone, with adapters, in scores, merged, saved."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import families, reference

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.lora.merging import merge
from plopfast.models import loading
from plopfast.models.experts import BySegments, expert_weights, mixture_of
from plopfast.models.quantized import KINDS, ExpertCodes
from plopfast.models.quantized_experts import make_dense
from plopfast.models.saved import save_model
from plopfast.models.shapes import model_of
from plopfast.support.errors import AdapterError, ModelError

FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "nemotron_h", "deepseek_v3"]
BATCHES = reference.batches_of(families.VOCABULARY)
BATCH = BATCHES[0]


@pytest.fixture
def loaded(tmp_path, tokenizer, monkeypatch):
    """A tiny model of the family, written to a folder and read with `quantize`."""
    monkeypatch.setattr(loading, "_check_embedding", lambda *_: None)  # the tokenizer has more tokens

    def load(family, kind, change=lambda tensors: None, **options):
        families.build(family).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        file = tmp_path / family / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        return pf.load_model(tmp_path / family, quantize=kind, **options)[0]

    return load


def logits(model):
    return reference.real_logits(model, BATCH)


def decoded(model):
    model = copy.deepcopy(model)
    make_dense(model)
    assert not any(isinstance(module, ExpertCodes) or "forward" in vars(module) for module in model.modules())
    return model


def placed(model, end=""):
    infos = [info for info in pf.linear_modules(model) + expert_weights(model) if info.name.endswith(end)]
    return pf.Placement({info.name: (2, 4.0) for info in infos}, [], "explicit", 0)


def adapted(model, end="", **options):
    model = copy.deepcopy(model)
    pf.inject(model, placed(model, end), **options)
    draw = torch.Generator().manual_seed(1)
    for module in adapters(model).values():
        module.lora_B.data = 0.3 * torch.randn(module.lora_B.shape, generator=draw)
    return model


def gradients(model):
    logits = model(**BATCH).logits[BATCH["attention_mask"].bool()]
    (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_compute_what_the_decoded_weights_compute(family, kind, loaded):
    """The decoded model takes the class's own forward. The shared experts are linear modules, and codes too."""
    model = loaded(family, kind)
    names = [info.name for info in expert_weights(families.build(family))]
    infos = expert_weights(model)
    assert [info.name for info in infos] == names and {info.frozen.kind for info in infos} == {kind}
    torch.testing.assert_close(logits(model), logits(decoded(model)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(families.build(family)), atol=1e-6)
    dense, codes = (sum(p.nbytes for p in of.parameters()) for of in (families.build(family), model))
    assert codes < (0.75 if kind == "nf4" else 0.85) * dense
    assert f"{kind} codes in {len(names)} weights of experts" in pf.models.linears.words_of_codes(model)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "qwen2_moe"])
def test_adapters_and_their_gradients(family, loaded):
    """On experts, and before experts that have none: there the gradient passes through the codes."""
    model = loaded(family, "nf4")
    for end in ("experts.down_proj", "experts.gate_up_proj", "k_proj"):
        one, two = adapted(model, end), adapted(decoded(model), end)
        torch.testing.assert_close(logits(one), logits(two), rtol=1e-5, atol=1e-5)
        found, exact = gradients(one), gradients(two)
        assert found.keys() == exact.keys() and found
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_scores(family, loaded):
    model = loaded(family, "int8")
    one, two = (pf.score(of, BATCHES) for of in (model, decoded(model)))
    assert one.modules == pytest.approx(two.modules, rel=1e-5)
    assert [*one.experts] == [info.name for info in expert_weights(model)]
    drawn = [pf.score(of, BATCHES, baseline="monte-carlo", mc_samples=64) for of in (model, decoded(model))]
    assert drawn[0].modules == pytest.approx(drawn[1].modules, rel=1e-5)


@pytest.mark.parametrize("into", ["dense", "quantized"])
@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "mixtral"])
def test_merging(family, into, loaded):
    model = loaded(family, "int8")
    with_adapters = adapted(model, "experts.down_proj")
    exact = logits(adapted(decoded(model), "experts.down_proj"))
    with pytest.raises(AdapterError, match="int8 weights, which take no update in place"):
        merge(with_adapters)
    assert merge(with_adapters, into=into) == list(placed(model, "experts.down_proj").modules)
    kinds = {info.type: info.frozen.kind for info in expert_weights(with_adapters)}
    assert kinds["experts.down_proj"] == ("dense" if into == "dense" else "int8")
    assert kinds["experts.gate_up_proj"] == ("dense" if into == "dense" else "int8")
    moved, off = (exact - logits(model)).norm(), (logits(with_adapters) - exact).norm()
    assert off <= (1e-4 if into == "dense" else 0.3) * moved


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_saved_as_those_of_the_dense_model_and_read_again(family, loaded, tmp_path):
    """On the weights of experts and on shared experts, which PEFT would take for them in a list of modules."""
    model = loaded(family, "int8")
    dense, codes = adapted(families.build(family), "down_proj"), adapted(model, "down_proj")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of patterns
        for one, name in ((dense, "dense"), (codes, "codes")):
            pf.save_adapter(one, tmp_path / name)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("dense", "codes")]
    assert configs[0] | {"base_model_name_or_path": None} == configs[1] | {"base_model_name_or_path": None}
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("dense", "codes")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    again = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.load_adapter(again, tmp_path / "codes")
    assert torch.equal(logits(again), logits(codes))
    both = {name: (2, 4.0) for name in placed(model, "_proj").modules if "experts." in name}
    pf.inject(other := copy.deepcopy(model), pf.Placement(both, [], "explicit", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pf.save_adapter(other, tmp_path / "both")
    pf.inject(plain := families.build(family), pf.Placement(both, [], "explicit", 0))
    assert adapters(plain).keys() == adapters(other).keys()
    assert sorted(pf.load_adapter(copy.deepcopy(model), tmp_path / "both")) == sorted(both)


def test_adapters_on_shared_experts_alone(loaded, tmp_path):
    """They are parameters for PEFT, which would take `down_proj` in a list of modules for the experts' own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pf.save_adapter(adapted(loaded("qwen2_moe", "int8"), "shared_expert.down_proj"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [] and len(config["target_parameters"]) == 4


def test_a_saved_model_has_dense_experts(loaded, tmp_path, tokenizer):
    model = loaded("mixtral", "nf4")
    with pytest.warns(UserWarning, match="8 weights of experts are written dense"):
        save_model(model, tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = pf.load_model(tmp_path / "saved")
    assert {info.frozen.kind for info in expert_weights(again)} == {"dense"}
    assert {info.frozen.kind for info in pf.linear_modules(again)} == {"nf4"}
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="keeps codes in"):
        model.save_pretrained(tmp_path / "other")


def test_copies_casts_and_pickles(loaded):
    model = loaded("gpt_oss", "nf4")
    experts = model.model.layers[0].mlp.experts
    for other in (copy.deepcopy(model).model.layers[0].mlp.experts, pickle.loads(pickle.dumps(experts))):
        assert mixture_of(other).module is other and isinstance(other.forward, BySegments)
    other = copy.deepcopy(model)
    experts.down_proj.absmax.mul_(2)  # a copy has codes of its own
    assert not torch.allclose(logits(other), logits(model), atol=1e-5)
    half = copy.deepcopy(model).to(torch.bfloat16)
    held = half.model.layers[0].mlp.experts.down_proj
    assert held.absmax.dtype == torch.float32 and held.weight.dtype == torch.uint8 and held.dtype == torch.bfloat16
    assert half(**BATCH).logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits(half).float(), logits(decoded(half)).float(), rtol=0.05, atol=0.01)


def test_what_does_not_fit_is_said(loaded):
    def with_nan(tensors):
        found = next(key for key in tensors if "experts" in key and tensors[key].dim() >= 2)
        tensors[found].view(-1)[3] = float("nan")

    with pytest.raises(ModelError, match="NaN"):
        loaded("mixtral", "int8", with_nan)

    def without(tensors):
        for key in [
            key for key in tensors if "layers.1" in key and "experts" in key and ("w2" in key or "down" in key)
        ]:
            del tensors[key]

    with pytest.raises(ModelError, match="missing"):
        loaded("mixtral", "int8", without)


def test_experts_of_nf4_begin_with_a_block(loaded, monkeypatch):
    from plopfast.kernels import torch_codes

    monkeypatch.setattr(torch_codes, "BLOCK", 1 << 20)
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj: nf4 takes 1048576 values at a time"):
        loaded("mixtral", "nf4")


def test_an_estimate_counts_their_codes(tmp_path):
    from plopfast.training.estimate import estimate_shapes

    families.build("mixtral").config.save_pretrained(tmp_path)
    found = {}
    for kind in (None, "nf4"):
        model = model_of(str(tmp_path), quantize=kind)
        assert {info.frozen.kind for info in expert_weights(model)} == {kind or "dense"}
        made = {"down": placed(model, "experts.down_proj")}
        (one,) = estimate_shapes(model, made, pf.TrainConfig(), rows=2, row_tokens=16)
        found[kind] = one
    assert found["nf4"].weights_mib < 0.45 * found[None].weights_mib
    largest = max(info.experts * info.n_out * info.n_in for info in expert_weights(model))
    assert found["nf4"].parts["workspace of a decoded weight"] == 2 * largest / 2**20
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kinds = {info.frozen.kind for info in expert_weights(model_of(str(tmp_path)))}
    assert kinds == {"dense"}, "checkpoints of bitsandbytes hold experts dense"
