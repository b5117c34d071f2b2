"""The headline and what to know before relying on it: which words for which result."""

import json

import pytest
from full_folder import make
from reading import change, put, report

import plopfast as pf
from plopfast.report.facts import accuracy_verdict, changes, confused, guess, most_wrong, rows_seen
from plopfast.report.folder import RunFolder
from plopfast.report.head import caveats, headline


def judged(folder, before, after, gain=None, **more):
    def edit(value):
        value.pop("gain", None)
        for who, (accuracy, low, high) in (("base", before), ("tuned", after)):
            value[who] |= {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high} | more
        if gain:
            value["gain"] = dict(zip(("difference", "low", "high"), gain, strict=True))

    put(folder, "eval.json", edit)
    return headline(RunFolder(folder))


@pytest.mark.parametrize(
    ("before", "after", "gain", "said"),
    [
        ((0.5, 0.4, 0.6), (0.8, 0.7, 0.9), (0.3, 0.2, 0.4), "80% of test rows answered right, up from 50%"),
        ((0.8, 0.7, 0.9), (0.5, 0.4, 0.6), (-0.3, -0.4, -0.2), "50% of test rows answered right, down from 80%"),
        ((0.5, 0.4, 0.6), (0.52, 0.4, 0.6), (0.02, -0.01, 0.05), "No improvement shown: 52% of test rows answered right, 50% before"),
        ((0.5, 0.4, 0.6), (0.55, 0.45, 0.65), (0.05, 0.01, 0.09), "55% of test rows answered right, up from 50%"),  # pairs tell more
        ((0.5, 0.4, 0.6), (0.8, 0.7, 0.9), None, "80% of test rows answered right, up from 50%"),  # an older file
        ((0.8, 0.7, 0.9), (0.5, 0.4, 0.6), None, "50% of test rows answered right, down from 80%"),
        ((0.5, 0.4, 0.6), (0.58, 0.48, 0.68), None, "58% of test rows answered right, 50% before"),  # neither shown nor excluded
        ((0.8801, 0.87, 0.89), (0.8832, 0.87, 0.89), (0.0031, 0.001, 0.005), "88.32% of test rows answered right, up from 88.01%"),
        ((0.5, 0.4, 0.6), (1.0, 0.99, 1.0), (0.5, 0.4, 0.6), "100% of test rows answered right, up from 50%"),
        ((0.5, 0.4, 0.6), (0.9999, 0.99, 1.0), (0.5, 0.4, 0.6), "99.9% of test rows answered right, up from 50%"),  # not all
    ],
)  # fmt: skip
def test_the_result_comes_first(full, before, after, gain, said):
    assert judged(full, before, after, gain) == said


def test_other_tasks_and_other_rows(full):
    before, after, gain = (0.5, 0.4, 0.6), (0.8, 0.7, 0.9), (0.3, 0.2, 0.4)
    assert judged(full, before, after, gain, metric="token") == "80% of test tokens predicted right, up from 50%"
    assert judged(full, before, after, gain, metric="exact-match") == "80% of test rows answered right, up from 50%"
    change(full, "eval.json", rows="validation")
    assert headline(RunFolder(full)) == "80% of validation rows answered right, up from 50%"
    assert judged(full, before, after, gain, examples=0) == "Loss 0.209 after training, 12.2 before"


def test_without_a_test(full):
    (full / "eval.json").unlink()
    assert headline(RunFolder(full)) == "Validation loss 0.183; not tested yet"
    (full / "metrics.jsonl").unlink()
    assert headline(RunFolder(full)) == "Put adapters on v_proj, o_proj and down_proj"
    put(full, "trial.json", lambda trial: trial["arms"][3]["versus"].update(verdict="better"))
    assert headline(RunFolder(full)) == "Use the placement mlp"
    put(full, "trial.json", lambda trial: trial["arms"][3]["versus"].update(verdict="worse"))
    for name in ("scores.json", "placement.json"):
        (full / name).unlink()
    assert headline(RunFolder(full)) == "Where to put LoRA adapters in model"
    for name in ("config.json", "estimate.json", "audit.json", "trial.json"):
        (full / name).unlink()
    assert headline(RunFolder(full)) == "Where to put LoRA adapters in the model"


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [((0.1, 0.0, 0.2), "none"), ((0.1, 1e-9, 0.2), "up"), ((-0.1, -0.2, 0.0), "none"), ((-0.1, -0.2, -1e-9), "down")],
)
def test_an_interval_that_holds_zero_shows_nothing(gain, verdict):
    model = {"accuracy_low": 0.0, "accuracy_high": 1.0}
    found = {"base": model, "tuned": model, "gain": dict(zip(("difference", "low", "high"), gain, strict=True))}
    assert accuracy_verdict(found) == verdict
    assert accuracy_verdict({"base": {}, "tuned": {}}) == "unknown"


def test_what_to_know_comes_by_weight_and_ends(full):
    said = caveats(RunFolder(full))
    order = (
        "had to stay right",
        "Splits overlap",
        "Forgetting",
        "ended too early",
        "92 rows got worse",
        "One run, one seed (0).",
    )
    assert len(said) == len(order) and all(word in text for word, text in zip(order, said, strict=True)), said
    put(full, "eval.json", lambda value: [value.pop(name) for name in ("must_keep", "general", "samples")])
    put(full, "data.json", lambda value: value.update(overlap=[]))
    (full / "eval_rows.jsonl").unlink()
    (full / "trial.json").unlink()
    change(full, "training.json", rows_seen=3430, clipped=0, best_step=30)
    said = caveats(RunFolder(full))
    order = ("Forgetting</b> was not measured", "No better placement is known", "Right means", "One run, one seed")
    assert len(said) == len(order) and all(word in text for word, text in zip(order, said, strict=True)), said
    change(full, "eval.json", rows="validation")
    assert "No test rows" in caveats(RunFolder(full))[0]
    text = report(full).text
    assert text.count("One run, one seed (0).") == 2 and "Free text was not judged." in text
    assert "Forgetting was not measured:" in text


def test_what_does_not_fit_is_said_below_and_the_seed_above(full):
    change(full, "eval.json", rows="validation")
    said = caveats(RunFolder(full))
    assert len(said) == 7 and "One run, one seed" in said[5] and said[6] == "One more is said in the sections below."
    assert "92 rows became wrong" in report(full).text


def test_near_ties_are_said(tmp_path):
    near = make(tmp_path, types={"a": 1.0, "b": 1.0001, "c": 2.0, "d": 1.0002})
    pf.place(near, "plop", k=1).save(tmp_path / "placement.json")
    assert any("Near-ties.</b> The prompts do not tell" in text for text in caveats(RunFolder(tmp_path)))


def test_rows_that_changed(full):
    run = RunFolder(full)
    found = changes(run)
    assert (found.both, found.gained, found.lost, found.neither) == (308, 370, 92, 0)
    assert found.both + found.lost == 400 and found.both + found.gained == 678, "as eval.json says"
    assert guess(run) == 1 / 5
    counted = confused(run)
    assert sum(counted.values()) == 92 and counted.most_common(1)[0][0] == ("food", "substance")
    assert sum(confused(run, "before").values()) == 370
    assert [row["row"] for row in most_wrong(run)] == [1, 2, 3, 4, 5], "the lowest chances first"
    lines = (full / "eval_rows.jsonl").read_text().splitlines()
    sure = json.loads(lines[-1])
    sure["after"]["chance"] = 1e-6  # right, of many answers that were less likely still
    (full / "eval_rows.jsonl").write_text("\n".join([*lines[:-1], json.dumps(sure)]) + "\n")
    assert [row["row"] for row in most_wrong(RunFolder(full))] == [1, 2, 3, 4, 5]
    half = json.loads(lines[0])
    half["after"]["right"] = 0.5
    (full / "eval_rows.jsonl").write_text("\n".join([json.dumps(half), *lines[1:]]) + "\n")
    assert changes(RunFolder(full)) is None, "of tokens, a row is neither right nor wrong"


def test_rows_seen_are_estimated_where_nobody_counted(full):
    assert rows_seen(RunFolder(full)) == (455, True)
    put(full, "training.json", lambda value: value.pop("rows_seen"))
    assert rows_seen(RunFolder(full)) == (450, False)
    assert "≈ 450" in report(full).text
    put(full, "training.json", lambda value: value.update(tokens=0))
    assert rows_seen(RunFolder(full)) == (None, False)
