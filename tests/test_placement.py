"""Rules, margins, parameter counts, matching, round trips and errors."""

import pytest
from conftest import build, random_batches

import plopfast as pf
from plopfast.errors import FileError, PlacementError
from plopfast.nfn import ModuleScore

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


def test_matching_parameters(report):
    all_ = pf.place(report, "all", rank=2)
    matched = pf.place(report, "mlp", match_params=all_)
    rank = next(iter(matched.modules.values()))[0]
    sizes = matched.parameters // rank
    assert abs(matched.parameters - all_.parameters) <= sizes / 2, "no other rank comes nearer"
    assert "nearest to" in str(matched)


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
        ({"rank": 5}, "rank 5 does not fit its 4 x 8 weight: 1 to 4"),
        ({"rank": 0}, "weight: 1 to"),
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
