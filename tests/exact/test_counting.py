"""What counts in a score: shapes, zeros, several calls, modules that see nothing, and modes of the model."""

import math

import pytest
import torch
from helpers import build, random_batches

import plopfast as pf
from plopfast.models.linears import linear_modules
from plopfast.scoring.baselines import closed_form, denominators, monte_carlo
from plopfast.scoring.sums import NFNState
from plopfast.support.errors import ConfigError, ModelError


def test_inputs_that_cannot_be_matched_with_the_tokens_are_refused():
    """[rows, tokens, ...], [rows x tokens] and [rows, heads, tokens] are known; any other shape would mix up the padding."""
    rows, module = 2, torch.nn.Linear(3, 3)
    for shape, parts in {
        (2, 5): 1, (2, 5, 4): 4, (10,): 1, (2, 4, 5): 4, (2, 3): 0, (3, 5): 0, (2, 4, 3): 0, (1, 4, 5): 0, (2, 4, 6): 0,
        (2, 4, 5, 1): 0, (9,): 0, (11,): 0, (5, 2): 0, (2, 2, 2, 5): 0,
    }.items():  # fmt: skip
        state = NFNState(torch.ones(1))
        state.open(torch.tensor([[True, True, False, True, True], [True, False, False, False, False]]))
        x = torch.ones(*shape, 3)
        if not parts:
            with pytest.raises(ModelError):
                state.hook(0, "m", None)(module, (x,), 2 * x)
            continue
        state.hook(0, "m", None)(module, (x,), 2 * x)
        state.close()
        sums, squares, counts = state.table(rows)[:, 0].tolist()
        assert counts == [4 * parts, parts] and sums == [8 * parts, 2 * parts] and squares == [16 * parts, 4 * parts]


@pytest.mark.parametrize("options", [{}, {"compat": "official"}, {"confidence": 0.9, "k": 1}])
def test_a_module_that_sees_nothing_has_no_score(llama, options):
    batches = [{"input_ids": torch.tensor([[5, 6, 7]])}]
    pf.score(llama, batches, **options)
    llama.model.layers[1].mlp.add_module("spare_proj", torch.nn.Linear(32, 8))
    report = pf.score(llama, batches, **options)
    assert "model.layers.1.mlp.spare_proj" not in report.scores and "spare_proj" in report.notes[0]


def test_sums_of_zeros_of_several_calls_and_of_one_tensor_in_two_batches():
    """A zero input has no direction and does not count; calls add up; a tensor that changed is another input."""
    module, state = torch.nn.Linear(3, 3), NFNState(torch.tensor([1.0, 2.0]))
    x = torch.ones(1, 4, 3)
    x[0, 2] = 0
    for batch, factor in enumerate((1.0, 5.0)):
        x.mul_(factor)
        state.open(torch.tensor([[True, True, True, False]]), batch)
        calls = [(0, "m", None, x, output * torch.ones_like(x)) for output in (2, 3)]
        calls.insert(2 * batch, (1, "other", torch.ones(3), x.clone(), 4 * torch.ones_like(x)))  # x is last, then first
        for index, name, bias, seen, output in calls:
            state.hook(index, name, bias)(module, (seen,), output)
        state.close()
    sums, squares, counts = state.table(2).tolist()
    assert (
        counts == [[4, 4], [2, 2]] and sums[0] == pytest.approx([10, 2]) and squares[0] == pytest.approx([26, 26 / 25])
    )
    assert sums[1] == pytest.approx([3, 0.6]), "over its own denominator, without the bias"


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_model_in_training_scores_as_at_inference(architecture):
    """gpt2 has dropout; the modes are as before, module by module."""
    model, batches = build(architecture), random_batches()
    expected = pf.score(model, batches, eva_rank=2).modules
    model.train()
    model.get_submodule("transformer.h.1" if architecture == "gpt2" else "model.layers.1").eval()
    modes = [module.training for module in model.modules()]
    assert pf.score(model, batches, eva_rank=2).modules == expected
    assert [module.training for module in model.modules()] == modes
    for confidence in (0, 1, -0.5, 1.5, math.nan):
        with pytest.raises(ConfigError):
            pf.score(model, batches, confidence=confidence)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("how", [closed_form, lambda infos: monte_carlo(infos, 8, 0)])
def test_weights_of_zeros_have_no_norm_to_divide_by(llama, how):
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        llama.get_submodule(name).weight.zero_()
    infos = linear_modules(llama)
    assert [info.name for info, value in zip(infos, how(infos).tolist(), strict=True) if not value] == [name]
    for baseline in ("closed-form", "monte-carlo"):
        with pytest.raises(ModelError, match=name):
            denominators(infos, baseline, 8, 0)
