"""Linear modules that no rule chooses: each kind is named with its reason, in transformers' own classes."""

import warnings

import pytest
import torch
from helpers import build
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    DeepseekV32Config,
    JambaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    ZambaConfig,
)  # fmt: skip

import plopfast as pf
from plopfast.models.exclusions import GATE, INDEXER, READ, SHARED, exclusions, left_out, read_by
from plopfast.support.errors import PlacementError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def tiny(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def ends(model, reason):
    return {name.rpartition(".")[2] for name, why in exclusions(model).items() if why == reason}


@pytest.mark.parametrize(
    ("config", "reason", "wanted"),
    [
        (Qwen2MoeConfig(**SIZES, **EXPERTS, num_experts=4, num_key_value_heads=2), GATE, {"shared_expert_gate"}),
        (MambaConfig(**SIZES), READ, {"dt_proj", "out_proj", "x_proj"}),
        (JambaConfig(**SIZES, num_key_value_heads=2), READ, {"dt_proj"}),
        (BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64), READ, set()),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "model_type") else "",
)  # fmt: skip
def test_in_classes_of_transformers(config, reason, wanted):
    model = tiny(config)
    assert ends(model, reason) == wanted
    chosen = {info.name for info in pf.linear_modules(model)}
    assert chosen and not chosen & exclusions(model).keys()
    assert {name.rpartition(".")[2] for name in chosen}.isdisjoint(wanted)
    for line in left_out(model):
        assert line.startswith("left out: ")
    assert any(reason in line and ", ".join(sorted(wanted)) in line for line in left_out(model)) == bool(wanted)


def test_an_indexer_gets_no_gradient():
    model = tiny(
        DeepseekV32Config(**SIZES, **EXPERTS, n_routed_experts=4, num_key_value_heads=4, first_k_dense_replace=1)
    )
    found = {name for name, why in exclusions(model).items() if why == INDEXER}
    assert found and all(".indexer." in name for name in found)
    assert not any("indexer" in info.name for info in pf.linear_modules(model))


def test_shared_blocks_are_left_out():
    config = ZambaConfig(**SIZES | {"num_hidden_layers": 4}, layers_block_type=["linear_attention", "hybrid"] * 2)
    model = AutoModelForCausalLM.from_config(config)
    shared = {name for name, why in exclusions(model).items() if why == SHARED}
    assert shared and all("shared_transf" in name for name in shared)
    pf.inject(model, pf.Placement({info.name: (2, 4.0) for info in pf.linear_modules(model)}, [], "all", 0))


def test_experts_are_named_with_their_share():
    model = tiny(MixtralConfig(**SIZES, num_local_experts=4, num_key_value_heads=4))
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    (line,) = left_out(model)
    assert line.startswith(
        f"left out: {experts / layers:.0%} of the layers' weights, the experts (down_proj, gate_up_proj)"
    )
    assert 0.5 < experts / layers < 1 and left_out(build("llama")) == []


def test_a_rule_that_finds_nothing_says_what_is_left_out():
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4, num_key_value_heads=4))
    for layer in model.model.layers:  # whose class is not known
        layer.mlp.experts.__class__ = type("Other", (type(layer.mlp.experts),), {"forward": lambda self, x, *_: 2 * x})
    report = pf.score(model, [{"input_ids": torch.arange(3, 11).view(2, 4)}])
    with pytest.raises(
        PlacementError, match=r"'mlp' knows none of the types .*\(left out: \d+% of the layers' weights, the exp"
    ):
        pf.place(report, "mlp")
    assert report.notes == left_out(model) and report.notes[0] in report.table()


def test_adapters_exclude_nothing():
    """A module inside an adapter shares its weight with nobody."""
    model = build("llama")
    names = [info.name for info in pf.linear_modules(model)]
    pf.inject(model, pf.Placement(dict.fromkeys(names, (2, 4.0)), [], "all", 0))
    assert exclusions(model) == {} and [info.name for info in pf.linear_modules(model)] == [
        f"{name}.base" for name in names
    ]


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.inner = (nn.Linear(4, 4) for _ in range(4))
        self.mlp = nn.ModuleDict()
        nn.init.zeros_(self.third.weight)

    def init_weights(self):
        self.third.weight.data.zero_()

    def forward(self, x):
        if isinstance(self.third.weight, nn.Parameter) and self.third.weight.dtype == x.dtype:
            x = self.third(x[:, : self.third.weight.shape[1]])
        part = self.inner.weight[:2]
        return x @ self.first.weight.T + self.mlp.gate.weight.sum() + part.sum()


class Inherits(Reads):
    def forward(self, x):
        return super().forward(nn.functional.linear(x, self.second.weight))


def test_what_a_class_reads_is_found_in_its_source():
    assert read_by(Reads) == {"first", "mlp.gate"}
    assert read_by(Inherits) == {"first", "mlp.gate", "second"}
    assert read_by(nn.Linear) == frozenset() and read_by(type("Made", (nn.Module,), {})) == frozenset()


def test_an_adapter_that_would_not_count_everywhere_is_warned_of():
    config = BambaConfig(**SIZES, num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_state=8)
    model = AutoModelForCausalLM.from_config(config)
    name = next(name for name, why in exclusions(model).items() if why == READ)
    with pytest.warns(UserWarning, match=rf"{name}: another module of this BambaForCausalLM reads the weight itself"):
        pf.inject(model, pf.Placement({name: (2, 4.0)}, [], "mine", 0))
    model = build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.inject(model, pf.Placement({pf.linear_modules(model)[0].name: (2, 4.0)}, [], "mine", 0))
