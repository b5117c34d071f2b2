"""Names that PEFT would take for a mixture's experts: files that it loads right, and that it wrote itself."""

import builtins
import contextlib
import copy
import json
import warnings

import pytest
import torch
import transformers
from helpers import SMALL, build, logits, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.support.errors import AdapterError


@pytest.fixture
def mixture():
    """A dense layer and two of experts, with a shared one in each."""
    torch.manual_seed(0)
    more = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
    config = transformers.DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, **more, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=1,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def place(model, **options):
    """Ranks and alphas of their own in each layer, on every linear module."""
    modules = {info.name: (2 + info.layer, 4.0 + info.layer % 2) for info in pf.linear_modules(model)}
    pf.inject(model, pf.Placement(modules, [], "all", 0), **options)
    randomise(model)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_adapts_shared_experts_and_dense_layers(mixture, tmp_path, rslora, recwarn):
    base = copy.deepcopy(mixture)
    place(mixture, rslora=rslora, dropout=0.25)
    pf.save_adapter(mixture, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    named = {name.rpartition(".")[0].rpartition(".")[2] for name in config["target_parameters"]}
    assert named == {"gate_proj", "up_proj", "down_proj"} and not named & {*config["target_modules"]}
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(mixture), rtol=1e-5, atol=1e-5)
    assert not [one for one in recwarn if "missing adapter keys" in str(one.message)]
    theirs.save_pretrained(tmp_path / "theirs")
    for folder, dropout in ("adapter", 0.25), ("theirs", 0.0):
        ours = copy.deepcopy(base)
        pf.load_adapter(ours, tmp_path / folder)
        torch.testing.assert_close(logits(ours), logits(mixture), rtol=1e-5, atol=1e-5)
        assert {module.dropout for module in adapters(ours).values()} == {dropout}, "PEFT has none for parameters"


def test_other_modules_are_named_as_ever(mixture, tmp_path):
    modules = {info.name: (2, 4.0) for info in pf.linear_modules(mixture) if info.type == "o_proj"}
    pf.inject(mixture, pf.Placement(modules, [], "o", 0), dropout=0.25)
    pf.save_adapter(mixture, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj"] and "target_parameters" not in config
    assert config["lora_dropout"] == 0.25


def test_adapters_of_other_parameters_are_refused(mixture, tmp_path):
    """Such as a router that is no linear module."""
    base = copy.deepcopy(mixture)
    config = LoraConfig(r=2, target_modules=["o_proj"], target_parameters=["mlp.gate.weight"], task_type="CAUSAL_LM")
    get_peft_model(mixture, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"target_parameters = \['mlp.gate.weight'\]: expected weights of linear"):
        pf.load_adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["model.layers.0.mlp.up_proj.weight", 3], "target_parameters"),
        ([], r"target_modules = .* leaves out model.layers.0.mlp.down_proj"),
        (["mlp.down_proj.weight", "nowhere.weight"], r"target_parameters = \['nowhere.weight'\]"),
    ],
)
def test_bad_target_parameters(mixture, tmp_path, parameters, message):
    base = copy.deepcopy(mixture)
    place(mixture)
    file = pf.save_adapter(mixture, tmp_path / "adapter") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_parameters": parameters}))
    with pytest.raises(AdapterError, match=message):
        pf.load_adapter(base, tmp_path / "adapter")


def test_a_bad_dropout_in_the_metadata(mixture, tmp_path):
    place(mixture)
    file = pf.save_adapter(mixture, tmp_path / "adapter") / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "plopfast_dropout": "1.5"})
    pf.unload(mixture)
    with pytest.raises(AdapterError, match="plopfast_dropout in its metadata.*1.5"):
        pf.load_adapter(mixture, tmp_path / "adapter")


def laguna():
    config = transformers.LagunaConfig(
        **SMALL,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def mamba():
    config = transformers.MambaConfig(vocab_size=SMALL["vocab_size"], hidden_size=32, num_hidden_layers=2)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("make", "end", "said"),
    [
        (laguna, "shared_experts.up_proj", r"PEFT .* renames .*shared_experts.up_proj.lora_A.weight and \d+ more"),
        (mamba, "out_proj", r"PEFT .* refuses backbone.layers.0.mixer.out_proj and 1 more"),
    ],
)  # fmt: skip
def test_what_peft_would_not_load_is_said_after_saving(make, end, said, tmp_path):
    """It is true: PEFT warns or raises. plopfast loads its own file."""
    model = make()
    names = [name for name, _ in model.named_modules() if name.endswith(end)]
    base = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pf.inject(model, pf.Placement(dict.fromkeys(names, (2, 4.0)), [], "mine", 0))
    randomise(model)
    with pytest.warns(UserWarning, match=said + ".*: load it with plopfast's load_adapter, or merge"):
        pf.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as found, contextlib.suppress(ValueError):
        warnings.simplefilter("always")
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        assert any("missing adapter keys" in str(one.message) for one in found)
    pf.load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(base), logits(model))


def test_peft_is_not_asked_in_vain(tmp_path, recwarn, monkeypatch):
    """Families without other names: importing PEFT would take 3 s. And where it isn't installed, nothing can be said."""
    plain, mixed, asked, real = build("llama"), laguna(), [], builtins.__import__
    for model in (plain, mixed):
        place(model)

    def without_peft(name, *rest):
        asked.append(name)
        if name == "peft":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    pf.save_adapter(plain, tmp_path / "plain")
    assert "peft" not in asked
    pf.save_adapter(mixed, tmp_path / "mixed")
    assert "peft" in asked and not [one for one in recwarn if "PEFT" in str(one.message)]


def test_an_error_inside_peft_costs_no_adapter(tmp_path, monkeypatch):
    model = laguna()
    place(model)
    name = "peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers"
    monkeypatch.setattr(name, lambda model, *_: model[1])
    with pytest.warns(UserWarning, match=r"PEFT \S+ could not say whether it would load it \(TypeError"):
        pf.save_adapter(model, tmp_path / "adapter")
    pf.load_adapter(laguna(), tmp_path / "adapter", check_base=False)
