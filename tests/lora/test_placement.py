"""Placements that no run could have written, and those of another model."""

import json

import pytest
from helpers import everywhere

import plopfast as pf
from plopfast.support.errors import FileError, PlacementError

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "pair", [[4.7, 8], ["4", 8], [True, 8], [0, 8], [-1, 8], [4, -8], [4, 0], [4, None], [4, "x"], [4], [4, 8, 1], 4, None]
)  # fmt: skip
def test_a_rank_or_alpha_that_cannot_be(tmp_path, llama, pair):
    path = tmp_path / "placement.json"
    everywhere(llama).save(path)
    value = json.loads(path.read_text())
    value["modules"][NAME] = pair
    path.write_text(json.dumps(value))
    with pytest.raises(FileError, match=rf'placement.json: modules\["{NAME}"\].*make it anew with plopfast place'):
        pf.Placement.load(path)


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "1e999"])
def test_an_alpha_that_is_no_number(tmp_path, alpha):
    path = tmp_path / "placement.json"
    path.write_text(f'{{"plopfast": "placement", "modules": {{"a": [4, {alpha}]}}}}')
    with pytest.raises(FileError, match=r"placement.json: .*(not JSON|too large)"):
        pf.Placement.load(path)


def test_a_placement_comes_back(tmp_path, llama):
    """One of an earlier version, which names no shapes, too."""
    placement = everywhere(llama)
    placement.shapes = {NAME: (32, 32)}
    placement.save(tmp_path / "p.json")
    assert pf.Placement.load(tmp_path / "p.json") == placement
    value = json.loads((tmp_path / "p.json").read_text())
    del value["shapes"]
    (tmp_path / "p.json").write_text(json.dumps(value))
    assert pf.Placement.load(tmp_path / "p.json").modules == placement.modules


def test_a_placement_of_a_model_of_another_width(llama):
    placement = pf.Placement({NAME: (2, 4.0)}, [], "", 0, shapes={NAME: (48, 32)})
    with pytest.raises(PlacementError, match=f"{NAME}: the placement was made for a 48 x 32 weight"):
        pf.inject(llama, placement)
    assert not any("lora" in name for name, _ in llama.named_parameters())


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", NAME])
def test_the_highest_rank_is_the_smaller_side(llama, name):
    smaller = min(llama.get_submodule(name).weight.shape)
    for rank, fits in ((0, False), (1, True), (smaller, True), (smaller + 1, False)):
        placement = pf.Placement({name: (rank, 1.0)}, [], "explicit", 0)
        if fits:
            assert pf.inject(llama, placement) == [name] and pf.unload(llama)
        else:
            with pytest.raises(PlacementError):
                pf.inject(llama, placement)


@pytest.mark.parametrize("values", [((2, 4.0), (2, 8.0), (3, 8.0)), ((3, 1.0), (2, 8.0), (2, 1.0), (2, 8.0), (2, 8.0))])
def test_patterns_hold_what_is_not_the_commonest(values):
    found = pf.Placement({f"m{i}": pair for i, pair in enumerate(values)}, [], "explicit", 0).peft_config()
    for key, pattern, common, column in (
        ("r", "rank_pattern", 2, [rank for rank, _ in values]),
        ("lora_alpha", "alpha_pattern", 8.0, [alpha for _, alpha in values]),
    ):
        assert found[key] == common
        assert found[pattern] == {f"m{i}": value for i, value in enumerate(column) if value != common}
