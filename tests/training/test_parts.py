"""Parts of a training step, each against its definition: packed rows, chunks of a trained head, an adapted head, noise."""

import math

import pytest
import torch
from helpers import build, randomise
from plain_training import losses_of, rows_of
from torch import nn

import plopfast as pf
from plopfast.data.batches import collate, collate_packed
from plopfast.models import cross_entropy
from plopfast.training.loss import Objective
from plopfast.training.neftune import neftune

CPU = torch.device("cpu")


def test_packed_rows_have_the_loss_that_each_has_alone():
    model, rows = build("llama"), rows_of(5)
    objective = Objective(model)
    with torch.no_grad():
        alone = sum(float(objective(collate([row], CPU))) for row in rows)
        assert float(objective(collate_packed(rows, CPU))) == pytest.approx(alone, rel=1e-5)
        assert float(losses_of(model, rows)[0]) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_a_trained_head_gets_the_gradient_of_every_chunk(tokens, bias, monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", tokens * 300)
    model, rows = build("llama").requires_grad_(True), rows_of(5)
    model.lm_head = nn.Linear(32, 300, bias=bias)
    objective = Objective(model)
    assert objective.chunked
    found = []
    for total in (objective(collate(rows, CPU)), losses_of(model, rows)[0]):
        model.zero_grad()
        (3 * total).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and ("lm_head.bias" in ours) == bias
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=name)


def test_an_adapted_head_counts():
    """B is zero when the objective is made, so that the model's logits do not tell yet."""
    model, rows = build("llama"), rows_of(5)
    pf.inject(model, pf.Placement({"lm_head": (3, 6.0)}, [], "explicit", 0))
    objective = Objective(model)
    randomise(model)
    ours, theirs = objective(collate(rows, CPU)), losses_of(model, rows)[0]
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    gradients = [torch.autograd.grad(total, model.lm_head.lora_B)[0] for total in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha, shape", [(5.0, (3, 7)), (1.0, (2, 40))])
def test_the_noise_fills_its_bounds_on_both_sides(alpha, shape):
    model, ids = build("llama").train(), torch.ones(shape, dtype=torch.long)
    embedding = model.get_input_embeddings()
    plain, bound = embedding(ids), alpha / math.sqrt(shape[1] * 32)
    with neftune(model, alpha):
        noise = embedding(ids) - plain
        model.eval()
        assert torch.equal(embedding(ids), plain)
    assert torch.equal(embedding.train()(ids), plain)
    assert noise.abs().max() <= bound * 1.001
    assert noise.max() > 0.98 * bound and noise.min() < -0.98 * bound and abs(noise.mean()) < 0.1 * bound
