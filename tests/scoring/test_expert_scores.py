"""Scores of experts: each over its own tokens, padding and the first token left out, and a layer's as their mean by tokens."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from zoo import families, reference

import plopfast as pf
from plopfast.scoring.report import NFNReport
from plopfast.support.errors import ModelError

FAMILIES = ["mixtral", "gpt_oss", "llama4_text", "deepseek_v3"]
BATCHES = reference.batches_of(families.VOCABULARY)


def of_experts(report):
    return {name: score for name, score in report.scores.items() if score.experts > 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_exact(family):
    report = pf.score(families.build(family), BATCHES)
    model = families.build(family).double()
    model.set_experts_implementation("eager")
    weights = {name: model.get_parameter(name) for name in of_experts(report)}
    found = {(name, e): [] for name in weights for e in range(families.HEADS)}
    for batch in BATCHES:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            with torch.no_grad(), reference.Watched(weights) as seen:
                model(input_ids=ids[mask][None], use_cache=False)
            for name, x, weight, tokens in seen.calls:
                expert = (weight.data_ptr() - weights[name].data_ptr()) // (8 * weight.numel())
                x = x[(tokens > 0) & x.any(1)]  # without the first token
                ratio = (x @ weight).norm(dim=1) / x.norm(dim=1) * weight.shape[0] ** 0.5 / weight.norm()
                found[name, expert] += ratio.tolist()
    assert weights and report.experts.keys() == weights.keys()
    for (name, expert), ratios in found.items():
        each = report.experts[name]
        assert each.tokens[expert] == len(ratios)
        if ratios:
            assert each.nfn[expert] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
        else:
            assert each.nfn[expert] is None
    for name, score in of_experts(report).items():
        each = report.experts[name]
        total = sum(nfn * n for nfn, n in zip(each.nfn, each.tokens, strict=True) if n)
        assert score.tokens == sum(each.tokens) and score.nfn == pytest.approx(total / score.tokens, rel=1e-6)


def test_batches_and_padding_change_nothing():
    one = pf.score(families.build("mixtral"), BATCHES, batch_tokens=20)
    two = pf.score(families.build("mixtral"), BATCHES, batch_tokens=400)
    for name, score in one.scores.items():
        assert score.nfn == pytest.approx(two.scores[name].nfn, rel=1e-5) and score.tokens == two.scores[name].tokens
    assert one.experts.keys() == two.experts.keys()
    for name, each in one.experts.items():
        assert each.tokens == two.experts[name].tokens


def test_the_model_computes_as_before():
    model = families.build("mixtral")
    before = reference.real_logits(model, BATCHES[0])
    pf.score(model, BATCHES)
    assert torch.equal(reference.real_logits(model, BATCHES[0]), before)
    assert not any("forward" in vars(module) for module in model.modules())


def lonely(model):
    """A mixture whose router sends no token to expert 3 of the first layer."""
    gate = model.model.layers[0].mlp.gate
    gate.forward = lambda x: (None, *_first_two(x))
    return model


def _first_two(x):
    rows = x.reshape(-1, x.shape[-1]).shape[0]
    return torch.full((rows, 2), 0.5), torch.tensor([[0, 2]]).expand(rows, 2)


def test_experts_without_tokens_are_said():
    report = pf.score(lonely(families.build("mixtral")), BATCHES)
    each = report.experts["model.layers.0.mlp.experts.down_proj"]
    assert each.nfn[1] is None and each.nfn[3] is None and each.tokens[1] == 0 and each.nfn[0] is not None
    assert any("no token reached 2 of 16 experts (2 in layer 0)" in note for note in report.notes)
    full = pf.score(families.build("mixtral"), BATCHES)
    assert not any("no token reached" in note for note in full.notes)


def test_monte_carlo_is_near():
    exact = pf.score(families.build("mixtral"), BATCHES)
    drawn = pf.score(families.build("mixtral"), BATCHES, baseline="monte-carlo", mc_samples=4000)
    for name, score in of_experts(exact).items():
        assert drawn.scores[name].nfn == pytest.approx(score.nfn, rel=0.03) and drawn.scores[name].nfn != score.nfn


def test_they_are_kept_in_the_file(tmp_path):
    report = pf.score(families.build("mixtral"), BATCHES)
    report.save(tmp_path / "scores.json")
    again = NFNReport.load(tmp_path / "scores.json")
    assert again.experts == report.experts and again.scores == report.scores
    assert not pf.score(families.build("llama"), BATCHES).experts


def test_placements_and_budgets_count_every_expert():
    report = pf.score(families.build("mixtral"), BATCHES)
    placed = pf.place(report, rule="mlp", rank=2)
    assert placed.types == ["experts.down_proj", "experts.gate_up_proj"] or sorted(placed.types) == [
        "experts.down_proj",
        "experts.gate_up_proj",
    ]
    scores = of_experts(report)
    assert placed.parameters == sum(2 * 4 * (score.n_in + score.n_out) for score in scores.values())
    assert {"experts.down_proj", "q_proj"} <= set(pf.place(report, rule="all", rank=2).types)
    assert set(placed.experts.values()) == {4} and placed.experts.keys() == placed.modules.keys()
    everything = pf.place(report, rule="all", rank=2)
    theirs = get_peft_model(families.build("mixtral"), LoraConfig(**everything.peft_config()))
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == everything.parameters
    model = families.build("mixtral")
    pf.inject(model, placed)
    assert placed.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    shared = pf.place(report, rule="mlp", budget=placed.parameters)
    assert {rank for rank, _ in shared.modules.values()} == {2}


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_an_expert_that_is_damaged_is_named(value):
    model = copy.deepcopy(families.build("mixtral"))
    model.model.layers[1].mlp.experts.down_proj.data[2] = value
    with pytest.raises(
        ModelError, match=r"layers.1.mlp.experts.down_proj: expert 2: the weight (holds NaN|is all zeros)"
    ):
        pf.score(model, BATCHES)
