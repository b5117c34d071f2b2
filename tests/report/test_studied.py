"""What the report says of plopfast's own study, and that it is what the study's results say."""

import copy
import json
import sys
from pathlib import Path

import pytest

from plopfast.report import studied

ROOT = Path(__file__).parents[2]
FIGURES = {"model": "a", "built_alike": ["one"], "tasks": 2, "tau": 0.5, "p": 0.01, "above_plop": {
    "all": {"mean": 0.2, "p": 0.03}, "mlp": {"mean": -0.2, "p": 0.03},
    "no-qk": {"mean": 0.2, "p": 0.06}}}  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    value = {"confidence": 0.95, "models": [copy.deepcopy(FIGURES), FIGURES | {"model": "b", "built_alike": ["two"]}]}
    monkeypatch.setattr(studied, "_studied", lambda: value)
    return value["models"]


def test_the_package_holds_what_the_study_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from study_summary import summary

    study = json.loads((ROOT / "bench" / "results" / "study.json").read_text())
    studied._studied.cache_clear()
    assert studied._studied() == summary(study), "python bench/study_summary.py makes it anew"
    sys.modules.pop("study_summary")


def test_of_a_model_that_is_built_alike(figures):
    assert studied.what_the_study_found("one") == (
        "In plopfast's study of a (2 tasks), which is built like this model, the order by NFN agreed with how well each module type does alone "
        "(Kendall's tau +0.50, p 0.01), and its pick did better than adapters on all modules, did worse than adapters on the "
        "MLP and showed no difference from adapters on all but query and key."
    )
    figures[0] |= {"tau": -0.5}
    assert "was the reverse of how well" in studied.what_the_study_found("one")
    figures[0] |= {"p": 0.06}
    assert "was not shown to agree with how well" in studied.what_the_study_found("one")


def test_where_the_study_has_no_such_model(figures):
    said = studied.what_the_study_found("three")
    assert said.startswith(
        "plopfast's study has no model that is built like this one. In plopfast's study of a (2 tasks), the order"
    )
    assert "In plopfast's study of b (2 tasks), the order" in said and "which is built" not in said
    unknown = studied.what_the_study_found("")
    assert unknown == said.partition("this one. ")[2], "older folders do not say what the model is"
