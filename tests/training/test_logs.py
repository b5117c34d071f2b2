"""Metrics in TensorBoard (read back with its own reader) and Weights & Biases (a module that records the calls)."""

import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from plopfast.support.errors import ConfigError
from plopfast.training.logs import open_log


def read_back(folder):
    """Tag -> [(step, value)] as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def wandb(monkeypatch):
    class Run:
        def __init__(self, settings):
            self.settings, self.records, self.finished = settings, [], 0

        def log(self, numbers, step):
            self.records.append((step, numbers))

        def finish(self):
            self.finished += 1

    module = types.ModuleType("wandb")
    module.runs, module.Error = [], type("Error", (Exception,), {})
    module.init = lambda **settings: module.runs.append(Run(settings)) or module.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_tensorboard_holds_every_number(tmp_path):
    log = open_log(tmp_path, "tensorboard", "mine")
    log.write({"step": 1, "loss": 2.5, "lr": 0.125})
    log.write({"step": 2, "loss": 1.5, "tokens": 7})
    log.write({"step": 2, "valid_loss": 1.75})
    log.close()
    log.close()
    assert read_back(tmp_path) == {
        "loss": [(1, 2.5), (2, 1.5)], "lr": [(1, 0.125)], "tokens": [(2, 7.0)], "valid_loss": [(2, 1.75)],
    }  # fmt: skip


def test_tensorboard_goes_on_after_a_resumption(tmp_path):
    first = open_log(tmp_path, "tensorboard")
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": 1.0})
    first.close()
    second = open_log(tmp_path, "tensorboard", first_step=3)  # the checkpoint was written after step 2
    for step in (3, 4, 5):
        second.write({"step": step, "loss": 0.5})
    second.close()
    assert read_back(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5), (5, 0.5)]


def test_wandb_gets_every_record(tmp_path, wandb):
    log = open_log(tmp_path / "run", "wandb", "mine")
    log.write({"step": 3, "loss": 2.5, "lr": 0.125})
    log.close()
    log.close()
    (run,) = wandb.runs
    assert run.settings == {"project": "plopfast", "dir": str(tmp_path / "run"), "name": "mine"}
    assert (tmp_path / "run").is_dir() and run.records == [(3, {"loss": 2.5, "lr": 0.125})] and run.finished == 1


def test_both(tmp_path, wandb):
    log = open_log(tmp_path, " wandb, tensorboard ")
    log.write({"step": 1, "loss": 2.5})
    log.close()
    assert read_back(tmp_path) == {"loss": [(1, 2.5)]} and wandb.runs[0].records == [(1, {"loss": 2.5})]


def test_none_writes_nothing_though_both_are_installed(tmp_path, wandb):
    log = open_log(tmp_path, "none")
    log.write({"step": 1, "loss": 2.5})
    log.close()
    assert not list(tmp_path.iterdir()) and not wandb.runs


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"log_to: {name} cannot be imported .*pip install {name}"):
        open_log(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("log_to", ["mlflow", "", "none,tensorboard", "tensorboard,wandbs"])
def test_names_that_are_none(tmp_path, log_to):
    with pytest.raises(ConfigError, match=r"log_to: expected none or a comma list of tensorboard, wandb, got"):
        open_log(tmp_path, log_to)


def test_what_cannot_start(wandb):
    with pytest.raises(ConfigError, match="tensorboard needs a folder"):
        open_log(None, "tensorboard")

    def refuse(**_):
        raise wandb.Error("no API key")

    wandb.init = refuse
    with pytest.raises(ConfigError, match=r"wandb does not start \(no API key\): wandb login, or WANDB_MODE=offline"):
        open_log(None, "wandb")
