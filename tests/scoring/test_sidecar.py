"""The file of statistics beside scores: it never takes the place of the user's."""

import pytest
import torch
from safetensors.torch import save_file

from plopfast.scoring.report import ModuleScore, NFNReport
from plopfast.support.errors import FileError


def scores(prompts):
    made = {
        f"model.layers.{i}.mlp.up_proj": ModuleScore(1.0 + i, 0.1, 20 * prompts, "up_proj", i, 8, 8) for i in range(2)
    }
    stats = torch.stack([torch.rand(2, prompts), torch.full((2, prompts), 20.0)]).double()
    return NFNReport(made, 20 * prompts, prompts, 1.5, prompt_stats=stats)


@pytest.mark.parametrize("with_stats", [True, False])
def test_weights_of_the_same_name_stay(tmp_path, with_stats):
    report = scores(24)
    if not with_stats:
        report.prompt_stats = None
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileError, match=r"model.safetensors: in the way.*choose another name"):
        report.save(tmp_path / "model.json")
    assert (tmp_path / "model.safetensors").read_bytes() == before and not (tmp_path / "model.json").exists()


def test_a_folder_in_its_place_is_no_missing_file(tmp_path):
    report = scores(24)
    report.save(tmp_path / "scores.json")
    report.save(tmp_path / "scores.json")
    (tmp_path / "scores.safetensors").unlink()
    assert NFNReport.load(tmp_path / "scores.json").prompt_stats is None
    (tmp_path / "scores.safetensors").mkdir()
    with pytest.raises(FileError, match="expected a file, got a folder"):
        NFNReport.load(tmp_path / "scores.json")
