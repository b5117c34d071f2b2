"""The file of a study: which trials it names, with which settings, and what cannot be."""

import json

import pytest

from plopfast.studies.plan import read_plan
from plopfast.support.config import RunConfig
from plopfast.support.errors import ConfigError

PLAN = {
    "lrs": "1e-3,2e-3",
    "max_steps": 9,
    "models": {"small": {}, "other": {"model": "other.gguf"}, "noise": {"model": "random"}},
    "tasks": {"sums": {"train": "sums.jsonl", "seed": 3}, "words": {"train": "words.jsonl", "max_steps": 5}},
    "budgets": {"r1": {"rank": 1}, "r4": {"rank": 4, "lrs": "5e-3", "max_steps": 7}},
    "controls": ["noise"],
}


def read(tmp_path, **changes):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({key: value for key, value in {**PLAN, **changes}.items() if value is not None}))
    return read_plan(path, RunConfig(k=2, rank=7))


def test_every_model_task_and_budget_in_the_files_order(tmp_path):
    cells = {cell.name: cell for cell in read(tmp_path)}
    assert len(cells) == 12 and [*cells][:3] == ["small-sums-r1", "small-sums-r4", "small-words-r1"]
    one = cells["other-words-r4"]
    assert (one.model, one.task, one.budget, one.control) == ("other", "words", "r4", False)
    assert (one.config.model, one.config.rank, one.config.k) == ("other.gguf", 4, 2)
    assert one.config.max_steps == 7 and one.config.lrs == "5e-3", "the last one counts"
    assert cells["other-words-r1"].config.max_steps == 5
    assert cells["small-sums-r1"].config.max_steps == 9 and cells["small-sums-r1"].config.seed == 3
    assert [name for name, cell in cells.items() if cell.control] == [
        name for name in cells if name.startswith("noise")
    ]


def test_epochs_of_a_task_take_the_place_of_steps(tmp_path):
    (cell,) = read(tmp_path, models={"m": {}}, tasks={"t": {"epochs": 2.0}}, budgets={"b": {}}, controls=[])
    assert cell.config.epochs == 2 and cell.config.max_steps is None


def test_some_of_them(tmp_path):
    names = [cell.name for cell in read(tmp_path, trials=["other-sums-r4", "small-sums-r1"])]
    assert names == ["other-sums-r4", "small-sums-r1"], "in the order in which they are named"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": None}, "expected 'models', a mapping"),
        ({"tasks": {}}, "expected 'tasks', a mapping"),
        ({"tasks": ["sums"]}, "expected 'tasks', a mapping"),
        ({"budgets": {"r1": 1}}, "expected 'budgets', a mapping"),
        ({"models": {"a/b": {}}}, "models: 'a/b' names folders"),
        ({"models": {"small": {"rnk": 4}}, "controls": []}, r"small-sums-r1: unknown setting 'rnk'.*rank"),
        ({"models": {"small": {"rank": "four"}}, "controls": [], "budgets": {"b": {}}}, "small-sums-b: rank: expected"),
        ({"lr_s": 1}, "unknown setting 'lr_s'"),
        ({"trials": ["small-sums-r2"]}, "trials: expected some of .*got 'small-sums-r2'; did you mean 'small-sums-r"),
        ({"trials": "small-sums-r1"}, "trials: expected a list"),
        ({"trials": []}, "trials: none is named"),
        ({"controls": ["random"]}, "controls: expected some of small, other, noise, got 'random'"),
        ({"controls": 3}, "controls: expected a list"),
        (
            {"models": {"a": {}, "a-b": {}}, "tasks": {"b-c": {}, "c": {}}, "controls": []},
            "two trials are named a-b-c-r1",
        ),
    ],
)
def test_what_cannot_be(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)


def test_a_file_that_is_no_mapping(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("- models\n")
    with pytest.raises(ConfigError, match="expected a mapping with models, tasks, budgets"):
        read_plan(path, RunConfig())
