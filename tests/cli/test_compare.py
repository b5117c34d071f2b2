"""plopfast compare: two finished trainings on the same rows."""

import json
import shutil

import pytest
import torch
from helpers import adapted, build, plopfast, randomise

import plopfast as pf
from plopfast.run.evaluating import CHOSE_THE_STEP
from plopfast.training.evaluate import choices_of, evaluate
from plopfast.training.intervals import of_change, of_gain

SETTINGS = {"plopfast": "config", "settings": {}}


@pytest.fixture
def saved(model_folder, tmp_path):
    """The folders of two adapters of the small Llama."""
    for name, seed in (("one", 0), ("two", 1)):
        model = adapted()
        torch.manual_seed(seed)
        randomise(model)
        pf.save_adapter(model, tmp_path / name / "adapter")
    return tmp_path / "one", tmp_path / "two"


@pytest.fixture
def measured(saved, model_folder, data):
    model, tokenizer = pf.load_model(model_folder)
    examples = pf.tokenize(pf.read_jsonl(data[-1]), tokenizer)
    found = {"base": evaluate(model, examples, choices=choices_of(examples))}
    for folder in saved:
        pf.load_adapter(model, folder / "adapter")
        found[folder.name] = evaluate(model, examples, choices=choices_of(examples))
        pf.unload(model)
    return found


def said(capsys, *words, code=0):
    assert plopfast("compare", *words) == code
    found = capsys.readouterr()
    return found.out if code == 0 else found.err


@pytest.mark.parametrize("pair", [("one", "two"), ("two", "base"), ("base", "one")])
def test_both_on_the_same_rows(pair, measured, saved, model_folder, data, tmp_path, capsys):
    words = [tmp_path / name if name != "base" else name for name in pair]
    text = said(capsys, *words, "--model", model_folder, *data)
    one, two = (measured[name] for name in pair)
    for letter, metrics in (("A", one), ("B", two)):
        line = next(line for line in text.splitlines() if line.startswith(f"{letter} "))
        assert f"{metrics.accuracy:.4f}" in line and f"{metrics.loss:.4f}" in line
    gain = of_gain(one.right, two.right)
    change = of_change([b.nats - a.nats for a, b in zip(one.rows, two.rows, strict=True)], [r.tokens for r in one.rows])
    for what, of, worse in (("accuracy", gain, "A"), ("loss", change, "B")):
        line = next(line for line in text.splitlines() if line.startswith(f"{what} of B minus A"))
        assert f"{of.difference:+.4f} (95% interval {of.low:+.4f} to {of.high:+.4f}" in line
        better = worse if of.high < 0 else ({"A": "B", "B": "A"}[worse] if of.low > 0 else "")
        assert line.endswith(f"{better} is better" if better else "no difference shown")
    alone = [sum(a > b for a, b in zip(x.right, y.right, strict=True)) for x, y in ((one, two), (two, one))]
    assert f"right by A alone: {alone[0]} rows" in text and f"right by B alone: {alone[1]} rows" in text
    assert CHOSE_THE_STEP not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["one", "two", "small-llama", "train.jsonl", "valid.jsonl", "test.jsonl"]
    ), "it writes nothing"


def test_validation_rows_flatter(saved, model_folder, data, capsys):
    assert CHOSE_THE_STEP in said(capsys, *saved, "--model", model_folder, *data[:4])


def test_settings_come_from_the_first_run_folder(saved, measured, model_folder, data, capsys):
    given = {"model": str(model_folder), **{data[i].removeprefix("--"): data[i + 1] for i in range(0, 6, 2)}}
    (saved[0] / "config.json").write_text(json.dumps({"plopfast": "config", "settings": given}))
    for words in (saved, saved[::-1]):
        assert f"{measured['one'].loss:.4f}" in said(capsys, *words)


def test_a_model_that_was_trained_whole(saved, measured, model_folder, data, tmp_path, capsys):
    build("llama", seed=5).save_pretrained(tmp_path / "full" / "model")
    _, tokenizer = pf.load_model(model_folder)
    tokenizer.save_pretrained(tmp_path / "full" / "model")
    text = said(capsys, tmp_path / "full", saved[0], "--model", model_folder, *data)
    other, _ = pf.load_model(tmp_path / "full" / "model")
    examples = pf.tokenize(pf.read_jsonl(data[-1]), tokenizer)
    assert f"{evaluate(other, examples).loss:.4f}" in text and f"{measured['one'].loss:.4f}" in text


def test_other_rows_or_another_base(saved, model_folder, data, capsys):
    def keep(folder, sha, model="a/b"):
        value = {**SETTINGS, "model": model, "data": {"test": {"file": "t", "sha256": sha}}}
        (folder / "config.json").write_text(json.dumps(value))

    keep(saved[0], "a" * 64), keep(saved[1], "b" * 64)
    assert "were made for different test rows: say with --test FILE" in said(capsys, *saved, code=2)
    assert "right by A alone" in said(capsys, *saved, "--model", model_folder, *data), "with --test it is said"
    keep(saved[1], "a" * 64, "c/d")
    assert "adapters of one base" in said(capsys, *saved, code=2)


def test_what_is_no_training(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("plopfast.run.run.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    shutil.rmtree(saved[1] / "adapter")
    error = said(capsys, *saved, code=2)
    assert f"{saved[1]}: expected a run folder with adapter/ or model/, an adapter's folder, or base" in error
    assert f"{tmp_path / 'none'}: expected a run folder" in said(capsys, tmp_path / "none", "base", code=2)
