"""Limits from both sides, and what happens at them: of fields and JSON, of colour, memory, locks and ranks."""

import csv
import fcntl
import io
import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from plopfast.support import machine, memory, tables
from plopfast.support.errors import FileError, nearest, shown
from plopfast.support.inputs import check_same, differences
from plopfast.support.ledger import Ledger
from plopfast.support.lock import locked
from plopfast.support.previous import Previous
from plopfast.support.progress import Work, shows_color
from plopfast.support.schema import Count, NotNegative, Positive, Share, Size, checked
from plopfast.support.secrets import masked
from plopfast.support.strict_json import DEEPEST, LONGEST_INTEGER, StrictJSON, dumps


@pytest.mark.parametrize(
    ("kind", "fit", "odd"),
    [
        (Count, [0, 1, 2**63 - 1], [-1, 2**63, 0.5, "1", True, None]), (Size, [1, 2**31 - 1], [0, 2**31, 1.5, "1"]),
        (Positive, [1e-300, 1, 2.5], [0, -1e-300, "1", None, True]), (NotNegative, [0, 0.0, 1e9], [-1e-300, "0"]),
        (Share, [0, 1, 0.5], [-1e-9, 1.0000001, "0.5"]), (str, ["a", ""], [3, None]), (list[str], [[], ["a"]], [["a", 3], "a"]),
    ],
    ids=["count", "size", "positive", "not negative", "share", "text", "texts"],
)  # fmt: skip
def test_kinds_of_fields(kind: Any, fit, odd):
    for value in fit:
        assert checked(kind, value, "here", "remedy") == value
    for value in odd:
        with pytest.raises(FileError, match=r"^here: .*; remedy$"):
            checked(kind, value, "here", "remedy")


def nested(depth: int, opening: str, closing: str) -> str:
    return opening * depth + closing * depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_the_deepest_json(opening, closing):
    for depth, fits in ((DEEPEST, True), (DEEPEST + 1, False), (100_000, False)):
        text = nested(depth, opening, closing).replace(":}", ":0}")
        if fits:
            StrictJSON().parse(text)
        else:
            with pytest.raises(ValueError, match="deep"):
                StrictJSON().parse(text)
    StrictJSON().parse(f"[{', '.join(['[]'] * 5000)}]"), "wide is not deep"


def test_a_parser_forgets_the_problem_of_the_text_before():
    parser = StrictJSON(3)
    for text in ('{"a": 1, "a": 2}', "[NaN]", "[1234]", "[1e999]", r'["\ud800"]', "[1] 2", "[1"):
        with pytest.raises(ValueError):
            parser.parse(text)
        assert parser.parse('[123, {"a": 1, "b": 1}]') == [123, {"a": 1, "b": 1}]
    assert StrictJSON().parse("1" * LONGEST_INTEGER) == int("1" * LONGEST_INTEGER)
    with pytest.raises(ValueError):
        StrictJSON().parse("1" * (LONGEST_INTEGER + 1))


def test_what_json_cannot_hold_is_null_however_deep():
    value = {"a": [math.nan, (math.inf, {"b": -math.inf})], "c": 1.5, "d": "x\ud800"}
    assert json.loads(dumps(value)) == {"a": [None, [None, {"b": None}]], "c": 1.5, "d": "x?"}
    assert json.loads(dumps({"a": 1}, indent=2)) == {"a": 1} and "\n" in dumps({"a": 1}, indent=2)


def test_colour(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for unwanted, stream, colour in (
        (None, Terminal(), True),
        ("", Terminal(), True),
        ("1", Terminal(), False),
        (None, io.StringIO(), False),
    ):
        monkeypatch.delenv("NO_COLOR", raising=False)
        if unwanted is not None:
            monkeypatch.setenv("NO_COLOR", unwanted)
        assert shows_color(stream) is colour


def test_work_that_is_not_shown_can_fail():
    with pytest.raises(ValueError), Work("w", 2, show=False) as work:
        work.skip()
        with work.piece("a"):
            raise ValueError


def test_cells():
    column = tables.Column("h", ".2f")
    assert [column.cell(value) for value in (None, True, False, "a", 1.234, 2)] == [
        "-",
        "yes",
        "no",
        "a",
        "1.23",
        "2.00",
    ]
    assert (column.aligned("1", 3), tables.Column("h").aligned("a", 3)) == ("  1", "a  ")
    table = tables.Table("", [tables.Column("a"), tables.Column("b")], [(1, 2, 3)])
    for make in (str, lambda t: list(t.cells())):
        with pytest.raises(ValueError):
            make(table)


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\ta", "\ra"])
def test_no_cell_of_a_file_is_a_formula(text, tmp_path):
    tables.Table("", [tables.Column("a", ".1f")], [(text,), (1.23456,), (None,), (-1.5,)]).write_csv(tmp_path / "a.csv")
    said = (tmp_path / "a.csv").read_bytes().decode()
    assert list(csv.reader(io.StringIO(said, newline=""))) == [["a"], [f"'{text}"], ["1.23456"], [""], ["-1.5"]]


def test_differences_of_inputs():
    assert differences({"b": 1, "a": 2, "c": 3}, {"b": 2, "a": 3, "d": 4}) == [
        "a was 2, is 3", "b was 1, is 2", "c was 3, is None", "d was None, is 4",
    ]  # fmt: skip
    digest = "0" * 64
    assert differences({"file": digest, "list": [1], "text": "a"}, {"file": "1" * 64, "list": [2], "text": "b"}) == [
        "file", "list", "text was a, is b",
    ]  # fmt: skip
    assert differences({"file": digest[:-1]}, {"file": "x"}) == [f"file was {digest[:-1]}, is x"]
    check_same({"a": 1}, {"a": 1}, "here")
    with pytest.raises(FileError, match="^here"):
        check_same({"a": 1}, {}, "here", FileError)


def test_long_values_are_cut():
    assert shown("a" * 58) == repr("a" * 58) and shown("a" * 59) == repr("a" * 59)[:60] + "..."
    assert shown(10**5000) and "abc" in nearest("abd", ("abc", "xyz")) and not nearest("q", ("abc",))


def test_the_command_line_hides_secrets(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "run", "--hf-token", "abc", "--k", "3"])
    assert machine.command() == "plopfast run --hf-token '***' --k 3"


@pytest.mark.parametrize(
    ("flags", "has"),
    [("avx512f", False), ("avx512_bf16", True), ("amx_bf16 avx", True), ("amx_bf16 avx512_bf16", True)],
)
@pytest.mark.parametrize(
    ("level", "may"), [(None, True), ("AVX512_CORE_BF16", True), ("AVX512_CORE_AMX", True), ("DEFAULT", True), ("avx2", False), ("AVX512_CORE_VNNI", False)],
)  # fmt: skip
def test_bfloat16_on_a_cpu(monkeypatch, flags, has, level, may):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    if level:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *a, **k: f"flags : {flags}\n" if str(self) == "/proc/cpuinfo" else read(self, *a, **k),
    )
    assert machine.has_bfloat16() is (has and may)


def test_memory_is_in_mib(monkeypatch):
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert 0.02 * most < memory.peak_mib() < 1.2 * most
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 3 << 20, "total": 9 << 20}))
    assert memory.free_mib(torch.device("cpu")) == 3


def held(folder: Path) -> bool:
    handle = os.open(folder / ".lock", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a reader's would not go beside a writer's
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def test_a_lock_is_taken_each_time_and_let_go(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for word in ("a" * 500, "b"):
        monkeypatch.setattr(sys, "argv", ["x", word])
        with locked(folder):
            assert held(folder) and json.loads((folder / ".lock").read_text())["command"] == f"plopfast {word}"
            with locked(folder / "inside"):
                assert not (folder / "inside" / ".lock").exists(), "the outer one holds it"
        assert not held(folder)
    with pytest.raises(ValueError), locked(folder):
        raise ValueError
    assert not held(folder)
    with locked(folder / "inside"), locked(folder):
        assert held(folder) and held(folder / "inside")


@pytest.mark.parametrize("text", ["mine", '{"a": 1}', "[3]"])
def test_a_file_of_that_name_stays(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(FileError), locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == text


@pytest.mark.parametrize("to", ["file", "folder", "nothing"])
def test_a_link_is_nobodys(tmp_path, to):
    """Whatever it leads to, under a claimed name or inside a claimed folder."""
    target = tmp_path / "own"
    if to == "folder":
        target.mkdir()
    elif to == "file":
        target.write_text("mine")
    ledger = Ledger(tmp_path / "run")
    ledger.claim({"a.json": (), "steps": ("*",)})
    (ledger.folder / "a.json").symlink_to(target)
    (ledger.folder / "steps").mkdir()
    (ledger.folder / "steps" / "b").symlink_to(target)
    assert ledger.foreign("a.json") == [ledger.folder / "a.json"]
    assert ledger.foreign("steps") == [ledger.folder / "steps" / "b"]
    for names in (["a.json"], ["steps"]):
        with pytest.raises(FileError):
            ledger.remove(names)
    assert target.exists() == (to != "nothing")


@pytest.mark.parametrize("text", ["mine\n", "{}\n", "[1]"])
def test_no_line_goes_to_a_file_of_the_users(tmp_path, text):
    (tmp_path / "history.jsonl").write_text(text)
    for act in (
        lambda ledger: ledger.add("begin", stage="score"),
        lambda ledger: ledger.claim({"a": ()}),
        Ledger.claims,
    ):
        with pytest.raises(FileError):
            act(Ledger(tmp_path))
    assert (tmp_path / "history.jsonl").read_text() == text


def test_results_that_wait_do_not_come_back_over_new_ones(tmp_path):
    for made_anew in (False, True):
        ledger = Ledger(tmp_path / f"run-{made_anew}")
        ledger.claim({"a.json": (), "steps": ("*",)}, stage="train", command="c")
        (ledger.folder / "steps").mkdir()
        for name in ("a.json", "steps/b[1]*.bin"):  # no pattern
            (ledger.folder / name).write_text("old")
        waiting = Previous(ledger)
        assert waiting.set_aside("train", {"train": ["a.json", "steps"]}) and not (ledger.folder / "a.json").exists()
        if made_anew:
            (ledger.folder / "a.json").write_text("new")
        waiting.bring_back("train")
        assert (ledger.folder / "a.json").read_text() == ("new" if made_anew else "old")
        assert (ledger.folder / "steps").exists() != made_anew
        waiting.complete("train")
        assert not (ledger.folder / "previous").exists(), "names with brackets go, too"


def test_one_word_after_a_secrets_name_is_hidden():
    assert masked(["x", "--token", "a", "b", "--k", "3"]) == "x --token '***' b --k 3"
    assert masked(["x", "--token", "--k", "3"]) == "x --token --k 3"
