"""Frozen weights: both layouts, views that follow the module, and clear refusals of what cannot be used."""

import copy

import pytest
import torch
from helpers import build
from torch import nn
from transformers.pytorch_utils import Conv1D

import plopfast as pf
from plopfast.models.fingerprints import fingerprint
from plopfast.models.frozen import find_frozen, frozen_of, is_linear
from plopfast.support.errors import ModelError


def linear(kind, dtype=torch.float32):
    """A module of 5 inputs and 3 outputs, and its weight as [3, 5]."""
    torch.manual_seed(0)
    module = (nn.Linear(5, 3) if kind == "linear" else Conv1D(3, 5)).to(dtype)
    return module, module.weight.detach() if kind == "linear" else module.weight.detach().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dense_weights(kind, dtype):
    module, w_NK = linear(kind, dtype)
    frozen = frozen_of(module)
    assert frozen.shape == (3, 5) and frozen.dtype == dtype and frozen.device.type == "cpu"
    assert frozen.transposed == (kind == "conv1d") and frozen.stored is module.weight
    assert torch.equal(frozen.weight_NK, w_NK) and torch.equal(frozen.dequantize(), w_NK)
    assert frozen.weight_NK.data_ptr() == frozen.dequantize().data_ptr() == module.weight.data_ptr(), "no copy"
    assert not frozen.dequantize().requires_grad
    norm = frozen.frobenius()
    assert norm.dtype == torch.promote_types(dtype, torch.float32) and not norm.requires_grad
    torch.testing.assert_close(norm.double(), w_NK.double().norm(), rtol=1e-6, atol=0)
    assert frozen.fingerprint() == module.weight.flatten()[:4].tolist()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_delta_is_added_in_float32_and_rounded_once(kind):
    module, w_NK = linear(kind, torch.bfloat16)
    before, stored = w_NK.clone(), module.weight
    delta_NK = torch.randn(3, 5)
    frozen_of(module).add_(delta_NK)
    assert module.weight is stored and torch.equal(frozen_of(module).weight_NK, (before.float() + delta_NK).bfloat16())


def test_it_follows_the_module(llama):
    """`model.to` and deepcopy put other tensors in the modules' place."""
    name = "model.layers.0.mlp.up_proj"
    pf.inject(llama, pf.Placement({name: (2, 4.0)}, [], "", 0))
    other = copy.deepcopy(llama).bfloat16()
    ours, theirs = llama.get_submodule(name), other.get_submodule(name)
    assert theirs.frozen.module is theirs.base and theirs.frozen.dtype == torch.bfloat16
    assert ours.frozen.module is ours.base and ours.frozen.dtype == torch.float32
    ours.base.weight = nn.Parameter(torch.zeros(48, 32))
    assert not ours.frozen.weight_NK.any()


def test_what_wraps_a_linear_module_has_its_weight():
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Linear(5, 3)
    module = pf.LoRALinear(base, 2, 4.0)
    assert frozen_of(module) is module.frozen and module.frozen.module is base and module.weight is base.weight
    peft = inject_adapter_in_model(LoraConfig(r=2, target_modules=["m"]), nn.ModuleDict({"m": base}))["m"]
    assert frozen_of(peft).module is base and not is_linear(peft) and not is_linear(module)


class Params4bit(nn.Parameter):
    """As bitsandbytes': packed 4-bit codes in uint8 [N K / 2, 1]."""


class Linear4bit(nn.Linear):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        self.weight = Params4bit(torch.zeros(n_in * n_out // 2, 1, dtype=torch.uint8), requires_grad=False)


class QuantLinear(nn.Module):
    """As GPTQ's: no `weight` at all."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(n_in // 8, n_out, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, n_out))


def with_weight(weight):
    module = nn.Linear(32, 48, bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


class Codes(torch.Tensor):
    """A tensor class of another library, which gives a floating dtype as its own."""


REFUSED = {
    "Linear4bit (weight Params4bit torch.uint8 [768, 1]": lambda: Linear4bit(32, 48),
    "QuantLinear (qweight Tensor torch.int32 [4, 48]": lambda: QuantLinear(32, 48),
    "Linear (weight Parameter torch.uint8": lambda: with_weight(torch.zeros(48, 32, dtype=torch.uint8)),
    "Linear (weight Parameter torch.int8": lambda: with_weight(torch.zeros(48, 32, dtype=torch.int8)),
    "Linear (weight Parameter torch.float8_e4m3fn": lambda: with_weight(torch.zeros(48, 32).to(torch.float8_e4m3fn)),
    "Linear (weight Codes torch.float32": lambda: with_weight(torch.zeros(48, 32).as_subclass(Codes)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_quantised_weights_are_named_wherever_they_come(llama, what, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    placement = pf.Placement({name: (4, 8.0)}, [], "", 0)
    pf.inject(llama, placement)
    adapter = pf.save_adapter(llama, tmp_path / "adapter")
    pf.unload(llama)
    module = llama.model.layers[1].mlp.up_proj = REFUSED[what]()
    assert find_frozen(module) is None and is_linear(module)
    for call in (
        lambda: pf.linear_modules(llama),
        lambda: pf.inject(llama, placement),
        lambda: pf.load_adapter(llama, adapter),
        lambda: fingerprint(llama, [name]),
    ):
        with pytest.raises(
            ModelError, match=f"^{name}: expected a floating-point weight .*load the model in bfloat16"
        ) as caught:
            call()
        assert what in str(caught.value)
    with pytest.raises(ModelError, match=type(module).__name__):
        pf.LoRALinear(module, 4, 8.0)


def test_other_modules_are_refused():
    assert find_frozen(nn.LayerNorm(4)) is None and not is_linear(nn.Conv1d(2, 2, 1))
    with pytest.raises(ModelError, match=r"norm: .* got LayerNorm \(weight Parameter torch.float32 \[4\]"):
        frozen_of(nn.LayerNorm(4), "norm")
    with pytest.raises(ModelError, match=r"got Identity \(no tensors\)"):
        frozen_of(nn.Identity())


def test_fingerprints_do_not_depend_on_the_order_of_names():
    model = build("gpt2")
    names = [info.name for info in pf.linear_modules(model)][:2]
    assert fingerprint(model, names) == fingerprint(model, names[::-1]) and len(fingerprint(model, names)) == 8
