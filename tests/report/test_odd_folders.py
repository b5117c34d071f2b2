"""Folders at the edges: no number, no row, one layer, two hundred layers, many types, hostile names, files cut off or missing."""

import dataclasses
import json
import re

import pytest
import torch
from full_folder import make, scores
from reading import change, figures, put, report

import plopfast as pf
from plopfast.report.folder import RunFolder
from plopfast.report.page import SOURCES, write_report
from plopfast.scoring.report import ModuleScore

HOSTILE = "</style><b onmouseover=x>\"'&\x1b[31m\u202e"


def layered(layers: int, types: int) -> pf.NFNReport:
    torch.manual_seed(0)
    made = {
        f"model.layers.{layer}.block.type_{type_}": ModuleScore(0.5 + type_ / types + 0.1 * float(torch.rand(())), 0.1, 20, f"type_{type_}", layer, 64, 64)
        for layer in range(layers) for type_ in range(types)
    }  # fmt: skip
    return pf.NFNReport(made, 20, 1, 1.0, "some/model", {"confidence": 0.95})


@pytest.mark.parametrize(("layers", "types"), [(1, 2), (1, 1), (200, 7), (61, 3), (3, 100), (200, 100)])
def test_few_and_many_layers_and_types(tmp_path, layers, types):
    report_ = layered(layers, types)
    report_.save(tmp_path / "scores.json")
    pf.place(report_, "plop", k=min(3, types), rank=8).save(tmp_path / "placement.json")
    page = report(tmp_path)
    heat = figures(tmp_path)["nfn_by_layer"]
    assert len(heat.rows) == types and len(heat.columns) <= 60 and len(heat.columns) >= min(layers, 31)
    assert {cells.__len__() for _, _, cells in heat.rows} == {len(heat.columns)}
    assert ("layers each" in page.text) == (layers > 60)
    rows = [
        name
        for figure in figures(tmp_path).values()
        if getattr(figure, "look", "") == "nfn"
        for name in [row.name for row in figure.rows]
    ]
    assert sorted(set(rows)) == sorted(report_.types), "each type is on the page"


@pytest.mark.parametrize("name", ["loss", "valid_loss", "lr", "grad_norm", "seconds", "tokens"])
def test_steps_without_a_number(full, name):
    lines = [json.loads(line) for line in (full / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if name in line and line["step"] % 2:
            line[name] = None
    (full / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(full)
    assert "training" not in page.lacking
    for line in lines:
        line.pop(name, None)
    (full / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "training" not in report(full).lacking


@pytest.mark.parametrize("loss", [0.0, 1e-12, 1e12, 3.0])
def test_losses_of_any_size(full, loss):
    (full / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step in (1, 2, 3)))
    text = write_report(full).read_text()
    assert "nan" not in re.sub(r"<style>.*</style>|[a-z]*nan[a-z]+", "", text, flags=re.S).lower()


def test_no_number_of_python_is_on_a_page(whole):
    text = re.sub(r"<style>.*</style>", "", (whole[0] / "report.html").read_text(), flags=re.S)
    assert not re.search(r"\b(nan|inf|None|True|False|Undefined)\b", text)


def test_one_step_one_row_one_seed(full):
    (full / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    row = json.loads((full / "eval_rows.jsonl").read_text().splitlines()[0])
    (full / "eval_rows.jsonl").write_text(json.dumps(row) + "\n")
    put(full, "trial.json", lambda trial: trial.update(arms=trial["arms"][:1]))
    page = report(full)
    assert "A single placement was tried." in page.text and not page.lacking


def test_no_rows(full):
    (full / "eval_rows.jsonl").write_text("")
    (full / "metrics.jsonl").write_text("")
    change(full, "training.json", steps=0, tokens=0, clipped=0, rows_seen=0)
    put(full, "eval.json", lambda value: [value[who].update(examples=0, tokens=0) for who in ("base", "tuned")])
    put(
        full, "data.json", lambda value: [split.update(rows=0, histogram=[[0, 0]], row=[]) for split in value["splits"]]
    )
    page = report(full)
    assert page.lacking == ["training"] and page.headings[0][1].startswith("Loss 0.209 after training")


def test_hostile_texts_everywhere(full):
    def poisoned(value, key=""):
        if isinstance(value, dict):
            return {k: poisoned(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(item, key) for item in value]
        kept = ("plopfast", "verdict", "chooses", "state", "metric", "sha256", "dtype", "device")
        return f"{value}{HOSTILE}" if isinstance(value, str) and key not in kept else value

    for name in ("eval", "data", "trial", "audit", "estimate", "search"):
        put(full, f"{name}.json", lambda value: value.update(poisoned(value)))
    path = full / "eval_rows.jsonl"
    path.write_text("".join(json.dumps(poisoned(json.loads(line))) + "\n" for line in path.read_text().splitlines()))
    page = report(full)
    text = (full / "report.html").read_text()
    assert not any(name.startswith("on") for _, kept in page.tags for name in kept)
    assert text.count("</style>") == 1 and "<b onmouseover" not in text
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[31m" in text and "\\u202e" in text


def test_hostile_types(full):
    odd = scores()
    odd.scores = {n: dataclasses.replace(s, type=s.type.replace("v_proj", HOSTILE)) for n, s in odd.scores.items()}
    odd.decision = odd.decide(3)
    odd.save(full / "scores.json")
    pf.place(odd, "plop").save(full / "placement.json")
    (full / "eval.json").unlink()
    report(full)
    text = (full / "report.html").read_text()
    assert text.count("</style>") == 1 and "<b onmouseover" not in text and "\x1b" not in text


@pytest.mark.parametrize(
    "name", sorted({file for source in SOURCES for file in source.files} | {"config.json", "history.jsonl"})
)
def test_any_file_may_be_missing(tmp_path, name):
    make(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    assert report(tmp_path / "run").headings[0][0] == "h1"


def test_files_of_an_older_version(full):
    (full / "eval_rows.jsonl").unlink()
    put(
        full,
        "eval.json",
        lambda value: [value.pop(name) for name in ("gain", "general", "samples", "must_keep", "rows")],
    )
    (full / "training.json").write_text(json.dumps({"plopfast": "training", "steps": 60}))
    (full / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2, 3))
    )
    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(
        json.dumps({"settings": {"lr": 0.001, "an option of old": 3, "another": None}, "model": config["model"]})
    )
    page = report(full)
    assert "held-out rows" in page.headings[0][1] and ["an option of old", "3"] in [cells for _, cells in page.rows]
    assert not page.lacking and RunFolder(full).eval_rows == []


def test_rows_without_choices(full):
    path = full / "eval_rows.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["expected"] = None
        for when in ("before", "after"):
            line[when] = {"right": line[when]["right"] * 0.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    put(full, "eval.json", lambda value: [value[who].update(metric="token") for who in ("base", "tuned")])
    found = figures(full)
    assert not {"changes", "by_answer", "confusion", "most_wrong"} & found.keys()
    assert "test tokens predicted right" in report(full).headings[0][1]


def test_a_run_that_trained_all_weights(full):
    for name in ("scores.json", "placement.json", "trial.json"):
        (full / name).unlink()
    put(full, "config.json", lambda config: config["settings"].update(full=True, lr=2e-5))
    page = report(full)
    assert "All weights of model were trained." in page.text and page.lacking == ["where", "trial"]
    assert ["full", "yes"] in [cells for _, cells in page.rows] and "adapters on" not in page.headings[0][1]


def test_an_answer_word_for_word(full):
    put(full, "eval.json", lambda value: [value[who].update(metric="exact-match") for who in ("base", "tuned")])
    lines = [json.loads(line) for line in (full / "eval_rows.jsonl").read_text().splitlines()]
    for line in lines:
        for when in ("before", "after"):
            del line[when]["answered"]
    (full / "eval_rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, found = report(full), figures(full)
    assert "the likeliest answer was the expected one, token by token" in page.text and "guess" not in page.text
    assert {"changes", "most_wrong"} <= found.keys() and not {"by_answer", "confusion"} & found.keys()
    assert [column.heading for column in found["most_wrong"].table.columns] == [
        "row",
        "expected",
        "chance of the right one",
    ]
