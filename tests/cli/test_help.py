"""Help texts: the basics on one screen, everything in groups with --help-all; and the versions."""

import importlib.metadata
import re
import shlex
import subprocess
import sys

import pytest

import plopfast
from plopfast.cli import help as texts
from plopfast.cli.commands import COMMANDS
from plopfast.cli.main import main
from plopfast.cli.options import build_parser, names_of, parse, settings_of

SCREEN = 40  # lines
ALL = (*COMMANDS, "bench")


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def said_by(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([*words])
    assert stop.value.code == 0
    return capsys.readouterr().out


def options_in(text):
    """The options that a help text lists, in order; not those that its sentences name."""
    return [
        name for first in re.findall(r"^  (-.*?)(?:  .*)?$", text, re.M) for name in re.findall(r"--[a-z][\w-]*", first)
    ]


@pytest.mark.parametrize("words", [[], *([name] for name in ALL)], ids=lambda words: " ".join(words) or "plopfast")
def test_the_basics_are_one_screen(words, capsys):
    text = said_by(capsys, *words, "--help")
    lines = text.splitlines()
    assert len(lines) <= SCREEN and max(map(len, lines)) < 80
    assert said_by(capsys, *words, "-h") == text
    assert not re.search(r"\n\n\n|[{}]\w*default|  \n", text)


def test_the_overview_lists_every_command_once(capsys):
    text = said_by(capsys, "--help")
    assert sorted(re.findall(r"^  ([a-z]+) +\S", text, re.M)) == sorted(ALL)
    assert "\nmore:" not in text, "give it a place in help.GROUPS"
    assert "Exit codes" in text and "--help-all" in text and "--version" in text
    whole = said_by(capsys, "--help-all")
    assert "torchrun" in whole and '{"messages"}' in whole and re.findall(r"^  [a-z]+ ", whole, re.M)


def test_a_command_without_a_group_is_listed_all_the_same(capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "odd", COMMANDS["report"])
    monkeypatch.delitem(texts.GROUPS["the usual way"], "report")
    text = said_by(capsys, "--help")
    assert re.search(r"^more:\n  report +show .*\n(    .*\n)*  odd +show ", text, re.M)
    assert {"--out", "--overwrite"} <= set(options_in(said_by(capsys, "odd", "--help")))


@pytest.mark.parametrize("command", ALL)
def test_basics_come_first_and_the_rest_is_one_word_away(command, capsys):
    text, whole = said_by(capsys, command, "--help"), said_by(capsys, command, "--help-all")
    basics = texts.basics_of(command)
    if basics.options:
        shown = re.findall(r"^  (\S+)", text.split("\nbasics:\n")[1].split("\n\n")[0], re.M)
        assert 3 <= len(shown) == len(basics.options.split()) <= 12
        shown = options_in(text)
        assert set(shown) < set(options_in(whole)) and f"plopfast {command} --help-all" in text
    assert set(options_in(text)) <= set(options_in(whole))
    assert "example: plopfast " in text and text.startswith(f"usage: plopfast {command} ")


@pytest.mark.parametrize("command", [name for name, entry in COMMANDS.items() if not entry.bare])
def test_the_whole_help_has_every_setting_in_its_group(command, capsys):
    whole = said_by(capsys, command, "--help-all")
    assert {f"--{name.replace('_', '-')}" for name in names_of(COMMANDS[command])} <= set(options_in(whole))
    assert "Exit codes" in whole
    if command == "run":
        titles = re.findall(r"^(\S.*):$", whole, re.M)
        assert {"model and device", "data", "scoring", "placement", "training"} <= set(titles)
        place = whole.split("\nplacement:\n")[1].split("\n\n")[0]
        assert options_in(place)[:2] == ["--rule", "--k"] and "--lr" not in place


def test_help_says_the_defaults(capsys):
    text = said_by(capsys, "run", "--help")
    assert re.search(r"--rank INT +LoRA rank \(default: 16\)", text) and re.search(r"\(default:\s+plop\)", text)
    assert "such as q_proj,v_proj" in " ".join(text.split()) and "highest NFN" not in text, (
        "a brief text where there is one"
    )
    whole = said_by(capsys, "run", "--help-all")
    assert "highest NFN" in whole
    assert "--packing, --no-packing" in whole and "(default: off)" in whole


def test_every_brief_text_is_of_an_option():
    named = {name for group in texts.GROUPS.values() for entry in group.values() for name in entry.options.split()}
    assert set(texts.BRIEF) <= named


@pytest.mark.parametrize("command", ALL)
def test_examples_can_be_called(command):
    words = shlex.split(texts.basics_of(command).example)
    parsed = parse([command, *words])
    assert words and (command == "bench" or settings_of(parsed))


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_help_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in ([], ["run"], ["generate"]):
        lines = said_by(capsys, *words, "--help-all").splitlines()
        longest = [line for line in lines if len(line) > min(columns, 100) and " " in line.strip()]
        assert not longest


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(word, capsys):
    line = said_by(capsys, word)
    assert line.startswith(f"plopfast {plopfast.__version__} (python 3.") and line.count("\n") == 1
    for package in ("torch", "transformers"):
        assert f"{package} {importlib.metadata.version(package)}" in line


def test_version_loads_neither_torch_nor_transformers():
    code = (
        "import sys, plopfast.cli.main as c\ntry: c.main(['-V'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_parser_answers_for_help_by_itself(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["place", "--help-all"])
    assert "random (k types drawn with the seed)" in " ".join(capsys.readouterr().out.split())
