"""`plopfast bench --train`: two trainings of a tiny model that differ in nothing but the library."""

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch
from helpers import build, prompted

from plopfast.cli import bench_arms as arms, bench_train
from plopfast.cli.bench_arms import Recipe
from plopfast.data.batches import collate
from plopfast.data.rows import DEMO
from plopfast.lora.injection import inject
from plopfast.lora.layer import adapters
from plopfast.support.errors import ConfigError, FileError, TrainingError

STEPS, ROWS = 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(folder):
    return {"model": folder, "rank": 4, "batch_rows": ROWS, "max_steps": STEPS, "device": "cpu"}


@pytest.fixture
def here(monkeypatch):
    """Trainings run in this process; returns the jobs."""
    jobs = []

    def run(command, **options):
        assert command[1:3] == ["-m", "plopfast.cli.bench_arms"]
        jobs.append(json.loads(Path(command[3]).read_text()))
        monkeypatch.setattr(sys, "argv", command[2:])
        arms.main()

    monkeypatch.setattr(bench_train, "subprocess", SimpleNamespace(run=run))
    return jobs


def test_both_see_the_same_and_learn_the_same(tmp_path, settings, here):
    rows, text = bench_train.run(tmp_path / "out", **settings, repeats=2)
    assert [json.loads(line) for line in (tmp_path / "out" / "bench_train.jsonl").read_text().splitlines()] == rows
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bench_train.jsonl", "history.jsonl"]
    assert [(row["repeat"], row["arm"]) for row in rows] == [
        (0, "plopfast"), (0, "peft"), (1, "peft"), (1, "plopfast"),
    ]  # fmt: skip
    assert [job["recipe"]["seed"] for job in here] == [0, 0, 1, 1]
    same = (
        "tokens",
        "loss_before",
        "modules",
        "parameters",
        "dtype",
        "device",
        "steps",
        "shortest",
        "longest",
        "rank",
        "lr",
    )
    for row in rows:
        assert {key: row[key] for key in same} == {key: rows[0][key] for key in same}
        assert row["steps"] == STEPS and row["batch_rows"] == ROWS and row["modules"] == 21
        assert row["tokens_per_s"] == row["tokens"] / row["seconds"] > 0 and row["peak_mib"] > row["above_mib"]
        assert row["loss"] < row["loss_before"]
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-3)
    assert rows[0]["loss"] != rows[1]["loss"], "the orders of rows differ"
    assert "PEFT + HF Trainer" in text and "plopfast / PEFT" in text and "of 2 repeats" in text
    with pytest.raises(FileError, match="overwrite"):
        bench_train.run(tmp_path / "out", **settings)


def test_without_an_order_both_take_the_same_steps(folder):
    """All rows in one step: then the order says nothing, and the adapters are the same to rounding."""
    model, other = build("llama"), build("llama")
    recipe = Recipe(rows=ROWS, steps=4, lr=1e-2, rank=4)
    examples = arms.rows_of([str(DEMO["train"])], arms.load_model(folder)[1], 128, ROWS)
    placement = arms.everywhere(model, recipe.rank)
    inject(model, placement)
    assert arms.plopfast_fit(model, examples, recipe)()[0] == 4
    wrapped = arms.peft_model(other, placement)
    assert arms.hf_fit(wrapped, examples, recipe, "unused")()[0] == 4
    for name, module in adapters(model).items():
        theirs = other.get_submodule(name)
        assert theirs.scaling["default"] == module.scaling
        torch.testing.assert_close(theirs.lora_A["default"].weight, module.lora_A, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(theirs.lora_B["default"].weight, module.lora_B, rtol=1e-3, atol=1e-4)
    batch = collate(examples)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-3)


def test_liger_kernel_is_in_neither(monkeypatch):
    configs, model = [], build("llama")
    monkeypatch.setattr(arms, "Trainer", lambda model, config, examples, progress: configs.append(config))
    arms.plopfast_fit(model, prompted([(1, 2)], [1]), Recipe(1, 1, 1e-3, 4))
    assert configs[0].liger is False and "use_liger_kernel" not in arms.hf_settings("unused", 1, 1e-3, 0, model)


def test_the_table_gives_medians_and_ratios_within_a_repeat():
    def row(arm, repeat, speed, peak):
        same = {
            "loss": 2.0,
            "name": "m",
            "parameters": 1e6,
            "dtype": "float32",
            "gpu": "",
            "device": "cpu",
            "rank": 4,
            "modules": 3,
        }
        told = {
            "max_steps": 1,
            "batch_rows": 1,
            "tokens": 9,
            "shortest": 9,
            "longest": 9,
            "lr": 0.1,
            "loss_before": 3.0,
        }
        return {
            **same,
            **told,
            "arm": arm,
            "repeat": repeat,
            "seconds": 1,
            "tokens_per_s": speed,
            "peak_mib": peak,
            "above_mib": 1.0,
        }

    rows = [
        row("plopfast", 0, 30.0, 50.0),
        row("peft", 0, 10.0, 100.0),
        row("peft", 1, 20.0, 100.0),
        row("plopfast", 1, 40.0, 50.0),
    ]
    lines = bench_train.table([*rows, row("plopfast", 2, 90.0, 50.0)], arms.ARMS)
    assert lines[0] == "m: 1M parameters in float32 on cpu; adapters of rank 4 on 3 modules"
    assert [line.split()[-4:] for line in lines[3:5]] == [["40", "50", "1", "2"], ["15", "100", "1", "2"]]
    assert lines[5] == "plopfast / PEFT + HF Trainer, median (lowest to highest) of 2 repeats"
    assert lines[6].split() == ["tokens/s", "2.500", "(2.000", "to", "3.000)"] and lines[7].split()[2] == "0.500"


def test_few_rows_are_taken_again(folder, tmp_path):
    tokenizer, file = arms.load_model(folder)[1], tmp_path / "two.jsonl"
    file.write_text("\n".join(DEMO["train"].read_text().splitlines()[:2]) + "\n")
    one, two, *_ = found = arms.rows_of([str(file)], tokenizer, None, 5)
    assert found == [one, two, one, two, one] and one != two


def test_memory_of_an_arm_that_does_not_fit(tmp_path, settings, here, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(arms, "hf_fit", too_much)
    rows, text = bench_train.run(tmp_path, **settings, repeats=1)
    assert rows[1]["left_out"] == "too little GPU memory" and "loss" not in rows[1]
    assert "left out: too little GPU memory" in text and "plopfast / PEFT" not in text


def test_repeats_end_when_time_is_up(tmp_path, settings, here):
    rows, text = bench_train.run(tmp_path, **settings, repeats=3, budget_s=0)
    assert len(rows) == 2 and "1 of 3 repeats: 0 s are spent" in text


def test_errors_leave_no_results(tmp_path, settings, here, monkeypatch):
    for wrong, message in (
        ({"model": str(tmp_path / "absent")}, "absent"),
        ({"data": [str(tmp_path / "absent.jsonl")]}, "absent.jsonl"),
        ({"rank": 1000}, "rank"),
        ({"dtype": "float16"}, "float16"),
    ):
        with pytest.raises(ConfigError, match=message):
            bench_train.run(tmp_path / "out", **{**settings, **wrong})
    find = bench_train.importlib.util.find_spec
    monkeypatch.setattr(
        bench_train.importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else find(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"accelerate cannot be imported: pip install 'plopfast\[hf,bench\]'"):
        bench_train.run(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_process_that_ends_early_is_an_error(tmp_path, settings, monkeypatch):
    ended = CompletedProcess([], -9, "", "")
    monkeypatch.setattr(bench_train, "subprocess", SimpleNamespace(run=lambda *_, **__: ended))
    with pytest.raises(TrainingError, match="plopfast: its process was killed by signal 9"):
        bench_train.run(tmp_path, **settings)
    ended.returncode, ended.stderr = 1, "Traceback: odd"
    with pytest.raises(TrainingError, match="ended with 1:\nTraceback: odd"):
        bench_train.run(tmp_path, **settings)


def test_a_process_sees_one_gpu(tmp_path, settings, monkeypatch):
    seen = []

    def run(command, env, **_):
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        return CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(bench_train, "subprocess", SimpleNamespace(run=run))
    for visible, wanted in (("3,1", "3"), ("", ""), (None, "0")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(TrainingError):
            bench_train.run(tmp_path, **settings)
        assert seen.pop() == wanted


@pytest.mark.slow  # two processes
def test_in_processes_of_their_own(tmp_path, settings):
    rows, _ = bench_train.run(tmp_path, **settings, repeats=1)
    assert [row["steps"] for row in rows] == [STEPS, STEPS]
