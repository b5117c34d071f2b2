"""Errors of the command line: one line that says what is wrong, and what was probably meant."""

import functools
import json

import pytest
from helpers import plopfast

from plopfast.cli.commands import COMMANDS
from plopfast.cli.main import main
from plopfast.cli.options import build_parser, parse, settings_of
from plopfast.cli.suggest import meant
from plopfast.support.config import RunConfig
from plopfast.support.errors import ConfigError
from plopfast.support.options import SHORT, problem_of_choice

parser_made_once = functools.cache(build_parser)


@pytest.fixture(autouse=True)
def parser_once(monkeypatch):
    """Building it takes most of the time of parsing."""
    monkeypatch.setattr("plopfast.cli.options.build_parser", parser_made_once)


def refused(capsys, *words):
    """The error that these words get, without its beginning: one line, exit code 2, and nothing else."""
    with pytest.raises(SystemExit) as stop:
        main([*words])
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out
    assert said.err.startswith("plopfast: error: ") and said.err.count("\n") == 1 and said.err.endswith("\n")
    return said.err.removeprefix("plopfast: error: ").rstrip()


SAID = {
    "trian": "no command 'trian'; did you mean train or trial?", "rnu": "no command 'rnu'; did you mean run?",
    "gen": "no command 'gen'; did you mean generate?", "r": "no command 'r'; did you mean run or report?",
    "xyz": "no command 'xyz'; plopfast --help lists the commands", "help": "no command 'help': plopfast --help lists",
    "run --rnak 3": "no option --rnak of plopfast run; did you mean --rank?",
    "run --rnak=3": "no option --rnak of plopfast run; did you mean --rank?",
    "run -lr 3": "no option -lr of plopfast run; did you mean --lr?", "run -o a": "did you mean --out",
    "run --max-st 3": "did you mean --max-steps?", "run --max 3": "did you mean --max-steps or --max-length?",
    "run --learnin-rate 3": "did you mean --learning-rate?", "run --learning 3": "did you mean --learning-rate?",
    "run --max_grad 3": "no option --max-grad of plopfast run; did you mean --max-grad-norm?",
    "run --foo": "no option --foo of plopfast run; plopfast run --help shows the options",
    "bench --shape llama-8b": "no option --shape of plopfast bench; did you mean --shapes?",
    "eval --lr 3": "plopfast eval has no option --lr; plopfast run, train, multi and grpo have it",
    "run --model-config a": "plopfast run has no option --model-config; plopfast estimate has it",
    "eval --lora-r 3": "--lora-r is --rank, which plopfast eval does not have; plopfast run, score, audit and place have it",
    "bench --learning-rate 3": "no option --learning-rate of plopfast bench; did you mean --lr?",
    "verify a --out b": "plopfast verify has no option --out; plopfast run, ",
    "run --bf16": "no option --bf16: give --dtype bfloat16 or float16", "train --warmup_steps 9": "such as --warmup 0.1",
    "run rows.jsonl": "plopfast run: expected an option, got 'rows.jsonl'; did you mean --train rows.jsonl?",
    "generate hello": "did you mean --prompt hello?", "report runs/a": "did you mean --out runs/a?",
    "info x": "did you mean --out x?", "verify a b": "plopfast verify: expected an option, got 'b'",
    "run --packing True": "got 'True': a switch takes no value, --packing is on and --no-packing is off",
    "run -- x": "plopfast run: expected an option, got '--'",
    "--verson": "no option --verson; did you mean --version?", "-x": "no option -x; plopfast --help lists the commands",
    "--rank 3 run": "--rank stands before the command: options come after it, plopfast run --rank",
    "run --rank": "argument --rank: expected one argument; plopfast run --help shows the options",
    "run --rank x": "argument --rank: invalid int value: 'x'; plopfast run --help shows the options",
    "verify": "the following arguments are required: OUT; plopfast verify --help shows the options",
    "run --dtype bf16": "argument --dtype: expected one of auto, float32, bfloat16, float16, got 'bf16'; did you mean 'bfloat16'?",
    "run --quantize 4bit": "expected one of nf4, int8, fp8, got '4bit'; did you mean 'nf4'?",
    "run --schedule cosin": "got 'cosin'; did you mean 'cosine'?", "run --init svd": "eva, got 'svd'",
    "bench --dtype half": "did you mean 'float16'?", "bench --device gpu": "expected one of auto, cpu, cuda, mps, got 'gpu'; did you mean 'cuda'?",
    "doctor --seconds 0": "argument --seconds: expected a number above 0",
}  # fmt: skip


@pytest.mark.parametrize(("line", "said"), SAID.items(), ids=[*SAID])
def test_what_is_said(line, said, capsys):
    found = refused(capsys, *line.split())
    assert said in found and found.count("did you mean") <= 1 and "usage" not in found
    if "did you mean" in found:
        assert found.endswith("?"), "what was meant is the last word"


@pytest.mark.parametrize("command", [*COMMANDS, "bench"])
def test_no_option_is_abbreviated(command, capsys):
    """What a script says must not change its meaning when an option is added, even where only one option begins so."""
    parser = build_parser()
    own = {name for action in parser.commands[command].actions() for name in action.option_strings}
    shorter = {name[:-1] for name in own if name.startswith("--")} - own
    for short in sorted(short for short in shorter if short[-1] != "-"):
        assert "did you mean --" in refused(capsys, command, short, "1"), short


@pytest.mark.parametrize(
    "words",
    [["a\nb"], ["run", "--a\nb"], ["run", "--rank", "a\nb"], ["run", "--\x1b[31m"], ["run", "a\r\nb"], ["\x1b"]],
    ids=repr,
)
def test_one_line_whatever_was_given(words, capsys):
    said = refused(capsys, *words)
    assert "\x1b" not in said and "\r" not in said


def test_long_words_are_cut(capsys):
    for words in (
        ["x" * 9999],
        ["run", "--" + "x" * 9999],
        ["run", "x" * 9999],
        ["--" + "x" * 9999],
        ["run", "--dtype", "x" * 9999],
    ):
        assert len(refused(capsys, *words)) < 300


def test_nothing_at_all_gets_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse([])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.startswith("usage: plopfast COMMAND") and not said.out


def test_what_may_be_meant():
    assert meant("xx", ["--rank"]) == "" and meant("--", ["--rank"]) == "" and meant("rank", []) == ""
    assert meant("--ra", ["--rate"], ["--rank"]) == "; did you mean --rate?", "its own names first"
    assert meant("--rank", ["--rank-of"], ["--rank"]) == "; did you mean --rank?", "a name in full before others"
    assert meant("--a", [f"--a{i}" for i in range(9)]).count("--a") == 4
    assert meant("RANK", ["--rank"]) == "; did you mean --rank?"


def test_choices_in_python_and_in_files(tmp_path):
    with pytest.raises(
        ConfigError, match="schedule: expected one of cosine, linear, constant, got 'cosin'; did you mean 'cosine'"
    ):
        RunConfig(schedule="cosin")
    (tmp_path / "a.json").write_text(json.dumps({"quantize": "4bit"}))
    with pytest.raises(ConfigError, match="got '4bit'; did you mean 'nf4'"):
        settings_of(parse(["run", "--config", str(tmp_path / "a.json")]))
    assert "did you mean" not in problem_of_choice("4bit", ["auto", "cuda"]), "only where it is a choice"
    every = {choice for item in RunConfig.__dataclass_fields__.values() for choice in item.metadata.get("choices", ())}
    assert {*SHORT.values()} <= every | {"cuda"}


def test_errors_of_settings_are_one_line_too(capsys, tmp_path):
    assert plopfast("run", "--config", tmp_path / "absent.json") == 2
    said = capsys.readouterr().err
    assert said.startswith("plopfast: error: ") and said.count("\n") == 1
