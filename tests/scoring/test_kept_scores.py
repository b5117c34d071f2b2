"""Scores and EVA's vectors that were tampered with, or are another model's."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import plopfast as pf
from plopfast.scoring import eva
from plopfast.support import files
from plopfast.support.errors import FileError

sys.path.append(str(Path(__file__).parents[1] / "report"))
from full_folder import make


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make(folder)
    return folder / "scores.json"


def test_scores_come_back(kept):
    report = pf.NFNReport.load(kept)
    assert report.prompt_stats is not None and report.decision.decided and report.settings == {"confidence": 0.95}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("scores", "model.layers.0.q_proj", "nfn"), -1), (("scores", "model.layers.0.q_proj", "nfn"), "1"),
        (("scores", "model.layers.0.q_proj", "std"), -1e-9), (("scores", "model.layers.0.q_proj", "tokens"), 1.5),
        (("scores", "model.layers.0.q_proj", "n_in"), 0), (("scores", "model.layers.0.q_proj", "layer"), -1),
        (("scores",), {}), (("prompts",), True), (("decision", "k"), 0), (("decision", "near_ties"), [["a"]]),
        (("settings", "confidence"), "0.9"), (("settings", "odd"), 1), (("types", "q_proj"), 9.0), (("prompt_stats_sha256",), 3),
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_cannot_be(kept, tmp_path, place, value):
    changed = at = json.loads(kept.read_text())
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    (tmp_path / "scores.json").write_text(json.dumps(changed))
    with pytest.raises(
        FileError,
        match=f"scores.json: .*{place[-1] if place[0] != 'types' else 'types'}.*; make it anew with plopfast score",
    ):
        pf.NFNReport.load(tmp_path / "scores.json")


@pytest.mark.parametrize(
    "stats",
    [torch.ones(2, 3, 24), torch.ones(2, 84), torch.full((2, 84, 24), torch.nan), -torch.ones(2, 84, 24),
     torch.zeros(2, 84, 24), torch.ones(2, 84, 0), torch.ones(2, 84, 24, dtype=torch.int64), None],
    ids=lambda stats: "none" if stats is None else f"{stats.shape} {stats.dtype}",
)  # fmt: skip
def test_statistics_of_another_model(kept, tmp_path, stats):
    value = json.loads(kept.read_text())
    save_file({"other": torch.ones(1)} if stats is None else {"prompt_stats": stats}, tmp_path / "scores.safetensors")
    value["prompt_stats_sha256"] = files.sha256(tmp_path / "scores.safetensors")
    (tmp_path / "scores.json").write_text(json.dumps(value))
    with pytest.raises(FileError, match=r"expected prompt_stats of shape \[2, 84, prompts\]"):
        pf.NFNReport.load(tmp_path / "scores.json")


@pytest.mark.parametrize(
    "tensors",
    [{"vectors/a": torch.ones(2, 4)}, {"ratios/a": torch.ones(2)}, {"vectors/a": torch.ones(8), "ratios/a": torch.ones(8)},
     {"vectors/a": torch.ones(2, 4), "ratios/a": torch.ones(3)}, {"vectors/a": torch.ones(2, 4) / 0, "ratios/a": torch.ones(2)},
     {"vectors/a": torch.ones(2, 4).int(), "ratios/a": torch.ones(2)}],
)  # fmt: skip
def test_vectors_that_cannot_be(tmp_path, tensors):
    save_file(tensors, tmp_path / "eva.safetensors")
    with pytest.raises(FileError, match=r"'a': expected finite vectors .* make it anew"):
        eva.load(tmp_path / "eva.safetensors")
