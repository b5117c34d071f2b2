"""Adapters of many ranks, alphas and scalings in one model: each does what it would do alone, shared inputs or not.

The account is the merged model: its logits, and the gradients of A and B from those of its whole weights:

    W' = W + scaling B A,   dB = scaling dW' A^T,   dA = scaling B^T dW'
"""

import contextlib
import copy
import math
import random

import pytest
import torch
from helpers import CONFIGS, build
from torch import nn

import plopfast as pf
from plopfast.data.batches import collate
from plopfast.data.example import Example
from plopfast.kernels import philox
from plopfast.lora import shared
from plopfast.lora.layer import adapters, disabled, replace_module
from plopfast.lora.merging import merge
from plopfast.lora.shared import Prepared, find_shared_inputs
from plopfast.models.linears import linear_modules
from plopfast.training.blocks import prepared_blocks
from plopfast.training.loss import Objective


def mixed_placement(rng, model, rslora):
    """Some of the modules, most of them, each with a rank and an alpha of its own; many scalings are equal."""
    modules = {}
    for info in linear_modules(model):
        if rng.random() < 0.8:
            rank = rng.choice((1, 2, 4, 4, min(info.n_in, info.n_out)))
            scaling = rng.choice((1.0, 1.0, 1.0, 1.0, 0.5, 1.37))
            modules[info.name] = (rank, scaling * (math.sqrt(rank) if rslora else rank))
    return pf.Placement(modules, [], "mixed", 0)


def batch_of(rng):
    rows = [tuple(rng.randint(3, 299) for _ in range(rng.randint(4, 12))) for _ in range(3)]
    return collate([Example(row, ((2, len(row)),), None, None, "x") for row in rows])


def account(base, model, batch, rslora):
    """(loss, module -> (dA, dB)) of the merged model, in float64."""
    merged = copy.deepcopy(base).double()
    scaling = {}
    infos = {info.name: info for info in linear_modules(merged)}
    for name, module in adapters(model).items():
        rank, alpha = module.lora_A.shape[0], module.alpha
        scaling[name] = alpha / (math.sqrt(rank) if rslora else rank)
        delta = scaling[name] * module.lora_B.detach().double() @ module.lora_A.detach().double()
        infos[name].module.weight.data += delta.T if infos[name].transposed else delta
    merged.requires_grad_(True)
    logits = merged(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum")
    loss.backward()
    gradients = {}
    for name, module in adapters(model).items():
        weight = infos[name].module.weight.grad
        dw = weight.T if infos[name].transposed else weight
        a, b = module.lora_A.detach().double(), module.lora_B.detach().double()
        gradients[name] = (scaling[name] * b.T @ dw, scaling[name] * dw @ a.T)
    return float(loss.detach()), gradients


def near(one, other, what):
    assert float((one.double() - other).norm()) <= 2e-4 * float(other.norm()) + 1e-7, what


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_every_adapter_acts_by_its_own_rank_and_alpha(architecture, rslora, monkeypatch):
    rng, groups = random.Random(f"{architecture}{rslora}"), 0
    base = build(architecture)
    for number in range(2):
        model = copy.deepcopy(base)
        placement = mixed_placement(rng, model, rslora)
        names = pf.inject(model, placement, seed=number, rslora=rslora)
        assert set(names) == set(placement.modules)
        generator = torch.Generator().manual_seed(number)
        for module in adapters(model).values():
            module.lora_B.data.normal_(std=0.2, generator=generator)
        monkeypatch.setattr(shared, "MAX_RANKS", (12, 256)[number])
        found = find_shared_inputs(model)
        groups += len(found)
        for members in found:
            assert len({adapters(model)[name].scaling for name in members}) == 1
            assert sum(placement.modules[name][0] for name in members) <= shared.MAX_RANKS
        objective, batches = Objective(model), [batch_of(rng) for _ in range(2)]
        accounts = [account(base, model, batch, rslora) for batch in batches]
        for with_blocks in (False, True):
            for grouped in (False, True, True):
                for batch, (loss, gradients) in zip(batches, accounts, strict=True):
                    model.zero_grad()
                    blocks = prepared_blocks(model, pf.TrainConfig()) if with_blocks else contextlib.nullcontext()
                    with blocks, Prepared(model) if grouped else contextlib.nullcontext():
                        found_loss = objective(batch)
                        found_loss.backward()
                    assert float(found_loss.detach()) == pytest.approx(loss, rel=1e-5)
                    for name, module in adapters(model).items():
                        near(module.lora_A.grad, gradients[name][0], (name, "A"))
                        near(module.lora_B.grad, gradients[name][1], (name, "B"))
        with torch.no_grad():
            plain = base(input_ids=batches[0]["input_ids"]).logits
            with disabled(model), Prepared(model):
                near(model(input_ids=batches[0]["input_ids"]).logits, plain.double(), "disabled")
            adapted = model(input_ids=batches[0]["input_ids"]).logits
            merge(model)
            near(model(input_ids=batches[0]["input_ids"]).logits, adapted.double(), "merged")
    assert groups or architecture in ("gpt2", "phi3"), "some of the placements share inputs"


def test_one_adapter_changes_only_its_own_part(llama):
    """A module that is disabled alone, in a group, is as without its adapter; the others go on."""
    names = [f"model.layers.1.self_attn.{n}_proj" for n in "qkv"]
    pf.inject(llama, pf.Placement(dict.fromkeys(names, (3, 6.0)), [], "x", 0))
    for module in adapters(llama).values():
        module.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    assert find_shared_inputs(llama) == [names]
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    for off in names:
        adapters(llama)[off].enabled = False
        alone = copy.deepcopy(llama)
        with torch.no_grad():
            adapters(alone)[off].lora_B.zero_()
            adapters(alone)[off].enabled = True
            expected = alone(input_ids=ids).logits
            with Prepared(llama):
                near(llama(input_ids=ids).logits, expected.double(), off)
        adapters(llama)[off].enabled = True


class PlainLoRA(nn.Module):
    """y = W x + b + scaling B A (mask x) / (1 - p) in plain autograd; its seeds are drawn as LoRALinear draws them."""

    def __init__(self, module):
        super().__init__()
        self.base, self.scaling, self.p = module.base, module.scaling, module.dropout
        self.lora_A, self.lora_B = nn.Parameter(module.lora_A.data.double()), nn.Parameter(module.lora_B.data.double())

    def forward(self, x):
        seed = int(torch.randint(1 << 62, ()))
        rows = x.reshape(-1, x.shape[-1])
        kept = (
            rows * philox.keep_mask(seed, *rows.shape, self.p) * philox.inverse_keep(self.p) if self.training else rows
        )
        low = (kept @ self.lora_A.T @ self.lora_B.T).view(*x.shape[:-1], -1)
        return self.base(x) + self.scaling * low


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("grouped", [False, True])
def test_each_adapter_drops_elements_of_its_own(p, grouped):
    """Those of one input (q, k, v) too, which share no product then."""
    model = build("llama")
    pf.inject(model, mixed_placement(random.Random(p), model, False), dropout=p)
    for module in adapters(model).values():
        module.lora_B.data.normal_(std=0.2, generator=torch.Generator().manual_seed(7))
    find_shared_inputs(model)
    plain = copy.deepcopy(model).double()
    for name, module in adapters(plain).items():
        replace_module(plain, name, PlainLoRA(module))
    batch = batch_of(random.Random(4))
    found = []
    for objective in [Objective(one.train()) for one in (model, plain)]:  # which run the models once
        torch.manual_seed(11)
        with Prepared(model) if grouped else contextlib.nullcontext():
            loss = objective(batch)
            loss.backward()
        found.append(float(loss.detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    for name, module in adapters(model).items():
        other = plain.get_submodule(name)
        near(module.lora_A.grad, other.lora_A.grad, (name, "A"))
        near(module.lora_B.grad, other.lora_B.grad, (name, "B"))
