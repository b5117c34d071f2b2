"""The splits of a run: several files, held-out rows, overlap, and what config.json keeps of them."""

import json
import re
from pathlib import Path

import pytest
from helpers import plopfast

from plopfast.data.rows import DEMO
from plopfast.run.run import Run, resolve
from plopfast.run.splits import sources_of
from plopfast.support import files
from plopfast.support.config import RunConfig
from plopfast.support.errors import ConfigError, DataError
from plopfast.support.settings_file import load_settings


@pytest.fixture
def made(tmp_path):
    """Writes a file of pairs with these prompts; returns its path."""

    def make(name, *prompts):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"prompt": prompt, "completion": "c"}) + "\n" for prompt in prompts))
        return str(path)

    return make


def opened(tmp_path, said=None, **settings):
    run = Run(tmp_path / "run", RunConfig(**settings))
    run.say = (said if said is not None else []).append
    return run


def begin(run):
    """Keeps the settings, as every stage does."""
    with run.stage("run"):
        pass
    run.at.close()


def prompts(run, split):
    return [row["prompt"] for _, row in run.rows(split)]


def test_several_files_of_a_split(tmp_path, made):
    one, two, valid = made("a.jsonl", "1", "2"), made("b.jsonl", "3"), made("v.jsonl", "4")
    run = opened(tmp_path, train=(one, two), valid=valid)
    assert prompts(run, "train") == ["1", "2", "3"] and run.rows("test") is run.rows("valid")
    begin(run)
    kept = json.loads((run.folder / "config.json").read_text())
    assert kept["data"]["train"] == [{"file": name, "sha256": files.sha256(Path(name))} for name in (one, two)]
    assert kept["data"]["valid"] == {"file": valid, "sha256": files.sha256(Path(valid))}
    assert kept["settings"]["train"] == [one, two] and kept["settings"]["valid"] == valid
    assert load_settings(run.folder / "config.json")["train"] == (one, two)
    Run(run.folder, RunConfig(train=[one, two], valid=(valid,)), resume=True)  # the same, however it is written
    with pytest.raises(ConfigError, match="began with other inputs: train"):
        Run(run.folder, RunConfig(train=one, valid=valid), resume=True)


def test_an_older_folder_with_one_file_goes_on(tmp_path, made):
    train = made("a.jsonl", "1", "2")
    run = opened(tmp_path, train=train)
    begin(run)
    kept = json.loads((run.folder / "config.json").read_text())
    for newer in ("columns", "bad_rows", "allow_overlap"):
        del kept["settings"][newer]
    (run.folder / "config.json").write_text(json.dumps(kept))
    assert load_settings(run.folder / "config.json")["train"] == train
    Run(run.folder, RunConfig(train=train), resume=True)


@pytest.mark.parametrize("value", [3, [3], True, {"a": 1}])
def test_settings_of_a_wrong_type(tmp_path, value):
    (tmp_path / "c.json").write_text(json.dumps({"train": value}))
    with pytest.raises(ConfigError, match=r"train: expected a string or a list of strings, got"):
        load_settings(tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps({"unlabeled": ["a"]}))
    with pytest.raises(ConfigError, match=r"unlabeled: expected str"):
        load_settings(tmp_path / "c.json")


def test_names_are_absolute_but_for_the_hubs(tmp_path, made, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made("a.jsonl", "1")
    config = resolve(RunConfig(train=("a.jsonl", "owner/name:train"), valid="a.jsonl"))
    assert config.train == (str(tmp_path / "a.jsonl"), "owner/name:train") and config.valid == str(tmp_path / "a.jsonl")
    assert sources_of(config)["train"] == [str(tmp_path / "a.jsonl"), "owner/name:train"]
    assert sources_of(RunConfig()) == {split: [str(path)] for split, path in DEMO.items()}


def test_rows_are_held_out_and_counted(tmp_path, made):
    run = opened(tmp_path, train=made("a.jsonl", *map(str, range(40))))
    assert prompts(run, "valid") == ["0", "20"] and len(run.rows("train")) == 38
    assert run.read("train").formats == {"pair": 38} and run.read("valid").formats == {"pair": 2}


def test_columns_bad_rows_and_what_is_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "1", "a": "2", "id": 3}\n{\n{"q": "2", "a": "2"}\n')
    said = []
    run = opened(tmp_path, said, train=str(path), columns="prompt=q,completion=a", bad_rows="skip")
    assert prompts(run, "train") == ["2"] and len(run.read("train").bad) == 1
    assert [line[:30] for line in said] == [
        "train: 2 rows: prompt and comp", "train: columns that are not us", "train: 1 of 3 rows are bad and"
    ]  # fmt: skip
    run.rows("valid")
    assert len(said) == 3, "once"


def test_bad_rows_are_counted_of_all_rows_although_some_are_held_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 39 + "{\n")
    run = opened(tmp_path, train=str(path), bad_rows="skip")
    assert run.read("train").lines()[1].startswith("1 of 40 rows are bad") and len(run.rows("train")) == 37


def test_held_out_rows_that_cannot_be_used(tmp_path, model_folder):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n' + '{"text": "a dog"}\n' * 9)
    run = opened(tmp_path, train=str(path), bad_rows="skip", model=str(model_folder))
    assert len(run.examples("train")) == 9
    with pytest.raises(DataError, match=r"^valid: no row can be used; 1 of 1 .* held out .*: give --valid FILE$"):
        run.examples("valid")


def test_nothing_is_said_of_a_test_split_that_is_not_there(tmp_path, model_folder):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n' + '{"text": "a dog"}\n' * 29)
    said = []
    run = opened(tmp_path, said, train=str(path), bad_rows="skip", model=str(model_folder))
    assert run.examples("test") is run.examples("valid")
    assert [line[:8] for line in said if "cannot be used" in line] == ["valid: 1"]


def test_a_run_does_not_go_on_with_rows_that_changed(tmp_path, made):
    train, valid = (made("a.jsonl", "1"), made("b.jsonl", "2")), made("v.jsonl", "3")
    begin(opened(tmp_path, train=train, valid=valid))
    Run(tmp_path / "run", RunConfig(train=train, valid=valid), resume=True)
    made("b.jsonl", "4")
    with pytest.raises(
        ConfigError, match="config.json: cannot go on, because it began with other inputs: the train file"
    ):
        Run(tmp_path / "run", RunConfig(train=train, valid=valid), resume=True)


def test_test_rows_that_are_training_rows_are_refused(tmp_path, made):
    given = {"train": made("a.jsonl", "1", "2", "3"), "valid": made("v.jsonl", "4"), "test": made("t.jsonl", "9", "2")}
    with pytest.raises(
        DataError, match=r"t\.jsonl:2: the same row as .*a\.jsonl:2; of 2 test rows, 1 .*--allow-overlap"
    ):
        opened(tmp_path, **given).rows("train")
    said = []
    assert len(opened(tmp_path, said, **given, allow_overlap=True).rows("test")) == 2
    assert sum("the same row as" in line for line in said) == 1


def test_a_prompt_alone_is_an_overlap_too(tmp_path, made):
    test = tmp_path / "t.jsonl"
    test.write_text('{"prompt": "2", "completion": "other"}\n')
    with pytest.raises(DataError, match="the same prompt as"):
        opened(tmp_path, train=made("a.jsonl", "1", "2"), valid=made("v.jsonl", "4"), test=str(test)).rows("train")


def test_other_overlaps_are_said(tmp_path, made):
    said = []
    run = opened(tmp_path, said, train=made("a.jsonl", "1", "2"), valid=made("v.jsonl", "2"))
    assert run.rows("test") is run.rows("valid")
    (line,) = [line for line in said if "the same row" in line]
    assert re.search(r"v\.jsonl:1: .* of 1 valid rows, 1 are train rows too", line)


def test_a_folder_is_known_by_its_rows(tmp_path, made):
    datasets = pytest.importorskip("datasets")
    hashes = []
    for text in ("a", "b"):
        parts = {"train": [{"text": f"{text} dog"}, {"text": "x"}], "validation": [{"text": "y"}]}
        saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
        saved.save_to_disk(tmp_path / text)
        run = opened(tmp_path, train=(str(tmp_path / text), made("a.jsonl", "1")), valid=str(tmp_path / text))
        hashes.append([run.hashes(split) for split in ("train", "valid")])
        assert [len(of) for of in hashes[-1]] == [2, 1] and hashes[-1][0][0]["sha256"] != hashes[-1][1][0]["sha256"]
    (one, _), (two, _) = hashes[0][0], hashes[1][0]
    assert one["sha256"] != two["sha256"] and hashes[0][0][1] == hashes[1][0][1]
    assert opened(tmp_path, train=str(tmp_path / "b")).hashes("train") == [two], "whatever is read beside it"
    (named,) = opened(tmp_path, train=f"{tmp_path / 'b'}:train").hashes("train")
    assert named["sha256"] == two["sha256"]
    assert hashes[0][1][0]["sha256"] == hashes[1][1][0]["sha256"], "the same validation rows"


@pytest.mark.parametrize("option", ["--train", "--valid", "--test", "--unlabeled"])
def test_an_empty_name_is_refused(tmp_path, capsys, option):
    assert plopfast("run", option, "", "--out", tmp_path / "run") == 2
    assert f"{option[2:]}: expected the name of a file, got" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="train: expected the name of a file"):
        RunConfig(train=("a", ""))


def test_options_reach_the_reading(tmp_path, made, capsys):
    path = tmp_path / "a.csv"
    path.write_text("q,a\n1,2\n")
    options = ["--train", path, made("b.jsonl", "1"), "--columns", "prompt=q,completion=a", "--out", tmp_path / "run"]
    assert plopfast("score", *options) == 2
    assert re.search(r"b\.jsonl:1: no column 'q'", capsys.readouterr().err)


def test_rows_of_ones_own_do_not_meet_the_demos(tmp_path, made):
    """Test rows alone are enough to evaluate an adapter; nothing is trained on the demo's rows then."""
    run = opened(tmp_path, test=made("t.jsonl", "1", "2"))
    assert prompts(run, "test") == ["1", "2"] and list(run.splits) == ["test"] and not run.hashes("train")
    for split in ("train", "valid"):
        with pytest.raises(
            ConfigError, match=f"no {split} rows: the demo's do not go with .*: give --{split} FILE too"
        ):
            run.rows(split)
    run = opened(tmp_path, valid=made("v.jsonl", "3"))
    assert run.rows("test") is run.rows("valid") and list(run.splits) == ["valid", "test"]
    assert list(opened(tmp_path).splits) == ["train", "valid", "test"], "the demo"
