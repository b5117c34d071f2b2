"""Injecting, switching off, merging and taking out adapters, on every architecture."""

import copy
import hashlib

import pytest
import torch
from helpers import build, everywhere, logits, randomise

import plopfast as pf
from plopfast.lora.layer import adapters, disabled
from plopfast.support.errors import AdapterError, ConfigError, PlacementError


def test_inject_merge_unload(any_model):
    base, keys = logits(any_model), set(any_model.state_dict())
    names = pf.inject(any_model, everywhere(any_model))
    assert names == list(adapters(any_model)) and len(names) == len(everywhere(any_model).modules)
    torch.testing.assert_close(logits(any_model), base)  # B = 0
    trainable = {n for n, p in any_model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{part}" for n in names for part in "AB"}
    randomise(any_model)
    tuned = logits(any_model)
    assert not torch.allclose(tuned, base, atol=1e-3)
    with disabled(any_model):
        torch.testing.assert_close(logits(any_model), base)
    torch.testing.assert_close(logits(any_model), tuned)
    merged = copy.deepcopy(any_model)
    weights = {name: module.merged_weight() for name, module in adapters(merged).items()}
    assert pf.merge(merged) == names and set(merged.state_dict()) == keys
    assert all(torch.equal(merged.get_submodule(name).weight, weight) for name, weight in weights.items())
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-4, atol=1e-4)
    assert pf.unload(any_model) == names and set(any_model.state_dict()) == keys
    assert torch.equal(logits(any_model), base)


def test_initialisation_is_pefts_and_depends_on_seed_and_name_alone(llama):
    placement = everywhere(llama)
    state = torch.get_rng_state()
    pf.inject(llama, placement, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    first = {n: m.lora_A.detach().clone() for n, m in adapters(llama).items()}
    for name, a in first.items():
        bound = adapters(llama)[name].frozen.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
        assert a.abs().max() <= bound and a.abs().max() > 0.8 * bound
    assert len({a.sum().item() for a in first.values()}) == len(first)
    pf.unload(llama)
    torch.manual_seed(99)
    reverse = pf.Placement(dict(reversed(placement.modules.items())), [], "all", 0)
    pf.inject(llama, reverse, seed=1)
    assert all(torch.equal(m.lora_A, first[n]) for n, m in adapters(llama).items())
    pf.unload(llama)
    pf.inject(llama, placement, seed=2)
    assert not torch.equal(next(iter(adapters(llama).values())).lora_A, next(iter(first.values())))


def test_bfloat16_base_keeps_float32_adapters(llama):
    llama.bfloat16()
    pf.inject(llama, everywhere(llama))
    module = next(iter(adapters(llama).values()))
    assert module.lora_A.dtype == torch.float32 and module.weight.dtype == torch.bfloat16
    randomise(llama)
    llama(torch.randint(3, 300, (2, 5))).logits.square().sum().backward()
    assert module.lora_B.grad.dtype == torch.float32 and module.lora_B.grad.abs().sum() > 0


def test_initialisations(llama):
    """Each by its definition, ranks that differ, and the same draws whatever else is injected."""
    infos = pf.linear_modules(llama)
    ranks = {info.name: (8 if info.layer else 5, 8.0) for info in infos}
    for init in ("kaiming", "gaussian", "orthogonal"):
        pf.inject(llama, pf.Placement(ranks, [], "", 0), seed=3, init=init)
        drawn = {name: module.lora_A.detach().clone() for name, module in adapters(llama).items()}
        assert all(not module.lora_B.any() for module in adapters(llama).values())
        pf.unload(llama)
        for name, a in drawn.items():
            assert a.shape == (ranks[name][0], llama.get_submodule(name).in_features) and a.dtype == torch.float32
            if init == "orthogonal":
                torch.testing.assert_close(a @ a.T, torch.eye(len(a)))
        eights = torch.cat([a.flatten() for a in drawn.values() if len(a) == 8])
        if init == "gaussian":
            assert eights.std() == pytest.approx(1 / 8, rel=0.05) and eights.abs().max() > 3 / 8
        name = infos[-1].name
        pf.inject(llama, pf.Placement({name: ranks[name]}, [], "", 0), seed=3, init=init)
        assert torch.equal(adapters(llama)[name].lora_A, drawn[name])
        pf.unload(llama)
    with pytest.raises(ConfigError, match="init: expected one of kaiming, gaussian, orthogonal, eva, got 'pissa'"):
        pf.inject(llama, everywhere(llama), init="pissa")


def test_the_default_draws_stay_as_they_were(llama):
    name = "model.layers.0.mlp.up_proj"
    pf.inject(llama, pf.Placement({name: (4, 8.0)}, [], "", 0), seed=7)
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"7 {name}".encode()).digest()[:7], "big"))
    want = torch.nn.init.kaiming_uniform_(torch.empty(4, 32), a=5**0.5)
    assert torch.equal(adapters(llama)[name].lora_A, want)


def test_rslora_scaling_and_dropout_only_in_training():
    base = torch.nn.Linear(16, 16)
    assert pf.LoRALinear(base, 4, 8).scaling == 2.0
    assert pf.LoRALinear(base, 4, 8, rslora=True).scaling == 4.0
    module = pf.LoRALinear(base, 4, 8, dropout=0.5)
    torch.nn.init.normal_(module.lora_B)
    x = torch.randn(6, 16)
    assert not torch.equal(module(x), module(x)), "a seed of its own for each call"
    torch.manual_seed(0)
    first = module(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), first)
    module.eval()
    assert torch.equal(module(x), module(x))


def test_errors(llama):
    with pytest.raises(PlacementError, match="rank 33 does not fit a 32 x 32 weight: choose 1 to 32"):
        pf.inject(llama, pf.Placement({"model.layers.0.self_attn.q_proj": (33, 1.0)}, [], "", 0))
    with pytest.raises(PlacementError, match="not a linear module of this LlamaForCausalLM"):
        pf.inject(llama, pf.Placement({"model.norm": (1, 1.0)}, [], "", 0))
    assert not adapters(llama), "a failed injection changes nothing"
    assert all(p.requires_grad for p in llama.parameters())
    pf.inject(llama, everywhere(llama))
    with pytest.raises(AdapterError, match="already"):
        pf.inject(llama, everywhere(llama))


def test_no_gradient_reaches_the_base(any_model):
    pf.inject(any_model, everywhere(any_model))
    randomise(any_model)
    any_model(torch.randint(3, 300, (2, 5))).logits.square().sum().backward()
    for name, parameter in any_model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        if "lora_" in name:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_gpt2_weights_stay_as_they_are_stored():
    model = build("gpt2")
    shapes = {n: p.shape for n, p in model.named_parameters()}
    pf.inject(model, everywhere(model))
    randomise(model)
    pf.merge(model)
    assert {n: p.shape for n, p in model.named_parameters()} == shapes


def test_eva_takes_the_first_vectors_and_leaves_them_alone(llama):
    name = "model.layers.0.mlp.up_proj"
    vectors = {name: torch.randn(6, 32)}
    held = vectors[name].clone()
    pf.inject(llama, pf.Placement({name: (4, 8.0)}, [], "", 0), init="eva", eva=vectors)
    module = adapters(llama)[name]
    assert torch.equal(module.lora_A, held[:4])
    with torch.no_grad():
        module.lora_A.add_(1)
    assert torch.equal(vectors[name], held)
