"""The schema names the field, what it holds and what was expected; what is written can be read."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from plopfast.support import files
from plopfast.support.errors import FileError
from plopfast.support.schema import Count, Positive, Size, checked


@dataclass(frozen=True)
class Thing:
    modules: dict[str, tuple[Size, Positive]]
    count: Count = 0
    words: list[str] = field(default_factory=list)


GOOD = {"modules": {"a.b": [4, 8]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": {"a.b": [4.7, 8]}}, r'modules\["a.b"\]\[0\]: expected a valid integer.*, got 4.7; make it anew'),
        ({"modules": {"a.b": ["4", 8]}}, "expected a valid integer, got '4'"),
        ({"modules": {"a.b": [True, 8]}}, "expected a valid integer, got True"),
        ({"modules": {"a.b": [0, 8]}}, "expected a number greater than or equal to 1, got 0"),
        ({"modules": {"a.b": [4, -1]}}, r"\[1\]: expected a number greater than 0, got -1"),
        ({"modules": {"a.b": [4, "x"]}}, "expected a valid number, got 'x'"),
        ({"modules": {"a.b": [4]}}, r"\[1\]: is missing"),
        ({"modules": []}, "modules: expected an object, got "),
        ({"count": 10**19}, "count: "),
        ({"words": ["x" * 999, 1]}, r"words\[1\]: expected a valid string, got 1"),
        ({"new": 1}, "new: unknown field, got 1"),
    ],
    ids=str,
)
def test_what_does_not_fit(change, message):
    with pytest.raises(FileError, match=f"^x.json: .*{message}"):
        checked(Thing, GOOD | change, Path("x.json"), "make it anew")


def test_what_fits():
    assert checked(Thing, GOOD, Path("x"), "") == Thing({"a.b": (4, 8.0)})
    assert checked(Thing, GOOD | {"new": 1}, Path("x"), "", more=True) == Thing({"a.b": (4, 8.0)})
    with pytest.raises(FileError, match="^x: modules: is missing; anew$"):
        checked(Thing, {}, Path("x"), "anew")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "more than 100 deep"), ("9" * 5000, "digits"), ('{"a": 1, "a": 2}', "comes twice"),
        ("[NaN]", "NaN is not JSON"), ("[1e999]", "too large"), ('"\\ud800"', "surrogate"), ("", "not valid JSON"),
    ],
    ids=lambda text: text[:9],
)  # fmt: skip
def test_json_that_is_none(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError, match=rf"a\.json: .*{message}"):
        files.read_json(tmp_path / "a.json", "plopfast")


def test_what_is_written_can_be_read(tmp_path):
    """Numbers that are not finite are null, and half a character a question mark."""
    path = tmp_path / "a.json"
    files.write_json(path, {"loss": math.nan, "best": [math.inf, 1.5], "name": "\udcff", "pair": (1, 2)})
    assert files.read_json(path, "x") == {"loss": None, "best": [None, 1.5], "name": "?", "pair": [1, 2]}
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("read", [files.read_json, files.read_json_lines, files.read_tensors])
def test_pipes_and_folders_are_no_files(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "pipe"), (tmp_path, "folder"), (Path("/dev/zero"), "device")):
        with pytest.raises(FileError, match=f"{path}: expected a file, got a .*{what}"):
            read(path, "plopfast")


def test_files_of_another_kind(tmp_path):
    files.write_json(tmp_path / "a.json", {"plopfast": "scores"})
    with pytest.raises(FileError, match="expected a file of the kind 'placement', got 'scores'"):
        files.read_kind(tmp_path / "a.json", "placement", "plopfast place")
    for value in ([], {}, {"plopfast": {}}):
        files.write_json(tmp_path / "a.json", value)
        with pytest.raises(FileError, match="expected a file of the kind"):
            files.read_kind(tmp_path / "a.json", "placement", "plopfast place")
