"""Options by the names that other tools have for them."""

import functools
import json
import re

import pytest
import torch
from helpers import plopfast
from safetensors.torch import load_file

from plopfast.cli.aliases import MEANINGS, options_in, spelled
from plopfast.cli.commands import COMMANDS
from plopfast.cli.options import build_parser, names_of, parse, settings_of
from plopfast.support.aliases import ALIASES
from plopfast.support.config import TYPES

VALUES = {  # setting -> words of its own option, where the type does not say enough
    "model": "m", "train": "a b", "valid": "a", "test": "a", "rule": "q_proj", "quantize": "nf4", "schedule": "cosine",
    "optimizer": "adamw8bit", "log_to": "wandb", "dropout": "0.25", "warmup": "0.25",
}  # fmt: skip
WORDS = {  # of names whose values have other words
    "load_in_4bit": ("", "nf4"), "load_in_8bit": ("true", "int8"), "lora_target_linear": ("True", "all"),
    "target_modules": ("q_proj v_proj", "q_proj,v_proj"), "lora_target": ("all-linear", "all"),
    "lr_scheduler_type": ("constant_with_warmup", "constant"), "optim": ("adamw_bnb_8bit", "adamw8bit"),
    "report_to": ("wandb tensorboard", "wandb,tensorboard"),
}  # fmt: skip
SETTINGS = {name: alias for name, alias in ALIASES.items() if alias.setting != "out"}
OF_COMMANDS = [
    (command, name)
    for command, entry in COMMANDS.items()
    for name, alias in SETTINGS.items()
    if alias.setting in names_of(entry)
]


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        parse([*words])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("plopfast: error: ") and err.count("\n") == 1
    return err


def words_of(name):
    """What follows the other name, and what follows the setting's own."""
    setting = ALIASES[name].setting
    if TYPES[setting] is bool:
        return [], []
    theirs, ours = WORDS.get(name) or [VALUES.get(setting, "3")] * 2
    return theirs.split(), ours.split()


parser_made_once = functools.cache(build_parser)


@pytest.fixture(autouse=True)
def parser_once(monkeypatch):
    monkeypatch.setattr("plopfast.cli.options.build_parser", parser_made_once)


@pytest.mark.parametrize(("command", "name"), OF_COMMANDS)
def test_a_name_sets_what_the_option_sets(command, name, tmp_path):
    theirs, ours = words_of(name)
    own = f"--{ALIASES[name].setting.replace('_', '-')}"
    wanted = settings_of(parse([command, own, *ours]))
    for option in (f"--{name}", f"--{name.replace('_', '-')}"):
        parsed = parse([command, option, *theirs])
        assert settings_of(parsed) == wanted
    if len(theirs) == 1:
        assert settings_of(parse([command, f"--{name}={theirs[0]}"])) == wanted
    assert wanted != settings_of(parse([command])) or words_of(name)[1] == [str(getattr(wanted, ALIASES[name].setting))]


def test_names_work_beside_others_and_in_files(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"lora_r": 3, "lora_alpha": 5, "max_steps": 9}))
    words = ["--lora-r", "4", "--num-epochs", "2", "--batch_tokens", "64", "--packing", "--load-in-8bit", "false"]
    found = settings_of(parse(["run", "--config", str(file), *words, "--load-in-4bit"]))
    assert (found.rank, found.alpha, found.batch_tokens, found.packing) == (4, 5, 64, True)
    assert (found.epochs, found.max_steps, found.quantize) == (2.0, None, "nf4"), "the one that is given now counts"


@pytest.mark.parametrize("option", ["--output-dir", "--output", "--output_dir"])
def test_the_run_folder(option):
    assert str(parse(["run", option, "runs/a"]).out) == "runs/a" and parse(["run"]).out is None


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--lora-r 8 --rank 8", "--lora-r and --rank both set --rank"), ("--rank=8 --lora_r=8", "--lora-r and --rank both set --rank"),
        ("--lora-r 8 --lora-rank 9", "--lora-rank both set --rank"), ("--load-in-4bit --load-in-8bit", "both set --quantize"),
        ("--load-in-4bit --quantize int8", "--load-in-4bit and --quantize both set"), ("--output a --out b", "--output and --out both set --out"),
        ("--gradient-checkpointing --no-checkpointing", "--gradient-checkpointing and --no-checkpointing both set --checkpointing"),
        ("--target-modules q_proj --rule all", "both set --rule: leave one of them out"),
    ],
)  # fmt: skip
def test_two_names_of_one_option(words, names, capsys):
    assert names in refused(capsys, "run", *words.split())


def test_the_same_name_twice_is_as_with_any_option():
    assert settings_of(parse(["run", "--lora-r", "8", "--lora-r", "9"])).rank == 9
    assert settings_of(parse(["run", "--rank", "8", "--rank", "9"])).rank == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lora-r x", "argument --lora-r: invalid int value: 'x'"), ("--learning-rate", "argument --learning-rate: expected one argument"),
        ("--load-in-4bit maybe", "argument --load-in-4bit: expected true or false, got 'maybe'"),
        ("--gradient-checkpointing 3", "expected true or false, got '3'"), ("--target-modules attn", "give --rule attn"),
        ("--lr-scheduler-type constant", "--schedule constant --warmup 0"), ("--output-dir=", "argument --output-dir: expected a name"),
        ("--lr-scheduler-type cosin", "did you mean 'cosine'"),
    ],
)  # fmt: skip
def test_what_is_refused(words, said, capsys):
    assert said in refused(capsys, "run", *words.split())


def test_a_value_stays_as_it_is():
    assert spelled(["--a_b=c_d", "x_y", "--a_b", "--", "--c_d"]) == ["--a-b=c_d", "x_y", "--a-b", "--", "--c_d"]
    assert spelled(["--no_x", "-a_b", "--what is_it", "--a_b=--c_d", "--a_b=x\ny_z"]) == [
        "--no-x",
        "-a_b",
        "--what is_it",
        "--a-b=--c_d",
        "--a-b=x\ny_z",
    ]
    assert spelled(["x--a_b", "runs/x--a_b=c_d", "--a_b=--c_d="]) == ["x--a_b", "runs/x--a_b=c_d", "--a-b=--c_d="]
    assert options_in(["--a", "b", "--c=d", "-e", "--f g", "--", "--h"]) == ["--a", "--c"]
    assert parse(["generate", "--prompt", "what is a_b", "--answers=a_b"]).answers.name == "a_b"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_names(command, capsys):
    texts = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, option])
        texts.append(capsys.readouterr().out)
    foot = " ".join(texts[0].split())
    entry = COMMANDS[command]
    offered = {
        name
        for name, alias in ALIASES.items()
        if alias.setting in names_of(entry) or (alias.setting == "out" and not (entry.bare or entry.names))
    }
    section = texts[1].partition("names from other tools that work, too:\n")[2].partition("\n\n")[0]
    listed = set(re.findall(r"--[a-z][a-z0-9-]*", section)) - {
        f"--{ALIASES[name].setting.replace('_', '-')}" for name in offered
    }
    assert listed == {f"--{name.replace('_', '-')}" for name in offered}
    assert "names from other tools that work, too, such as --" in foot or entry.bare
    assert "--num-train-epochs" not in texts[0] and len(re.findall(r"^  .*--lora-r\b", texts[0], re.M)) == 0
    assert {*MEANINGS} <= {*ALIASES}


def test_a_batch_is_explained(capsys, tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"micro_batch_size": 3}')
    for words, said in (
        (["--batch-size", "8"], "plopfast: --batch-size is --batch-rows"),
        (["--config", str(file)], f"plopfast: {file}: micro_batch_size is"),
    ):
        settings_of(parse(["train", *words]))
        assert capsys.readouterr().err.startswith(said)
        settings_of(parse(["train", *words, "--batch-tokens", "512"]))
        assert capsys.readouterr().err == "", "then the reader has thought of it"
    settings_of(parse(["train", "--batch-rows", "8", "--learning-rate", "1"]))
    assert capsys.readouterr().err == ""


def test_one_process_of_several_explains_it(capsys, monkeypatch):
    for key, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(key, str(value))
    settings_of(parse(["train", "--batch-size", "8"]))
    assert capsys.readouterr().err == ""


def test_a_run_by_the_names_of_others_is_the_same_run(base, tmp_path):
    theirs = [
        word.replace("--model", "--model_name_or_path").replace("--train", "--train_file") for word in map(str, base)
    ]
    assert plopfast("run", *base, "--rule", "q_proj,v_proj", "--lr", "0.01", "--out", tmp_path / "one") == 0
    others = ["--target-modules", "q_proj", "v_proj", "--learning_rate", "0.01", "--output_dir", tmp_path / "two"]
    assert plopfast("run", *theirs, *others) == 0
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    kept = [json.loads((tmp_path / name / "config.json").read_text())["settings"] for name in ("one", "two")]
    assert kept[0] == kept[1], "a run folder has plopfast's own names"
