"""placement.lora_config: PEFT adapts the placement's modules, with its ranks and alphas, and no others."""

import sys

import pytest
import torch
from helpers import adapted_in, build
from peft import LoraConfig, get_peft_model
from zoo import families, reference

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.models.experts import weights_of
from plopfast.support.errors import ConfigError, PlacementError

BATCH = reference.batches_of(families.VOCABULARY)[0]


def placed(model, *ends, ranks=(2,)):
    infos = [info for info in weights_of(model) if info.name.endswith(ends)]
    modules = {info.name: (ranks[i % len(ranks)], 4.0 + i % len(ranks)) for i, info in enumerate(infos)}
    experts = {info.name: info.experts for info in infos if hasattr(info, "experts")}
    return pf.Placement(modules, [], "explicit", 0, experts=experts)


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_adapts_the_same_modules(architecture, with_model):
    model = build(architecture)
    placement = placed(
        model, *(("c_attn", "mlp.c_proj") if architecture == "gpt2" else ("v_proj", "down_proj")), ranks=(2, 3)
    )
    config = placement.lora_config(model if with_model else None, lora_dropout=0.25)
    assert isinstance(config, LoraConfig) and config.task_type == "CAUSAL_LM" and config.lora_dropout == 0.25
    assert adapted_in(get_peft_model(model, config)) == placement.modules


def test_targets_are_as_short_as_they_can_be():
    model = build("llama")
    assert placed(model, "v_proj", "down_proj").lora_config(model).target_modules == {"v_proj", "down_proj"}
    one = placed(model, "layers.1.mlp.up_proj")
    assert one.lora_config(model).target_modules == set(one.modules)
    assert placed(model, "v_proj").lora_config().target_modules == set(placed(model, "v_proj").modules)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text"])
def test_experts_and_shared_experts(family):
    """PEFT takes `gate_proj` of shared experts for the experts' own, and would drop it."""
    model = families.build(family)
    placement = placed(model, "v_proj", "down_proj", ranks=(2, 3))
    assert adapted_in(get_peft_model(families.build(family), placement.lora_config(model))) == placement.modules
    pf.inject(model, placement)
    theirs = get_peft_model(families.build(family), placement.lora_config(model=families.build(family)))
    names = {
        name.partition(".lora_A")[0] for name, p in theirs.named_parameters() if p.requires_grad and "lora_A" in name
    }
    assert len(names) == len(adapters(model))
    torch.testing.assert_close(
        reference.real_logits(theirs.get_base_model().eval(), BATCH),
        reference.real_logits(model, BATCH),
        rtol=1e-5,
        atol=1e-5,
    )


def test_what_the_placement_says_cannot_be_overridden(monkeypatch):
    placement = placed(build("llama"), "v_proj")
    with pytest.raises(ConfigError, match="r and rank_pattern come from the placement"):
        placement.lora_config(r=4, rank_pattern={})
    with pytest.raises(PlacementError, match="which this GPT2LMHeadModel does not have"):
        placement.lora_config(build("gpt2"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install peft"):
        placement.lora_config()
