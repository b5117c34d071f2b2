"""Rules, margins, parameter counts, matching, round trips and errors."""

import dataclasses
import json
import re

import pytest
import torch
from helpers import build, random_batches
from peft import LoraConfig, PeftModel, get_peft_model

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.scoring.report import ModuleScore
from plopfast.support.errors import FileError, PlacementError

NFN = {"q_proj": 1.4, "k_proj": 1.5, "v_proj": 0.6, "o_proj": 1.2, "gate_proj": 1.3, "up_proj": 0.9, "down_proj": 1.0}
SHAPES = {
    "q_proj": (8, 8),
    "k_proj": (8, 4),
    "v_proj": (8, 4),
    "o_proj": (8, 8),
    "gate_proj": (8, 12),
    "up_proj": (8, 12),
    "down_proj": (12, 8),
}


@pytest.fixture
def report():
    scores = {
        f"model.layers.{layer}.{type_}": ModuleScore(value + 0.01 * layer, 0.1, 10, type_, layer, *SHAPES[type_])
        for layer in range(2)
        for type_, value in NFN.items()
    }
    scores["lm_head"] = ModuleScore(0.1, 0.1, 10, "lm_head", None, 8, 300)
    return pf.NFNReport(scores, 10, 1, 0.1, "some/model")


def test_plop_takes_the_lowest_types(report):
    placement = pf.place(report, k=3, rank=2, alpha=4)
    assert placement.types == ["v_proj", "up_proj", "down_proj"]
    assert placement.margin == pytest.approx(0.2)
    assert set(placement.modules) == {n for n, s in report.scores.items() if s.type in placement.types}
    assert set(placement.modules.values()) == {(2, 4)}
    assert placement.parameters == 2 * 2 * ((8 + 4) + (8 + 12) + (12 + 8))
    text = str(placement)
    assert "208" in text and "v_proj, up_proj, down_proj" in text and "0.200" in text


@pytest.mark.parametrize(
    ("rule", "types"),
    [
        ("plop-inverse", {"k_proj", "q_proj", "gate_proj"}),
        ("attn", {"q_proj", "k_proj", "v_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("all", set(NFN)),
        (["o_proj", "model.layers.1.q_proj"], {"o_proj", "q_proj"}),
    ],
    ids=["inverse", "attn", "mlp", "all", "names"],
)
def test_other_rules(report, rule, types):
    placement = pf.place(report, rule, rank=1)
    assert set(placement.types) == types
    assert "lm_head" not in placement.modules
    if isinstance(rule, list):
        assert set(placement.modules) == {"model.layers.0.o_proj", "model.layers.1.o_proj", "model.layers.1.q_proj"}
    else:
        assert len(placement.modules) == 2 * len(types)


def test_random_is_seeded(report):
    picks = {tuple(pf.place(report, "random", k=2, rank=1, seed=seed).types) for seed in range(20)}
    assert len(picks) > 3
    assert pf.place(report, "random", k=2, rank=1, seed=5) == pf.place(report, "random", k=2, rank=1, seed=5)


@pytest.mark.parametrize(
    ("architecture", "attn", "mlp"),
    [("phi3", {"qkv_proj"}, {"gate_up_proj", "down_proj"}), ("gpt2", {"c_attn"}, {"c_fc", "mlp.c_proj"})],
)
def test_rules_on_fused_projections(architecture, attn, mlp):
    report = pf.score(build(architecture), random_batches())
    assert set(pf.place(report, "attn", rank=1).types) == attn
    assert set(pf.place(report, "mlp", rank=1).types) == mlp


def parameters(report, placement):
    return sum(r * (report.scores[n].n_in + report.scores[n].n_out) for n, (r, _) in placement.modules.items())


@pytest.mark.parametrize("ranks", ["equal", "proportional"])
@pytest.mark.parametrize("budget", [120, 121, 187, 300, 464, 500, 639, 640])
def test_a_budget_is_never_exceeded_and_spent_to_less_than_a_rank(report, ranks, budget):
    placement = pf.place(report, "mlp", budget=budget, ranks=ranks, alpha=8)
    assert placement.parameters == parameters(report, placement) <= budget
    given = {name: rank for name, (rank, _) in placement.modules.items()}
    assert all(1 <= rank <= 8 for rank in given.values()) and {a for _, a in placement.modules.values()} == {8}
    room = [20 for rank in given.values() if rank < 8]  # 8 + 12 parameters each
    assert budget - placement.parameters < min(room, default=budget + 1)
    if ranks == "equal":
        assert max(given.values()) - min(given.values()) <= 1
    assert f"budget {budget} parameters, {budget - placement.parameters} of them left" in str(placement)


def test_equal_ranks_give_what_is_over_to_the_lowest_scores(report):
    placement = pf.place(report, "mlp", budget=2 * 120 + 45)
    more = [name for name, (rank, _) in placement.modules.items() if rank == 3]
    assert set(more) == {"model.layers.0.up_proj", "model.layers.1.up_proj"}, "the lowest two"


def test_proportional_ranks_follow_the_scores(report):
    for layer, nfn in ((0, 0.4), (1, 1.2)):
        object.__setattr__(report.scores[f"model.layers.{layer}.o_proj"], "nfn", nfn)
    placement = pf.place(report, ["o_proj"], budget=16 * 8, ranks="proportional")
    assert {name: rank for name, (rank, _) in placement.modules.items()} == {
        "model.layers.0.o_proj": 6,
        "model.layers.1.o_proj": 2,
    }
    full = pf.place(report, ["o_proj"], budget=16 * 12, ranks="proportional")
    assert [rank for rank, _ in full.modules.values()] == [8, 4], "a full module leaves the rest to the others"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("300", 300),
        ("0.3k", 300),
        ("1200B", 300),
        ("1.2kB", 300),
        ("1KiB", 256),
        ("0.3K", 300),
        (" 1.2 kB ", 300),
        (300.0, 300),
        ("match:attn:r2", 2 * 2 * 40),
        (300, 300),
    ],
)
def test_ways_to_name_a_budget(report, text, number):
    placement = pf.place(report, "mlp", budget=text)
    assert placement == pf.place(report, "mlp", budget=number)


def test_decimal_budgets_are_exact():
    scores = {f"model.layers.{i}.up_proj": ModuleScore(1.0, 0.1, 10, "up_proj", i, 50_000, 50_000) for i in range(11)}
    report = pf.NFNReport(scores, 10, 1, 0.1, "some/model")
    assert pf.place(report, "all", budget="67.1M").parameters == 67_100_000 > int(67.1 * 10**6), "671 ranks of 100,000"


def test_a_score_of_zero_takes_ranks_first(report):
    name = "model.layers.0.v_proj"
    report.scores[name] = dataclasses.replace(report.scores[name], nfn=0.0)
    placement = pf.place(report, k=3, rank=1, budget=200, ranks="proportional")
    assert placement.modules[name] == (4, 32), "full"


def test_matching_keeps_alpha_and_says_what_moves(report):
    all_ = pf.place(report, "all", rank=2, alpha=7)
    for rule in ("plop", "mlp"):
        matched = pf.place(report, rule, budget=all_.parameters, alpha=7)
        assert 0 <= all_.parameters - matched.parameters < 20
        assert re.search(r"ranks \d to \d instead of 16: keep alpha 7 and the learning rate", str(matched))
    same = pf.place(report, "all", rank=2, budget="match:all:r2")
    assert set(same.modules.values()) == {(2, 32)} and "instead of" not in str(same)
    with pytest.raises(PlacementError, match="above the 448 that full ranks of these 6 modules take"):
        pf.place(report, "attn", budget=449)


def test_single_modules_under_a_budget(report):
    order = sorted((n for n, s in report.scores.items() if s.layer is not None), key=lambda n: report.scores[n].nfn)
    placement = pf.place(report, rank=2, budget=100, granularity="module")
    assert sorted(placement.modules) == sorted(order[:3]), "12 + 12 + 20 parameters a rank; a fourth would take 128"
    assert placement.parameters == 100 == parameters(report, placement) and "experimental" in str(placement)
    capped = pf.place(report, rank=2, budget=100, granularity="module", cap=1)
    assert sorted(capped.types) == ["up_proj", "v_proj"] and len(capped.modules) == 2
    highest = pf.place(report, "plop-inverse", rank=2, budget=40, granularity="module")
    assert list(highest.modules) == ["model.layers.1.k_proj"] and highest.modules["model.layers.1.k_proj"] == (3, 32)


def test_peft_builds_the_same_adapters(tmp_path):
    for architecture in ("llama", "gpt2"):
        report = pf.score(build(architecture), random_batches())
        for shape in ({"budget": 3001}, {"budget": 1501, "granularity": "module", "rank": 3}):
            placement = pf.place(report, k=2, alpha=6, ranks="proportional", **shape)
            theirs = get_peft_model(build(architecture), LoraConfig(**placement.peft_config()))
            found = {
                name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
                for name, module in theirs.named_modules()
                if hasattr(module, "lora_A")
            }
            assert found == {name: (rank, alpha / rank) for name, (rank, alpha) in placement.modules.items()}
            assert "granularity" in shape or len({rank for rank, _ in placement.modules.values()}) > 1


def test_trained_mixed_ranks_load_in_peft(tmp_path, examples):
    model = build("llama")
    report = pf.score(model, random_batches())
    for number, (name, score) in enumerate(report.scores.items()):
        report.scores[name] = dataclasses.replace(score, nfn=0.5 + number % 4)
    placement = pf.place(report, "all", budget=9001, ranks="proportional", alpha=6)
    pf.inject(model, placement)
    trainer = pf.Trainer(model, pf.TrainConfig(max_steps=3, lr=0.05), examples[:16])
    trainer.fit()
    names = [names for names in trainer.shared if len({adapters(model)[name].scaling for name in names}) > 1]
    assert len({rank for rank, _ in placement.modules.values()}) > 2 and not names, "one shrink has one scaling"
    pf.save_adapter(model, tmp_path / "adapter")
    theirs, ids = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter").eval(), torch.arange(3, 12)[None]
    assert (model(ids).logits - build("llama")(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {key: config[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")} == {
        key: placement.peft_config()[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    }


def test_a_plop_placement_says_how_sure_it_is():
    report = pf.score(build("llama"), random_batches(8), confidence=0.9, k=1)
    assert report.decide(2, 0.9).note in pf.place(report, k=2, rank=2).notes


def test_a_rank_above_a_weights_smaller_side(report):
    """Such modules get full rank, as a gate with a single output has no higher one; a note says which."""
    placement = pf.place(report, "all", rank=5, alpha=7.0)
    full = {name: min(score.n_in, score.n_out) for name, score in report.scores.items() if score.layer is not None}
    assert placement.modules == {name: (min(5, side), 7.0) for name, side in full.items()}
    small = [name for name, side in full.items() if side < 5]
    assert small and len(small) < len(full)
    type_ = report.scores[small[0]].type
    count = sum(report.scores[name].type == type_ for name in small)
    assert f"{type_}: rank 4 instead of 5 in {count} modules, the smaller side of their weights" in placement.notes
    assert not pf.place(report, "all", rank=4).notes


def test_round_trip(report, tmp_path):
    placement = pf.place(report, k=7, rank=2)
    assert placement.margin is None
    placement.save(tmp_path / "p.json")
    assert pf.Placement.load(tmp_path / "p.json") == placement


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "plopp"}, "did you mean 'plop'"),
        ({"rule": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"rule": ["model.layers.7.q_proj"]}, r"did you mean 'model.layers.\d.q_proj'"),
        ({"rule": []}, "no module named"),
        ({"k": 8}, "k = 8: expected 1 to 7"),
        ({"k": 0}, "k = 0: expected 1 to 7"),
        ({"rank": 9}, "rank 9 does not fit a 12 x 8 weight: choose 1 to 8"),
        ({"rank": 0}, "weight: choose 1 to"),
        ({"budget": 87}, "below the smallest adapter on these 6 modules, which takes 104 at rank 1"),
        ({"budget": 10**6}, "above the 736 that full ranks of these 6 modules take"),
        ({"budget": "much"}, r"budget 'much': expected parameters \(2396160, 2.5M\), bytes \(10MB, 8MiB\) or match"),
        ({"budget": "2iB"}, "budget '2iB': expected parameters"),
        ({"budget": True}, "budget True: expected parameters"),
        ({"budget": float("nan")}, "budget nan: expected parameters"),
        ({"budget": "match:al:r8"}, "did you mean 'all'"),
        ({"budget": "match:all:r9"}, "rank 9 does not fit"),
        ({"budget": 200, "ranks": "some"}, "expected equal or proportional"),
        ({"granularity": "layer"}, "expected type or module"),
        ({"granularity": "module"}, "needs a budget"),
        (
            {"granularity": "module", "budget": 9, "rank": 2},
            "below the smallest adapter, .*layers.0.v_proj at rank 2, which takes 24: raise it, or lower the rank",
        ),
        ({"granularity": "module", "budget": 90, "rule": "all"}, "the rule plop or plop-inverse"),
        ({"cap": 2}, "needs granularity 'module'"),
    ],
)
def test_errors(report, arguments, message):
    with pytest.raises(PlacementError, match=message):
        pf.place(report, **arguments)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"plopfast": "scores"}', '{"plopfast": "placement", "modules": {"a": 1}}']
)
def test_files_that_are_not_placements(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(FileError, match=r"p\.json"):
        pf.Placement.load(tmp_path / "p.json")
    with pytest.raises(FileError):
        pf.NFNReport.load(tmp_path / "p.json")
    with pytest.raises(FileError, match="plopfast score"):
        pf.NFNReport.load(tmp_path / "absent.json")
