"""Merging: shared weights are refused, and the logits are compared."""

import math

import pytest
import torch
import transformers
from helpers import SMALL, build, everywhere, logits, plopfast, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import plopfast as pf
from plopfast.lora import injection, merging
from plopfast.lora.layer import adapters
from plopfast.lora.merging import merge_checked
from plopfast.models.frozen import sharers
from plopfast.models.weights import check_finite
from plopfast.support.errors import AdapterError, ModelError, PlacementError

UP = "model.layers.{}.mlp.up_proj"


def placement(*names):
    return pf.Placement(dict.fromkeys(names, (2, 4.0)), [], "explicit", 0)


def tied():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()


def one_parameter(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def one_module(model):
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj


def one_storage(model):
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data


@pytest.mark.parametrize("share", [one_parameter, one_module, one_storage])
@pytest.mark.parametrize("names", [[UP.format(0)], [UP.format(1)], [UP.format(0), UP.format(1)]])
def test_modules_that_share_a_weight_are_refused(llama, share, names):
    share(llama)
    before, modules = logits(llama), dict(llama.named_modules())
    with pytest.raises(PlacementError, match=r"up_proj shares its weight with .*up_proj, so merging would change"):
        pf.inject(llama, placement(*names))
    assert torch.equal(logits(llama), before) and dict(llama.named_modules()) == modules
    pf.inject(llama, placement(UP.format(2)))  # the others may have adapters


def test_a_tied_head(tmp_path):
    model = tied()
    assert sharers(model, ["lm_head"]) == {"lm_head": ["model.embed_tokens"]}
    with pytest.raises(PlacementError, match="lm_head shares its weight with model.embed_tokens"):
        pf.inject(model, placement("lm_head"))
    assert pf.score(model, [{"input_ids": torch.arange(3, 20)[None]}], include_head=True).modules["lm_head"]
    untied = build("llama")
    assert not sharers(untied, ["lm_head"])
    pf.inject(untied, placement("lm_head"))
    randomise(untied)
    pf.save_adapter(untied, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="lm_head shares its weight with model.embed_tokens"):
        pf.load_adapter(model, tmp_path / "adapter", check_base=False)


@pytest.mark.parametrize("merge", [pf.merge, merge_checked])
def test_a_weight_that_came_to_be_shared_is_not_merged(llama, merge):
    pf.inject(llama, placement("lm_head", UP.format(0)))
    randomise(llama)
    llama.lm_head.base.weight = llama.model.embed_tokens.weight
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    with pytest.raises(AdapterError, match="lm_head shares its weight with model.embed_tokens"):
        merge(llama)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_drift_is_measured(any_model, dtype):
    any_model.to(dtype)
    pf.inject(any_model, everywhere(any_model, alpha=16.0))
    randomise(any_model)
    ids = [5, 6, 7, 299, 4]
    with torch.no_grad():
        adapted = any_model(torch.tensor([ids])).logits.double()
    drift = merge_checked(any_model, ids)
    assert not adapters(any_model)
    with torch.no_grad():
        merged = any_model(torch.tensor([ids])).logits.double()
    assert drift == pytest.approx(((merged - adapted).norm() / adapted.norm()).item())
    assert 0 < drift < merging.BOUNDS[dtype]
    if dtype == torch.float32:
        assert drift < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_that_changes_the_model_is_an_error(llama, dtype, monkeypatch):
    """As if each update were added twice."""
    llama.to(dtype)
    pf.inject(llama, everywhere(llama))
    randomise(llama)
    delta = pf.LoRALinear.delta_NK
    monkeypatch.setattr(pf.LoRALinear, "delta_NK", lambda self: 2 * delta(self))
    with pytest.raises(
        AdapterError, match=r"merging moved the logits by .* of their norm, more than .*, the bound for torch"
    ):
        merge_checked(llama)


def test_logits_that_are_not_finite_are_not_merged(llama):
    pf.inject(llama, placement(UP.format(0)))
    adapters(llama)[UP.format(0)].lora_B.data.fill_(math.nan)
    with pytest.raises(AdapterError, match="logits are NaN or infinite: not merged"):
        merge_checked(llama)
    assert adapters(llama)


def test_a_model_is_checked_before_it_is_written(llama):
    check_finite(llama, "out")
    llama.model.layers[1].mlp.up_proj.weight.data[3, 3] = math.inf
    llama.register_buffer("kept", torch.tensor([math.nan]))
    llama.register_buffer("derived", torch.tensor([math.nan]), persistent=False)
    with pytest.raises(
        ModelError, match=r"out: NaN or infinity in 2 of its weights \(kept, model.layers.1.mlp.up_proj"
    ):
        check_finite(llama, "out")


def test_merge_on_the_command_line(model_folder, llama, tmp_path, capsys):
    """It prints the drift; an adapter with NaN, and one whose merged weights overflow, write nothing."""
    randomised = build("llama")
    pf.inject(randomised, placement(UP.format(0)))
    randomise(randomised)
    adapter = pf.save_adapter(randomised, tmp_path / "adapter")
    out = tmp_path / "run"
    command = ["merge", "--model", model_folder, "--adapter", adapter, "--out", out]
    assert plopfast(*command, "--dtype", "float32") == 0
    assert "drift: the logits moved by " in capsys.readouterr().out
    file = adapter / "adapter_model.safetensors"
    good = load_file(file)
    save_file({key: torch.full_like(tensor, math.nan) for key, tensor in good.items()}, file)
    command[-1] = tmp_path / "other"
    assert plopfast(*command) == 2 and "holds NaN or infinity" in capsys.readouterr().err
    save_file({key: tensor * 1e25 for key, tensor in good.items()}, file)
    assert plopfast(*command, "--dtype", "float32") == 2 and "not merged" in capsys.readouterr().err
    assert not (tmp_path / "other" / "merged").exists()


def test_every_module_that_shares_is_found():
    """Also where a module of another kind holds the weight, under two names."""
    model = nn.Module()
    model.embed = nn.Embedding(5, 4)
    model.head, model.plain = nn.Linear(4, 5, bias=False), nn.Linear(4, 5)
    model.head.weight = model.embed.weight
    model.again = model.embed
    assert sharers(model, ["head", "plain"]) == {"head": ["again", "embed"]}
    with torch.device("meta"):
        empty = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    assert not sharers(empty, ["a", "b"]), "without storage they share none"


def test_a_merged_model_that_is_not_finite_is_not_written(model_folder, llama, tmp_path, capsys, monkeypatch):
    pf.inject(llama, placement(UP.format(0)))
    adapter = pf.save_adapter(llama, tmp_path / "adapter")

    def spoiled(model, into):
        model.lm_head.weight.data[3, 3] = math.nan
        return 0.0

    monkeypatch.setattr("plopfast.run.stages.merge_checked", spoiled)
    command = ["merge", "--model", model_folder, "--adapter", adapter, "--out", tmp_path / "run"]
    assert plopfast(*command) == 2
    assert "merged: not written: NaN or infinity in 1 of its weights (lm_head.weight)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "merged").exists()


def test_a_merged_weight_that_overflows_is_noticed(llama):
    """The adapted model is finite, as nothing ever reaches the column whose update is infinite in float16."""
    name = "model.layers.0.self_attn.q_proj"
    llama.half()
    llama.model.layers[0].input_layernorm.weight.data[0] = 0
    pf.inject(llama, placement(name))
    module = adapters(llama)[name]
    with torch.no_grad():
        module.lora_A.zero_(), module.lora_B.fill_(1e3)
        module.lora_A[:, 0] = 1e3
    assert logits(llama).isfinite().all()
    with pytest.raises(AdapterError):
        merge_checked(llama)


def test_an_interruption_just_after_a_module_is_merged(llama, monkeypatch):
    """The module is merged: its weight stays so."""
    pf.inject(llama, placement(UP.format(0), UP.format(1)))
    randomise(llama)
    before, put = logits(llama), injection.replace_module

    def interrupted(*args):
        put(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(injection, "replace_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pf.merge(llama)
    assert len(adapters(llama)) == 1
    torch.testing.assert_close(logits(llama), before, rtol=1e-4, atol=1e-4)
