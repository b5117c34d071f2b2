"""Commands as a whole: exit codes, flags, what they hold and let go, and what the other ranks do."""

import argparse
import dataclasses
import fcntl
import json
import os
import signal

import pytest
import torch
from safetensors.torch import save_file
from workshop import artefacts, differences

from plopfast.cli import doctor, main
from plopfast.cli.arguments import number, path, text as any_text
from plopfast.cli.commands import COMMANDS
from plopfast.cli.info import module_paths
from plopfast.support import ranks
from plopfast.support.errors import DataError, Interrupted
from plopfast.support.files import read_tensors


def with_error(monkeypatch, error, name="report"):
    def do(call):
        raise error

    monkeypatch.setitem(COMMANDS, name, dataclasses.replace(COMMANDS[name], do=do))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("odd rows"), 2, "plopfast: error: odd rows"),
        (PermissionError(13, "Permission denied", "/a/file"), 2, "/a/file: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"), (Interrupted("stopped", signal.SIGTERM), 143, "stopped"),
        (Interrupted("stopped", signal.SIGINT), 130, "stopped"),
    ],
)  # fmt: skip
def test_exit_codes(monkeypatch, tmp_path, capsys, error, code, said):
    with_error(monkeypatch, error)
    assert main.main(["report", "--out", str(tmp_path)]) == code
    assert said in capsys.readouterr().err


def test_faults_of_ours_are_not_hidden(monkeypatch, tmp_path):
    with_error(monkeypatch, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        main.main(["report", "--out", str(tmp_path)])


def test_a_command_says_how_it_ended(shop, monkeypatch):
    folder = shop.folder("placed")
    assert shop.quietly("verify", folder)[0] == 0
    (folder / "placement.json").write_text("{}")
    assert shop.quietly("verify", folder)[0] == 1
    for healthy, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(doctor, "examine", lambda *a, healthy=healthy, **k: healthy)
        assert shop.quietly("doctor", "--model", shop.model)[0] == code


def test_doctors_own_option(shop, monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "examine", lambda *a, **k: seen.append(k["seconds"]) or True)
    for words in ([], ["--seconds=0.5"]):
        shop.quietly("doctor", f"--model={shop.model}", *words)
    assert seen == [60.0, 0.5]


def is_free(folder) -> bool:
    handle = os.open(folder / ".lock", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


@pytest.mark.parametrize("word", ["--k=1", "--k=99"])
def test_a_folder_is_free_when_its_command_has_ended(shop, word):
    """Well, or with an error."""
    folder = shop.folder("placed")
    assert shop.quietly("place", word, "--overwrite", "--out", folder)[0] in (0, 2)
    assert is_free(folder)


@pytest.mark.parametrize("command", [name for name, entry in COMMANDS.items() if "overwrite" in entry.flags and name not in ("trial", "search", "run", "multi", "report", "audit", "estimate", "generate")])  # fmt: skip
def test_results_are_replaced_only_when_asked(shop, command):
    starts = {
        "data": None,
        "score": None,
        "place": "placed",
        "train": "trained",
        "grpo": "placed",
        "eval": "trained",
        "merge": "trained",
    }
    folder = shop.folder(starts[command])
    words = shop.words(command)
    if command in ("data", "score", "grpo", "eval", "merge"):
        assert shop.quietly(command, *words, "--out", folder)[0] == 0
    before = artefacts(folder)
    other = {"place": "--k=1", "score": "--seed=1", "train": "--seed=1", "grpo": "--seed=1"}.get(command)
    words = [*words, *([other] if other else [])]
    code, said = shop.quietly(command, *words, "--out", folder)
    assert code == 2 and "exists already" in said and not differences(before, artefacts(folder))
    assert shop.quietly(command, *words, "--out", folder, "--overwrite")[0] == 0
    assert differences(before, artefacts(folder)) or not other


@pytest.mark.parametrize("command", [name for name, entry in COMMANDS.items() if entry.needs_out and not entry.bare])
def test_some_commands_need_a_folder(shop, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, said = shop.quietly(command)
    assert code == 2 and "--out" in said and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", [name for name, entry in COMMANDS.items() if "resume" in entry.flags])
def test_resume_excludes_overwrite(shop, command, tmp_path):
    code, said = shop.quietly(command, "--resume", "--overwrite", "--out", tmp_path / "out")
    assert code == 2 and "--resume" in said and not (tmp_path / "out").exists()


def test_a_wrong_folder_stops_a_command_before_it_reads(shop, tmp_path):
    (tmp_path / "train.py").write_text("mine")
    for command in ("data", "score", "audit", "trial", "search"):
        code, said = shop.quietly(command, "--train", tmp_path / "gone.jsonl", "--out", tmp_path)
        assert code == 2 and str(tmp_path) in said and "gone.jsonl" not in said, command


def test_data_writes_only_where_it_is_told(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = shop.quietly("data", *shop.settings["data"])
    assert code == 0 and not [*tmp_path.iterdir()]
    assert shop.quietly("data", *shop.settings["data"], "--out", "here") == (0, said)
    assert json.loads((tmp_path / "here" / "data.json").read_text())["splits"]


@pytest.mark.parametrize("command", ["eval", "merge"])
def test_flags_of_an_adapter(shop, command):
    other = shop.folder("trained") / "adapter"
    tensors, facts = read_tensors(other / "adapter_model.safetensors", "plopfast train")
    save_file({key: value * 3 for key, value in tensors.items()}, other / "adapter_model.safetensors", facts)
    own, theirs = shop.outcome(command), shop.outcome(command, f"--adapter={other}")
    assert differences(own, theirs) == ({"eval", "eval_rows"} if command == "eval" else {"merged"})
    data = shop.settings["data"][1:] * (command == "eval")
    elsewhere = [f"--model={shop.other_model}", *data, f"--adapter={other}", "--out", shop.folder()]
    assert shop.quietly(command, *elsewhere)[0] == 2
    assert shop.quietly(command, *elsewhere, "--any-base")[0] == 0


def test_what_no_setting_is_has_limits_too():
    of_ints, of_floats = number(int, 5), number(float, 0.5)
    assert [of_ints(text) for text in ("1", "5")] == [1, 5] and of_floats("0.5") == 0.5 and of_floats("1e-9") > 0
    for parse, odd in (
        (of_ints, ("0", "6", "-1", "1.5", "x", "nan")),
        (of_floats, ("0", "0.51", "nan", "inf", "x", "-0.1")),
    ):
        for text in odd:
            with pytest.raises(argparse.ArgumentTypeError):
                parse(text)
    assert path("a/b").name == "b" and any_text("a\n\x1b") == "a\n\x1b"
    with pytest.raises(argparse.ArgumentTypeError, match="expected UTF-8 text"):
        any_text("a\udcff")
    for text in ("", "a\x1b", "\x00"):
        with pytest.raises(argparse.ArgumentTypeError):
            path(text)


def test_info_lists_modules_by_type(llama):
    rows = module_paths(llama, torch.device("cpu"), torch.float32, rank=7)
    sides = {type_: (count, shape) for count, type_, shape, _ in rows}
    assert (
        sides["gate_proj"] == (3, "32 -> 48")
        and sides["down_proj"] == (3, "48 -> 32")
        and sides["k_proj"] == (3, "32 -> 16")
    )


def test_other_ranks_take_part_only_where_they_should(monkeypatch, tmp_path):
    """Commands of rank 0 alone end at once on the others."""
    done, ended = [], []
    for name in COMMANDS:
        entry = dataclasses.replace(COMMANDS[name], do=lambda call: done.append(call.name))
        monkeypatch.setitem(COMMANDS, name, entry)
    monkeypatch.setattr(os, "_exit", ended.append)
    joined = []
    monkeypatch.setattr(ranks, "init", lambda device, timeout_s: joined.append(timeout_s))
    monkeypatch.setattr(ranks, "close", lambda: None)
    for rank in (0, 1):
        for key, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(key, str(value))
        for name, entry in COMMANDS.items():
            done.clear(), joined.clear()
            words = ["--timeout=77"] if entry.on_ranks else [str(tmp_path)] if entry.bare else [*entry.names]
            main.main([name, *words])
            assert done == ([name] if entry.on_ranks or not rank else []) and joined == ([77] if entry.on_ranks else [])
    assert set(ended) == {0}
    assert {name for name, entry in COMMANDS.items() if entry.on_ranks} == {"run", "multi", "score", "train", "eval"}
