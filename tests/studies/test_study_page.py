"""The tables of docs/study.md are what the study's results say."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study_page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import study_page

    yield study_page
    sys.modules.pop("study_page")


def test_its_tables_are_of_the_results(study_page):
    text, study = (ROOT / "docs/study.md").read_text(), json.loads((ROOT / "bench/results/study.json").read_text())
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == study_page.TABLES.keys()
    assert study_page.page(text, study) == text, "python bench/study_page.py makes them anew"
    for trial in study["trials"]:
        assert f"| `{trial['name']}` |" in text
    for row in study["tau"]:
        assert f"| `{row['criterion']}` | {row['mean']:+.2f} |" in text


def test_an_unknown_table_is_an_error(study_page):
    with pytest.raises(KeyError, match="hopes"):
        study_page.page("<!-- table: hopes -->\n<!-- end -->\n", {})
