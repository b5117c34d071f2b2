"""What an adapter of PEFT replaces whole (modules_to_save, biases, embeddings) counts as in PEFT, and the base can be had back."""

import copy
import json

import pytest
import torch
from helpers import build, logits, prompted
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import plopfast as pf
from plopfast.lora.injection import unload
from plopfast.lora.layer import adapters, disabled
from plopfast.lora.replaced import replaced_values
from plopfast.models.streaming import stream
from plopfast.support.errors import AdapterError

CASES = {
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding and head": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "norms": ("llama", {"modules_to_save": ["input_layernorm", "model.norm"]}),
    "tied": ("qwen2-tied", {"modules_to_save": ["lm_head"]}),
    "the embedding of a tied head": ("qwen2-tied", {"modules_to_save": ["embed_tokens"]}),
    "biases of adapted modules": ("qwen2", {"bias": "lora_only"}),
    "all biases": ("gpt2", {"bias": "all"}),
    "biases and a head": ("qwen2", {"bias": "all", "modules_to_save": ["lm_head"]}),
}


def base(family):
    model = build(family.removesuffix("-tied"))
    if family.endswith("-tied"):
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def by_peft(case, folder):
    """What PEFT computes with an adapter, saved in `folder`, whose values are all random."""
    family, settings = CASES[case]
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base(family), config)
    draw = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(base(family), folder).eval())


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.mark.filterwarnings("ignore")
def test_it_counts_as_in_peft(case, tmp_path):
    theirs, family = by_peft(case, tmp_path / "theirs"), CASES[case][0]
    model = base(family)
    before, names = logits(model), list(model.state_dict())
    pf.load_adapter(model, tmp_path / "theirs")
    assert replaced_values(model) and not any(p.requires_grad for p in replaced_values(model).values())
    torch.testing.assert_close(logits(model), theirs, rtol=1e-5, atol=1e-5)
    with disabled(model):
        assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model), theirs, rtol=1e-5, atol=1e-5)
    other = copy.deepcopy(model)
    unload(model)
    assert torch.equal(logits(model), before) and list(model.state_dict()) == names and not replaced_values(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family.endswith("-tied") or family == "gpt2"), "the very Parameters are back"
    torch.testing.assert_close(logits(other), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_it_is_saved_again_for_peft_and_for_us(case, tmp_path):
    theirs, family = by_peft(case, tmp_path / "theirs"), CASES[case][0]
    model = base(family)
    pf.load_adapter(model, tmp_path / "theirs")
    pf.save_adapter(model, tmp_path / "ours")
    peft = PeftModel.from_pretrained(base(family), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(peft), theirs, rtol=1e-5, atol=1e-5)
    again = base(family)
    pf.load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore")
def test_merged_it_is_the_models_own(case, tmp_path):
    theirs, family = by_peft(case, tmp_path / "theirs"), CASES[case][0]
    model = base(family)
    pf.load_adapter(model, tmp_path / "theirs")
    pf.merge(model)
    assert not replaced_values(model)
    model.save_pretrained(tmp_path / "merged")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for one in (model, fresh):
        torch.testing.assert_close(logits(one), theirs, rtol=1e-5, atol=1e-5)
    assert fresh.config.tie_word_embeddings == (family == "gpt2"), "other programs go by what the configuration says"


def test_training_leaves_it_as_it_is_and_says_so(tmp_path):
    by_peft("head", tmp_path / "theirs")
    model = base("llama")
    pf.load_adapter(model, tmp_path / "theirs")
    kept = {name: value.clone() for name, value in replaced_values(model).items()}
    rows = prompted([[1, *range(3, 20)]] * 4, [5] * 4)
    trainer = pf.Trainer(model, pf.TrainConfig(max_steps=2, lr=1e-2), rows)
    trainer.fit()
    assert any("stays as it is: lm_head.weight" in note for note in trainer.notes)
    assert all(torch.equal(value, kept[name]) for name, value in replaced_values(model).items())


def test_what_does_not_fit_changes_nothing(tmp_path):
    by_peft("head", tmp_path / "whole")
    held = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    head = "base_model.model.lm_head.weight"

    def changed(name, tensors, **config):
        folder = tmp_path / name
        folder.mkdir()
        kept = json.loads((tmp_path / "whole" / "adapter_config.json").read_text()) | config
        (folder / "adapter_config.json").write_text(json.dumps(kept))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    norm = "base_model.model.model.norm.weight"
    for folder, said in (
        (changed("nan", held | {head: held[head] * float("nan")}), "lm_head.weight holds NaN"),
        (changed("longer", held | {head: torch.zeros(310, 32)}), r"another size of the vocabulary: lm_head.weight is \[300, 32\]"),
        (changed("unsaid", held | {norm: torch.ones(32)}), "unexpected tensor 'model.norm.weight'"),
        (changed("absent", held | {norm + "s": torch.ones(32)}, modules_to_save=["lm_head", "norm"]), "no parameter"),
        (changed("missing", {k: t for k, t in held.items() if k != head}), "'lm_head'.*for which there are no tensors"),
        (changed("odd", held, modules_to_save="lm_head"), "modules_to_save: expected"),
        (changed("biases", held, bias="some"), "bias: expected"),
    ):  # fmt: skip
        model = base("llama")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(AdapterError, match=said):
            pf.load_adapter(model, folder)
        assert not adapters(model) and all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_an_embedding_that_peft_saved_beside_is_honoured(tmp_path):
    model = get_peft_model(base("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.get_input_embeddings().weight.data.normal_()
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    theirs = logits(PeftModel.from_pretrained(base("llama"), tmp_path / "theirs").eval())
    ours = base("llama")
    pf.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), theirs, rtol=1e-5, atol=1e-5)


def test_streamed_weights_are_not_replaced(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"], task_type="CAUSAL_LM")
    get_peft_model(base("llama"), config).save_pretrained(tmp_path / "theirs")
    model = base("llama")
    stream(model, "cpu")
    with pytest.raises(AdapterError, match="replaces .*down_proj.weight, which is streamed: load the model without"):
        pf.load_adapter(model, tmp_path / "theirs")


@pytest.mark.parametrize("option", ["--modules-to-save=lm_head", "--bias"])
def test_training_it_is_refused_by_name(option, capsys):
    with pytest.raises(SystemExit):
        pf.cli.main.main(["train", "--out", "x", option])
    assert "plopfast trains low-rank updates alone, no" in capsys.readouterr().err
