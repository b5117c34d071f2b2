"""What each setting may be: its default, its limits from both sides, its type, and what it excludes."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from plopfast.cli.commands import COMMANDS
from plopfast.cli.options import FIELDS, names_of, parse, settings_of
from plopfast.run.run import resolve
from plopfast.support import machine
from plopfast.support.config import FREE, RunConfig
from plopfast.support.devices import device_for, dtype_for
from plopfast.support.errors import ConfigError
from plopfast.support.options import fits
from plopfast.support.settings_file import load_settings

ANY = 1e9
NUMBERS = {  # option: default, lowest value, whether it is allowed itself, first value that is too high
    "threads": (None, 0, False, 1025), "timeout": (1800, 0, False, ANY), "max_length": (None, 0, False, ANY),
    "seed": (0, 0, True, 2**63), "k": (3, 0, False, ANY), "rank": (16, 0, False, ANY), "score_prompts": (200, 0, False, ANY),
    "confidence": (0.95, 0, True, 1), "alpha": (32.0, 0, False, ANY), "cap": (None, 0, True, ANY),
    "batch_tokens": (None, 0, False, ANY), "batch_rows": (None, 0, False, ANY), "accumulate": (1, 0, False, ANY),
    "dropout": (0.0, 0, True, 1), "ema": (0.0, 0, True, 1), "lr": (1e-3, 0, False, 1e38), "warmup": (0.1, 0, True, 1),
    "lora_plus": (1.0, 0, False, ANY), "weight_decay": (0.0, 0, True, ANY), "clip": (1.0, 0, True, ANY),
    "neftune": (0.0, 0, True, ANY), "max_steps": (None, 0, False, ANY), "epochs": (None, 0, False, ANY),
    "finalists": (None, 0, False, ANY), "eval_every": (None, 0, False, ANY), "eval_rows": (128, 0, False, ANY), "patience": (3, 0, False, ANY),
    "unlabeled_share": (0.0, 0, True, 1), "save_every": (None, 0, False, ANY), "keep": (2, 0, False, ANY),
    "search_trials": (20, 0, False, ANY), "mlp_rows": (None, 0, False, ANY), "resident_share": (0.0, 0, True, 1),
    "generations": (8, 1, False, ANY), "prompts": (4, 0, False, ANY), "completion_length": (256, 0, False, ANY),
    "temperature": (None, 0, True, ANY), "max_new_tokens": (256, 0, False, ANY), "top_p": (1.0, 0, False, math.nextafter(1, 2)), "beta": (0.0, 0, True, ANY),
}  # fmt: skip
CHOICES = {
    "backend": "auto torch triton fused lora-first", "dtype": "auto float32 bfloat16 float16", "parallel": "ddp fsdp",
    "bad_rows": "error skip", "learn": "assistant last all", "long": "error skip cut", "init": "kaiming gaussian orthogonal eva",
    "score_tokens": "all prompt completion system user assistant tool", "baseline": "closed-form monte-carlo",
    "compat": "official", "optimizer": "adamw adamw8bit", "keep_best": "device cpu", "embedding": "device cpu", "quantize": "nf4 int8 fp8", "ranks": "equal proportional", "granularity": "type module", "schedule": "cosine linear constant",
    "nonfinite": "stop skip",
}  # fmt: skip
TEXTS = {
    "model": None, "device": "auto", "train": None, "valid": None, "test": None, "unlabeled": None, "columns": None,
    "rule": "plop", "budget": None, "log_to": "none", "arms": "plop,plop-inverse,attn,mlp,all", "lrs": "5e-4,1e-3,2e-3",
    "seeds": "0,1,2", "general": None, "must_keep": None, "fit": None, "model_config": None, "reward": None,
}  # fmt: skip
SWITCHES = {
    "allow_overlap": False, "skip_first": False, "rslora": False, "dora": False, "full": False, "packing": False, "checkpointing": False,
    "offload": False, "compile": False, "liger": False, "quantize_head": False, "stream": False,
}  # fmt: skip
FIRST = {"compat": None, "quantize": None}  # the default of a choice is its first one, but here
NEEDS = {"cap": {"granularity": "module", "budget": "9M"}, "granularity": {"budget": "9M"}, "ranks": {"budget": "9M"},
         "unlabeled_share": {"unlabeled": "a.txt"}, "quantize_head": {"quantize": "nf4"}, "resident_share": {"stream": True}}  # fmt: skip
ROWS = ("train", "valid", "test")


def made(name, value, **more):
    return getattr(RunConfig(**{name: value, **NEEDS.get(name, {}), **more}), name)


def refused(name, value):
    with pytest.raises(ConfigError, match=name):
        made(name, value)


def test_every_setting_is_here():
    assert {*NUMBERS, *CHOICES, *TEXTS, *SWITCHES} == {*FIELDS}


@pytest.mark.parametrize("name", FIELDS)
def test_defaults(name):
    of_choice = CHOICES.get(name, "").split()[:1]
    expected = (
        NUMBERS[name][0]
        if name in NUMBERS
        else ({**TEXTS, **SWITCHES, **{n: v for n in [name] for v in of_choice}, **FIRST})[name]
    )
    found = getattr(RunConfig(), name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("name", NUMBERS)
def test_limits_of_numbers(name):
    default, low, itself, high = NUMBERS[name]
    whole = fits(FIELDS[name].type, 1) and not fits(FIELDS[name].type, 0.5)
    above, below = (low + 1, high - 1) if whole else (math.nextafter(low, 1), math.nextafter(high, 0))
    for value in (above, int(below) if whole else below):
        assert made(name, value) == value
    for value in (-1, -math.inf, math.inf, math.nan, high if not whole else int(high)):
        refused(name, value)
    if itself:
        assert made(name, low) == low
    else:
        refused(name, low)
    for odd in (True, "1", [1]):
        refused(name, odd)
    if whole:
        refused(name, 1.5)
    if default is not None:
        refused(name, None)


def test_a_whole_number_is_a_float():
    assert RunConfig(alpha=8, clip=1).alpha == 8


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    known = CHOICES[name].split()
    for value in known:
        assert made(name, value) == value
    for odd in (f"{known[0]}x", known[0].upper(), 1, True):
        refused(name, odd)
    if RunConfig.__dataclass_fields__[name].default is not None:
        refused(name, None)


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name):
    assert made(name, True) is True and made(name, False) is False
    for odd in (1, 0, "yes", None):
        refused(name, odd)


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name):
    assert made(name, "a") == "a"
    for odd in ("\x1b", "a\x1b", "a\nb", "\x7fa", "a\x85", "a\udcff", 3, True):
        refused(name, odd)
    if name == "budget":
        assert made(name, "") == "", "which takes back the budget of a folder"
    else:
        refused(name, "")
    if name in ROWS:
        assert made(name, ("a", "b")) == ("a", "b")
        for odd in (("a", ""), ("a", "b\x1b"), ("a", 3), ()):
            refused(name, odd)
    else:
        refused(name, ("a", "b"))


CONTRADICTIONS = [
    {"compat": "official", "score_tokens": "user"}, {"compat": "official", "skip_first": True},
    {"embedding": "cpu", "full": True}, {"embedding": "cpu", "parallel": "fsdp"}, {"mlp_rows": 8, "compile": True}, {"mlp_rows": 8, "parallel": "fsdp"}, {"max_steps": 3, "epochs": 1.0}, {"packing": True, "neftune": 5.0}, {"full": True, "parallel": "fsdp"},
    {"full": True, "lora_plus": 4.0}, {"full": True, "dropout": 0.1}, {"full": True, "rslora": True}, {"full": True, "dora": True}, {"full": True, "init": "gaussian"},
    {"granularity": "module"}, {"ranks": "proportional"}, {"cap": 1, "budget": "9M"}, {"unlabeled_share": 0.5},
    {"fit": "6GB", "parallel": "fsdp"},
    {"stream": True, "compile": True}, {"stream": True, "parallel": "fsdp"}, {"stream": True, "full": True},
    {"resident_share": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("given", CONTRADICTIONS, ids=lambda given: " ".join(given))
def test_what_contradicts_itself(given):
    with pytest.raises(ConfigError):
        RunConfig(**given)
    if len(given) == 2 and "budget" not in given:
        for name, value in given.items():
            assert made(name, value) == value, "each alone is fine"


def test_cap_0_contradicts_nothing():
    assert RunConfig(cap=0).cap == 0


def test_what_may_change_at_resume():
    names = {"device", "embedding", "keep_best", "threads", "timeout", "allow_overlap", "checkpointing", "offload", "save_every", "keep", "log_to", "search_trials", "max_new_tokens", "top_p", "stream", "resident_share", "fit"}  # fmt: skip
    assert names == FREE


@pytest.mark.parametrize("group", ["scoring", "placing", "training"])
def test_a_group_holds_the_settings_of_its_names(group):
    other = {name: low + 1 if isinstance(low, int) and high > 1 else 0.5 for name, (_, low, _, high) in NUMBERS.items()}
    config = RunConfig(
        **{k: v for k, v in other.items() if k not in ("epochs", "cap", "unlabeled_share", "resident_share")},
        init="gaussian",
        backend="torch",
    )
    part = getattr(config, group)
    assert len(dataclasses.fields(part)) > 5
    for item in dataclasses.fields(part):
        assert getattr(part, item.name) == getattr(config, item.name)


def test_a_file_of_settings(tmp_path):
    file = tmp_path / "a.json"
    for value in ({"train": ["a", "b"], "rank": 3}, {"settings": {"train": ["a", "b"], "rank": 3}}):
        file.write_text(json.dumps(value))
        assert load_settings(file) == {"train": ("a", "b"), "rank": 3}
    for value in (
        {"rnak": 3},
        {"settings": {"rank": 3, "odd": 1}},
        {"rank": "3"},
        {"rslora": 1},
        {"dora": 1},
        {"train": ["a", 3]},
        [1],
        3,
    ):
        file.write_text(json.dumps(value))
        with pytest.raises(ConfigError, match="a.json"):
            load_settings(file)


@pytest.mark.parametrize("name", [*ROWS, "unlabeled", "general", "must_keep", "model"])
def test_files_are_the_same_from_every_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{}")
    assert getattr(resolve(RunConfig(**{name: "a.jsonl"})), name) == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize("command", [name for name, entry in COMMANDS.items() if "train" in names_of(entry)])
def test_rows_come_in_several_files(command):
    for split in {*ROWS} & {*names_of(COMMANDS[command])}:
        assert list(
            getattr(settings_of(parse([command, *COMMANDS[command].names, f"--{split}", "a", "b"])), split)
        ) == ["a", "b"]


@pytest.mark.parametrize("command", [name for name, entry in COMMANDS.items() if names_of(entry)])
def test_switches_have_two_sides(command):
    for name in {*SWITCHES} & {*names_of(COMMANDS[command])}:
        option = name.replace("_", "-")
        for word, value in ((f"--{option}", True), (f"--no-{option}", False)):
            config = parse([command, *COMMANDS[command].names, word])
            assert getattr(config, name) is value


def test_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(machine, "has_bfloat16", lambda: False)
    cpu = torch.device("cpu")
    assert device_for("cpu") == cpu
    for odd in ("meta", "cuda:99", "nonsense"):
        with pytest.raises(ConfigError, match=odd):
            device_for(odd)
    for name in ("float32", "bfloat16", "float16"):
        assert dtype_for(name, cpu) == getattr(torch, name)
    assert (
        dtype_for("auto", cpu)
        == dtype_for("auto", cpu, full=True)
        == dtype_for("float32", cpu, full=True)
        == torch.float32
    )
    for name in ("bfloat16", "float16"):
        with pytest.raises(ConfigError, match=name):
            dtype_for(name, cpu, full=True)


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_where_the_cpu_multiplies_in_it_but_not_for_full_training(has, monkeypatch):
    monkeypatch.setattr(machine, "has_bfloat16", lambda: has)
    cpu = torch.device("cpu")
    assert dtype_for("auto", cpu) == (torch.bfloat16 if has else torch.float32)
    assert dtype_for("auto", cpu, full=True) == dtype_for("float32", cpu) == torch.float32
    assert dtype_for("auto", torch.device("meta")) == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_half_precision_where_the_gpu_has_it_but_not_for_full_training(supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    gpu = torch.device("cuda")
    assert dtype_for("auto", gpu) == (torch.bfloat16 if supported else torch.float32)
    assert dtype_for("auto", gpu, full=True) == torch.float32


def test_the_demos_settings_are_the_demos():
    assert (resolve(RunConfig()).max_steps, resolve(RunConfig()).batch_tokens) == (60, 160)
    assert resolve(RunConfig(max_steps=5, batch_tokens=7)).max_steps == 5
    assert resolve(RunConfig(epochs=2.0)).max_steps is None
    mine = resolve(RunConfig(train="a.jsonl"))
    assert (mine.max_steps, mine.batch_tokens) == (None, None)
