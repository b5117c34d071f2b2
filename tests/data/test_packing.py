"""Packed batches: the same losses and gradients as one example at a time, and full rows."""

import pytest
import torch
from helpers import CONFIGS, build, prompted

import plopfast as pf
from plopfast.data.batches import collate, collate_packed, pack
from plopfast.lora.layer import adapters
from plopfast.models.running import check_packing
from plopfast.support.errors import DataError, ModelError

ROWS = [(1, 40, 41, 42, 43, 44, 45), (1, 60), (1, *range(100, 125)), (1, 7, 7, 7, 7)]
STARTS = [3, 0, 1, 2]


def nll(model, batch):
    """Summed label loss [rows], straight from the full logits."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none")


def alone(model):
    return torch.stack(
        [nll(model, collate(prompted([row], [max(s, 1)]))).sum() for row, s in zip(ROWS, STARTS, strict=True)]
    )


def packed(model):
    losses = nll(model, collate_packed(prompted(ROWS, STARTS)))[0]
    return torch.stack([part.sum() for part in torch.cat([losses, losses.new_zeros(1)]).split([len(r) for r in ROWS])])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
@pytest.mark.parametrize("training", [False, True])
def test_each_example_has_the_loss_it_has_alone(architecture, attention, training):
    model = build(architecture)
    model.set_attn_implementation(attention)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train(training)
    with torch.no_grad():
        assert torch.allclose(packed(model), alone(model), rtol=1e-5)


def test_a_leak_would_show():
    """The same comparison fails by far where the borders are not in the positions."""
    model = build("llama")
    batch = collate_packed(prompted(ROWS, STARTS))
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    with torch.no_grad():
        leaking = nll(model, batch)[0, 9:33].sum()
        assert abs(leaking / alone(model)[2] - 1) > 1e-3


def test_gradients_of_the_adapters_are_equal(llama):
    names = [name for name, module in llama.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name]
    pf.inject(llama, pf.Placement(dict.fromkeys(names, (4, 8.0)), [], "all", 0))
    for module in adapters(llama).values():
        torch.nn.init.normal_(module.lora_B, std=0.1)
    gradients = []
    for losses in (alone, packed):
        llama.zero_grad()
        losses(llama).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in llama.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * len(names)
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0
        assert (gradients[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_collate_packed():
    batch = collate_packed(prompted([[5, 6, 7], [8], [9, 4]], [2, 0, 1]))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, -100, 4]]
    assert "attention_mask" not in batch


def test_check_packing_accepts_every_architecture(any_model):
    any_model.train()
    check_packing(any_model)
    assert any_model.training


def test_check_packing_refuses_models_that_leak(llama, monkeypatch):
    forward = type(llama).forward
    with monkeypatch.context() as patch:
        mixing = lambda self, input_ids, position_ids, use_cache: forward(self, input_ids, use_cache=use_cache)  # noqa: E731
        patch.setattr(type(llama), "forward", mixing)
        with pytest.raises(ModelError, match="LlamaForCausalLM mixes the sequences"):
            check_packing(llama)
    monkeypatch.setattr(type(llama), "forward", lambda self, input_ids, use_cache: None)
    with pytest.raises(ModelError, match=r"takes no position_ids .*train it without packing"):
        check_packing(llama)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_packs_cover_everything_once_within_the_budget(examples, seed):
    lengths = [len(e.tokens) for e in examples] * 40
    groups = pack(lengths, 256, seed)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= 256 for group in groups)
    assert sum(lengths) / (256 * len(groups)) > 0.97, "groups are full"
    assert pack(lengths, 256, seed) == groups
    assert seed is None or groups != pack(lengths, 256, seed + 1)


def test_packs_of_odd_sizes():
    assert pack([], 8) == []
    assert pack([8, 3, 5, 4, 4], 8) == [[0], [2, 1], [3, 4]]
    assert pack([1] * 10, 4, window=4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(DataError, match=r"2 of 4 rows do not fit a packed batch of 8 tokens \(the longest has 12\)"):
        pack([1, 9, 12, 8], 8)
