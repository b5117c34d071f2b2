"""What no option takes, whether it comes from Python, a file or the command line."""

import json

import pytest

from plopfast.cli.options import build_parser, parse, settings_of
from plopfast.support.config import RunConfig, TrainConfig
from plopfast.support.devices import device_for
from plopfast.support.errors import ConfigError, FileError
from plopfast.support.settings_file import load_settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rank", 4.7, "expected int, got 4.7"), ("rank", "4", "expected int, got '4'"), ("rank", True, "expected int, got True"),
        ("rank", 0, "above 0"), ("max_steps", 10**30, r"below 1e\+09"), ("max_steps", 10**5000, "thousands of digits"),
        ("lr", float("inf"), "above 0 and below"), ("lr", float("nan"), "above 0"), ("seed", -1, "at least 0"),
        ("threads", 3000, "below 1025"), ("batch_tokens", 10**18, "below"), ("lr", None, "expected float"),
        ("model", "", "leave the option out"), ("device", "", "leave the option out"), ("columns", "", "leave the option out"),
        ("arms", "", "leave the option out"), ("log_to", "", "leave the option out"), ("train", "", "name of a file"),
        ("train", ("a", ""), "name of a file"), ("train", 3, "a string or a list of strings"),
        ("model", "a\x1b[31m", r"without control characters, got 'a\\x1b\[31m'"), ("model", "a\x00b", "control"),
        ("valid", ["a\x00b"], "control"), ("train", "\udcff.jsonl", r"UTF-8 text .* '\\udcff.jsonl'"), ("train", ("a", "b\n"), "control"),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else "",
)  # fmt: skip
def test_refused(name, value, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**{name: value})
    if name == "max_steps" or value != value or isinstance(value, float):
        return
    (tmp_path / "config.json").write_text(json.dumps({name: value}))
    with pytest.raises(Exception, match="") as caught:
        RunConfig(**load_settings(tmp_path / "config.json"))
    assert type(caught.value).__name__ in ("ConfigError", "FileError")


def test_taken():
    RunConfig(budget="", lr=1, train=["a", "b"], test="c", threads=1024)
    TrainConfig(max_steps=10**9 - 1, lr=1e30)


@pytest.mark.parametrize(
    "line",
    ["run --out=", "train --config=", "eval --adapter=", "doctor --seconds nan", "doctor --seconds -1", "doctor --seconds inf",
     "run --out=--", "train --clip=--", "eval --adapter=--", "run --train=--", "bench --seconds nan", "bench --repeats 0", "bench --repeats -1", "bench --out=", "run --out a\udcff", "bench --repeats 1e9"],
)  # fmt: skip
def test_arguments_that_are_refused(line, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(line.split(" "))
    assert caught.value.code == 2 and "expected" in capsys.readouterr().err


def test_arguments_that_are_taken():
    parsed = build_parser().parse_args(["doctor", "--seconds", "0.5"])
    assert parsed.seconds == 0.5 and settings_of(build_parser().parse_args(["run", "--rank", "3"])).rank == 3


@pytest.mark.parametrize("command", ["info", "doctor"])
def test_settings_of_a_folder_that_is_not_there(command, tmp_path):
    with pytest.raises(FileError, match="config.json: no such file"):
        settings_of(parse([command, "--out", str(tmp_path / "absent")]))


def test_a_device_without_numbers():
    with pytest.raises(ConfigError, match="device 'meta' cannot be used"):
        device_for("meta")
