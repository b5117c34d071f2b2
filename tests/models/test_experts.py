"""Modules of experts are found by what they compute, and every row reaches its own expert."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from zoo import families

from plopfast.models.experts import DOWN, expert_weights, mixture_of, mixtures, weight_at
from plopfast.models.fingerprints import fingerprint
from plopfast.models.routed import Route
from plopfast.support.errors import ModelError

# as transformers names them: plain, beside shared experts, transposed with biases, all rows to all, no gate
FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h"]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_known(family):
    model = families.build(family)
    infos = expert_weights(model)
    held = {name for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name}
    assert infos and {info.name for info in infos} == held
    for info in infos:
        weight = info.frozen
        assert weight.shape == (info.n_out, info.n_in) and weight.experts == info.experts == families.HEADS
        whole = weight.weight_ENK.double()
        torch.testing.assert_close(weight.frobenius().double(), whole.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
        assert weight_at(model, info.name).stored is weight.stored
        assert info.type == f"{info.name.split('.')[-2]}.{info.key}"


def test_a_norm_after_each_expert_counts():
    config = SimpleNamespace(
        num_local_experts=4, moe_hidden_size=8, moe_intermediate_size=6, hidden_act="silu", post_norm_eps=1e-5,
        _experts_implementation="eager",
    )  # fmt: skip
    module = MuseSparkExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    assert module.has_post_expert_norm and mixture_of(module) is not None


def test_of_the_wrong_class_it_is_not(monkeypatch):
    """Experts whose forward is another one are left alone: recognition is by what they compute."""

    class Other(type(families.build("mixtral").model.layers[0].mlp.experts)):
        def forward(self, *args):
            return 2 * super().forward(*args)

    module = families.build("mixtral").model.layers[0].mlp.experts
    assert mixture_of(module) is not None
    module.__class__ = Other
    assert mixture_of(module) is None
    for module in (nn.Linear(3, 4), nn.ModuleDict(), nn.Identity()):
        assert mixture_of(module) is None


def test_rows_are_sorted_by_expert():
    chosen = torch.tensor([[2, 0], [2, 3], [0, 2]])
    route = Route.of(chosen, 5)
    assert route.experts.tolist() == [0, 0, 2, 2, 2, 3] and route.ends.tolist() == [2, 2, 5, 6, 6]
    assert route.ends.dtype == torch.int32
    assert route.tokens.tolist() == [0, 2, 0, 1, 2, 1]
    assert torch.equal(chosen.flatten()[route.order], route.experts)
    every = Route.of_all(6, 3, torch.device("cpu"))
    assert every.experts.tolist() == [0, 0, 1, 1, 2, 2] and every.tokens.tolist() == [0, 1] * 3
    assert every.ends.tolist() == [2, 4, 6]


def test_what_has_no_weight_of_experts():
    model = families.build("mixtral")
    for name in ("model.layers.0.mlp.experts.up_proj", "model.layers.9.mlp.experts.down_proj", "nothing"):
        with pytest.raises(ModelError, match="no linear module or weight of experts"):
            weight_at(model, name)
    assert not mixtures(families.build("llama")) and not expert_weights(families.build("llama"))


def test_a_fingerprint_has_the_first_values():
    model = families.build("gpt_oss")
    name = f"model.layers.0.mlp.experts.{DOWN}"
    assert fingerprint(model, [name]) == model.get_parameter(name).flatten()[:4].tolist()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_without_values_what_it_says_of_itself_counts(family):
    """And it is not remembered: later modules of the class, with values, are compared."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(families.config_of(family))
    assert [info.name for info in expert_weights(empty)] == [
        info.name for info in expert_weights(families.build(family))
    ]
    module = next(iter(mixtures(empty).values())).module
    kind = type(module)
    other = type(kind.__name__, (kind,), {"forward": lambda self, x, *_: 2 * x})
    module.__class__ = other
    assert mixture_of(module) is not None
    real = families.build(family).model.layers[0].mlp.experts
    real.__class__ = other
    assert mixture_of(real) is None
