"""Modules that share an input share a product: each still gets its own scaling, rank, dropout and values."""

from types import SimpleNamespace

import pytest
import torch
from helpers import build, logits, random_batches, randomise

import plopfast as pf
from plopfast.lora import warmup
from plopfast.lora.layer import adapters
from plopfast.lora.ops import lora_linear
from plopfast.lora.shared import MAX_RANKS, Prepared, find_shared_inputs

Q, K, V, GATE, UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def model_with(dropout=0.0, rslora=False, **of):
    """A Llama of which some modules are adapted: name -> (rank, alpha), dots written as __."""
    model = build("llama")
    modules = {f"model.layers.{i}.{name.replace('__', '.')}": pair for i in range(3) for name, pair in of.items()}
    pf.inject(model, pf.Placement(modules, [], "explicit", 0), dropout=dropout, rslora=rslora)
    randomise(model)
    return model


def gradients_of(model, seed=0):
    torch.manual_seed(seed)
    batch = random_batches(count=1)[0]
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    out.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": out.detach(), **found}


def agree(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)


NO_ROOT, ROOT = False, True  # of the rank, in the scaling
MIXED = {  # name -> (rank, alpha), and what shares a product without and with rsLoRA, in each layer
    "scalings": (
        {"self_attn__q_proj": (2, 3.0), "self_attn__k_proj": (2, 12.0), "self_attn__v_proj": (2, 3.0)},
        {NO_ROOT: [], ROOT: []},
    ),
    "ranks of one scaling": (
        {"self_attn__q_proj": (2, 3.0), "self_attn__k_proj": (4, 6.0), "self_attn__v_proj": (6, 9.0)},
        {NO_ROOT: [[Q, K, V]], ROOT: []},
    ),
    "two inputs": (
        {"self_attn__q_proj": (2, 3.0), "self_attn__k_proj": (4, 3.0), "mlp__gate_proj": (3, 9.0), "mlp__up_proj": (5, 15.0)},
        {NO_ROOT: [[GATE, UP]], ROOT: []},
    ),
    "ranks of one scaling by the root": (
        {"self_attn__q_proj": (4, 3.0), "self_attn__k_proj": (1, 1.5), "mlp__gate_proj": (1, 2.0), "mlp__up_proj": (9, 6.0)},
        {NO_ROOT: [], ROOT: [[Q, K], [GATE, UP]]},
    ),
    "not all of those with one input": (
        {"self_attn__q_proj": (4, 5.0), "self_attn__v_proj": (4, 5.0), "mlp__down_proj": (1, 5.0)},
        {NO_ROOT: [[Q, V]], ROOT: [[Q, V]]},
    ),
    "the last two of three": (
        {"self_attn__q_proj": (2, 7.0), "self_attn__k_proj": (2, 1.0), "self_attn__v_proj": (2, 1.0)},
        {NO_ROOT: [[K, V]], ROOT: [[K, V]]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("of", MIXED)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_prepared_step_is_an_unprepared_one(of, dropout, rslora):
    modules, expected = MIXED[of]
    model = model_with(dropout, rslora, **modules).train()
    plain = gradients_of(model)
    groups = find_shared_inputs(model)
    with Prepared(model):
        agree(plain, gradients_of(model))
        agree(plain, gradients_of(model))  # what was kept of the first step is not used in the second
    assert groups == [[f"model.layers.{i}.{name}" for name in group] for i in range(3) for group in expected[rslora]]
    assert all(module.low is None for module in adapters(model).values())
    assert {name for name, module in adapters(model).items() if module.shared} == {n for group in groups for n in group}


def test_after_a_step_changed_adapters_are_used():
    """What a step kept is gone when it ends."""
    model = model_with(**MIXED["ranks of one scaling"][0])
    find_shared_inputs(model)
    for _ in range(2):
        with Prepared(model):
            gradients_of(model)
        with torch.no_grad():
            for module in adapters(model).values():
                module.lora_A.mul_(1.5), module.lora_B.add_(0.1)
    after = logits(model)
    for module in adapters(model).values():
        module.shared = None
    torch.testing.assert_close(logits(model), after)


def test_ctrl_c_while_a_step_is_prepared(monkeypatch):
    model = model_with(**MIXED["ranks of one scaling"][0])
    find_shared_inputs(model)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as changed, pytest.raises(KeyboardInterrupt):
        changed.setattr(torch, "_foreach_copy_", interrupted)
        Prepared(model).__enter__()
    modules = adapters(model).values()
    assert all(module.low is None for module in modules)
    assert all(module.shared.stacked_A is None for module in modules if module.shared)


def test_switched_off_in_a_step():
    model = model_with(**MIXED["ranks of one scaling"][0])
    find_shared_inputs(model)
    first = adapters(model)[f"model.layers.0.{K}"]
    first.enabled = False
    alone = gradients_of(model)
    with Prepared(model):
        agree(alone, gradients_of(model))


def test_an_input_changed_in_place():
    model = model_with(**MIXED["ranks of one scaling"][0])
    find_shared_inputs(model)
    one, two = (adapters(model)[f"model.layers.0.{name}"] for name in (K, V))
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with Prepared(model), torch.no_grad():
        one(x)
        x.mul_(2)
        got = two(x)
    torch.testing.assert_close(got, two(x))


def test_a_step_takes_no_outputs_of_a_pass_without_gradients():
    """Activation checkpointing runs a block twice: first without gradients, then with them."""
    model = model_with(**MIXED["ranks of one scaling"][0])
    find_shared_inputs(model)
    one, two = (adapters(model)[f"model.layers.0.{name}"] for name in (K, V))
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with Prepared(model):
        with torch.no_grad():
            one(x)
        assert two(x).requires_grad


@pytest.mark.parametrize("more, shared", [(0, True), (1, False)])
def test_the_most_ranks_of_a_group(more, shared):
    torch.manual_seed(0)
    import transformers
    from helpers import SMALL

    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**SMALL, **sizes})).eval()
    half = MAX_RANKS // 2
    modules = {f"model.layers.0.{Q}": (half, float(half)), f"model.layers.0.{K}": (half + more, float(half + more))}
    pf.inject(model, pf.Placement(modules, [], "explicit", 0))
    assert bool(find_shared_inputs(model)) == shared


def test_the_most_members_of_a_group(monkeypatch):
    from plopfast.lora import shared

    monkeypatch.setattr(shared, "MAX_MEMBERS", 2)
    groups = find_shared_inputs(model_with(**MIXED["ranks of one scaling"][0]))
    assert groups == [[f"model.layers.{i}.{name}" for name in (Q, K)] for i in range(3)]


@pytest.mark.parametrize("kernels", [Q, K, None])
def test_a_group_is_warmed_up_if_any_member_takes_kernels(kernels, monkeypatch):
    """The group takes the path of its widest member, which need not be the first."""
    model = model_with(**MIXED["ranks of one scaling"][0])
    find_shared_inputs(model)
    weights = {module.frozen.stored.data_ptr(): name for name, module in adapters(model).items()}
    chosen = lambda x, w, *_: SimpleNamespace(  # noqa: E731
        backend="triton" if kernels and weights[w.data_ptr()].endswith(kernels) else "torch"
    )
    steps = []
    monkeypatch.setattr(warmup.library, "plan_of", chosen)
    monkeypatch.setattr(warmup, "_step", lambda members, rows: steps.append((len(members), rows)))
    lines = warmup.warm_up(Prepared(model), 64)
    assert steps == ([(3, warmup.FEW), (3, 64)] if kernels else [])
    assert len(lines) == bool(kernels)


def test_copies_of_another_dtype_are_left_aside():
    torch.manual_seed(0)
    x, w, a, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    plain = lora_linear(x, w, a, b, scaling=0.5)
    rounded = lora_linear(x, w, a, b, scaling=0.5, low=(a.bfloat16(), b.bfloat16()))
    torch.testing.assert_close(rounded, plain, rtol=0, atol=0)
