"""Every setting is handed on: what the command line, a file or Python gives reaches the public functions unchanged.

A command is called with another value for everything that goes together. Meanwhile the public functions note what they
get: wherever one takes a setting, it must be the one that was given, and every setting must get somewhere.
"""

import dataclasses
import functools
import inspect
import json
from pathlib import Path

import pytest
import yaml
from promises import PROMISES, flag, name_of, words_of
from workshop import modules

from plopfast.cli import bench, bench_command, bench_train, doctor, options as command_line
from plopfast.cli.commands import COMMANDS
from plopfast.cli.info import module_paths
from plopfast.cli.options import FIELDS, names_of, parse, settings_of
from plopfast.data.batches import batches_of
from plopfast.data.labels import tokenize
from plopfast.data.rows import read_rows
from plopfast.integrations.grpo import grpo
from plopfast.lora.injection import inject
from plopfast.lora.peft_files import load_adapter
from plopfast.models.generating import generate
from plopfast.models.loading import load_model
from plopfast.placing.place import place
from plopfast.scoring.nfn import score
from plopfast.support import ranks
from plopfast.support.config import RunConfig, StepSettings
from plopfast.training.estimate import Estimate, estimate
from plopfast.training.trainer import Trainer

FUNCTIONS = (
    batches_of, generate, tokenize, grpo, read_rows, inject, load_adapter, load_model, place, score, estimate, module_paths, Trainer.__init__,
    doctor.examine, ranks.init,
)  # fmt: skip
NAMES = {  # of parameters that are settings, or only sound like one ("")
    "batches_of": {"tokens": "score_tokens"}, "init": {"timeout_s": "timeout"}, "score": {"batch_tokens": ""},
    "generate": {"prompts": "", "batch_tokens": "", "stream": ""},
}  # fmt: skip
SHOULD_DIFFER = {  # what varies on purpose: the arms and seeds of a trial, what a search tries, an estimate's other rules
    "trial": {"rule", "lr", "seed", "budget", "rank"},
    "search": {"rule", "lr", "rank", "alpha", "init", "confidence", "log_to"},
    "run place": {"rule"},
    "estimate": {"rule"},
    "audit": {"score_tokens", "skip_first", "seed", "confidence", "k", "backend", "init", "dropout"},
    "info load_model": {"dtype"},
    **{
        f"{name} generate": {"max_new_tokens", "temperature", "seed"} for name in ("run", "eval")
    },  # as trainings are compared
}
INDIRECT = {
    "score": {"rule", "rank", "init"},
    "audit": {"rank"},
    "place": {"init"},
    "grpo": {"eval_rows"},
}  # they decide other arguments
APART = {  # what is seen elsewhere: in the rows, the folder, the model, or only on several ranks
    "model", "device", "threads", "parallel", "train", "valid", "test", "unlabeled", "unlabeled_share", "columns", "allow_overlap",
    "max_length", "score_prompts", "compat", "full", "epochs", "budget", "granularity", "cap", "ranks", "packing", "offload",
    "compile", "liger", "log_to", "arms", "lrs", "seeds", "finalists", "general", "search_trials", "nonfinite", "bad_rows", "save_every", "keep",
    "model_config", "fit", "reward", "must_keep",
}  # fmt: skip
TOGETHER = sorted({*FIELDS} - APART)
SHORT = {  # in place of long work
    "examine": lambda *_: True,
    "estimate": lambda _, placements, *__: [Estimate(name, [], 1, *[1.0] * 6) for name in placements],
}
INSIDE: list[str] = []  # the public functions at work


def words(command: str) -> list[str]:
    own = {"backend": "--backend=torch", "init": "--init=gaussian"}
    return [own.get(name, PROMISES[name][0].other) for name in TOGETHER if name in names_of(COMMANDS[command])]


@pytest.fixture
def noted(monkeypatch):
    """What the public functions were called with, by name."""
    calls: list[tuple[str, dict]] = []
    for function in FUNCTIONS:
        monkeypatch_everywhere(monkeypatch, function, calls)
    return calls


def monkeypatch_everywhere(monkeypatch, function, calls):
    signature, name = inspect.signature(function), function.__name__

    def noting(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if not INSIDE:  # what a public function calls itself is its own matter
            calls.append((name, dict(bound.arguments)))
        INSIDE.append(name)
        try:
            return SHORT[name](*args) if name in SHORT else function(*args, **kwargs)
        finally:
            INSIDE.pop()

    if name == "__init__":
        monkeypatch.setattr(Trainer, name, noting)
        return
    for module in modules():
        for key, value in list(vars(module).items()):
            if value is function:
                monkeypatch.setattr(module, key, noting)


def settings_in(name: str, given: dict) -> dict:
    """The settings among a call's arguments, those inside a group of settings too."""
    found = {}
    for key, value in given.items():
        if isinstance(value, StepSettings):
            found |= {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        elif (key := NAMES.get(name, {}).get(key, key)) in FIELDS and key != "train":
            found[key] = str(value).removeprefix("torch.") if key == "dtype" else value
    return found


STARTS = {
    "generate": "trained",
    "score": "scored",
    "place": "scored",
    "estimate": "trained",
    "train": "trained",
    "eval": "trained",
}


@pytest.mark.parametrize(
    "command",
    [
        *STARTS,
        "audit",
        "run",
        "grpo",
        "info",
        "doctor",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("trial", "search")),
    ],
)
def test_every_setting_is_handed_on(shop, noted, command):
    entry = COMMANDS[command]
    own = {flag(name) for name in names_of(entry)}
    out = [] if command in ("info", "doctor") else ["--out", str(shop.folder(STARTS.get(command)))]
    more = {
        "trial": ["--arms=plop,plop-inverse", "--lrs=0.01"],
        "search": ["--search-trials=1"],
        "grpo": shop.grpo[:3],
    }.get(command, [])
    needed = [*shop.settings["data"], *words(command), *more]
    options = [*(word for word in needed if word.partition("=")[0].replace("--no-", "--") in own), *out]
    options += ["--overwrite"] * (command in STARTS)
    options += ["--prompt=finch"] * (command == "generate")
    wanted = dataclasses.asdict(settings_of(parse([command, *options])))
    noted.clear()  # the stages before, where nobody had made them yet
    code, said = shop.quietly(command, *options)
    assert code == 0, said
    seen = set()
    for name, arguments in noted:
        found = settings_in(name, arguments)
        seen |= found.keys()
        wrong = {key: value for key, value in found.items() if key not in APART and value != wanted[key]}
        varied = SHOULD_DIFFER.get(command, set()) | SHOULD_DIFFER.get(f"{command} {name}", set())
        assert not wrong.keys() - varied, f"{name} got {wrong}"
    assert {*names_of(entry)} & {*TOGETHER} <= seen | INDIRECT.get(command, set())


@pytest.fixture(autouse=True)
def parser_once(monkeypatch):
    """Building it takes most of the time of parsing."""
    monkeypatch.setattr(command_line, "build_parser", functools.cache(command_line.build_parser))


def plain_values(config: RunConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize("command", [name for name, entry in COMMANDS.items() if names_of(entry)])
def test_an_option_is_the_setting_of_its_name(command, shop, tmp_path):
    """On the command line and in a file; all others stay as they were."""
    file = tmp_path / "settings.json"
    for name in names_of(COMMANDS[command]):
        possible = [p for p in PROMISES[name] if {*p.also.split()} == {*words_of(command, p.also)}] or PROMISES[name]
        words = [*words_of(command, possible[0].also), possible[0].other]
        given = [word.format(shop=shop) for word in words]
        changed = {name_of(word) for word in given}
        named = COMMANDS[command].names
        found = settings_of(parse([command, *named, *given]))  # none is refused
        plain = RunConfig()
        differ = {
            item.name for item in dataclasses.fields(plain) if getattr(plain, item.name) != getattr(found, item.name)
        }
        assert differ == changed
        file.write_text(json.dumps({name: getattr(found, name) for name in changed}))
        assert plain_values(settings_of(parse([command, *named, "--config", str(file)]))) == plain_values(found)
        file.with_suffix(".yaml").write_text(yaml.safe_dump(json.loads(file.read_text())))
        assert settings_of(parse([command, *named, "--config", str(file.with_suffix(".yaml"))])) == settings_of(
            parse([command, *named, "--config", str(file)])
        )


@pytest.mark.parametrize("command", [name for name, entry in COMMANDS.items() if "rank" in names_of(entry)])
def test_what_is_given_last_counts(command, tmp_path):
    kept, file = tmp_path / "config.json", tmp_path / "file.json"
    kept.write_text(
        json.dumps({"plopfast": "config", "settings": {"rank": 5, "alpha": 7.0, "seed": 4, "max_steps": 9}})
    )
    file.write_text(json.dumps({"rank": 6, "seed": 3}))
    found = settings_of(parse([command, "--out", str(tmp_path), "--config", str(file), "--rank", "2"]))
    assert (found.rank, found.seed) == (2, 3)
    assert found.alpha == (RunConfig().alpha if command == "run" else 7.0), "a new run asks nobody"
    if command == "run":
        assert settings_of(parse(["run", "--resume", "--out", str(tmp_path)])).alpha == 7.0
    if "epochs" in names_of(COMMANDS[command]) and command != "run":
        found = settings_of(parse([command, "--out", str(tmp_path), "--epochs", "2"]))
        assert (found.epochs, found.max_steps) == (2.0, None)


BENCH = {  # option: other value, the parameter that it reaches
    "--shapes=smollm2": "shapes", "--dtype=float16": "dtype", "--repeats=7": "repeats", "--seconds=9": "budget_s",
    "--dry": "dry", "--overwrite": "overwrite", "--out=elsewhere": "out",
}  # fmt: skip
BENCH_TRAIN = {
    "--model=other": "model", "--data=more.jsonl": "data", "--dtype=bfloat16": "dtype", "--device=cpu": "device",
    "--rank=7": "rank", "--lr=0.5": "lr", "--batch-rows=3": "batch_rows", "--max-steps=9": "max_steps", "--repeats=7": "repeats",
    "--seconds=9": "budget_s", "--overwrite": "overwrite", "--out=elsewhere": "out",
}  # fmt: skip


@pytest.fixture
def asked(shop, monkeypatch):
    """A function of words: which function a bench calls, and with what."""

    def call(*words):
        got = []
        for module, name in (bench, "run"), (bench, "tune"), (bench_train, "run"):
            function = getattr(module, name)
            signature, whole = inspect.signature(function), f"{module.__name__.rpartition('.')[2]}.{name}"

            def noting(*args, _name=whole, _signature=signature, **kwargs):
                bound = _signature.bind(*args, **kwargs)
                bound.apply_defaults()
                got.append({"function": _name, **bound.arguments})
                return [], ""

            monkeypatch.setattr(module, name, noting)
        code, said = shop.quietly("bench", *words)
        monkeypatch.undo()
        assert code == 0, said
        return got[0]

    return call


def differ(plain, other):
    return {key for key in plain.keys() | other.keys() if plain.get(key) != other.get(key)}


@pytest.mark.parametrize("option", BENCH_TRAIN)
def test_bench_train_hands_its_options_on(asked, option):
    plain, other = (asked("--train", "--out=here", *more) for more in ([], [option]))
    assert plain["repeats"] == 3 and plain["dtype"] == "auto"
    assert plain["function"] == "bench_train.run" and differ(plain, other) == {BENCH_TRAIN[option]}
    words = option.partition("=")[2]
    given = other[BENCH_TRAIN[option]]
    assert (
        words in ("", *(str(one) for one in (given if isinstance(given, list) else [given]))) or float(words) == given
    )


@pytest.mark.parametrize("words", ["--train --tune", "--train --dry", "--train --shapes=smollm2", *bench_command.TRAIN])
def test_options_of_another_bench_are_refused(shop, words):
    words = words if words.startswith("--") else f"--{words.replace('_', '-')}=" + {"device": "cpu"}.get(words, "3")
    code, said = shop.quietly("bench", *words.split())
    assert code == 2 and words.split()[-1].partition("=")[0] in said and "--train" in said


@pytest.mark.parametrize("option", [*BENCH, "--model={shop.model}", "--tune"])
def test_bench_hands_its_options_on(shop, asked, option):
    plain, other = asked("--out=here"), asked("--out=here", option.format(shop=shop))
    changed = differ(plain, other)
    assert plain["repeats"] == 30 and plain["dtype"] == "bfloat16"
    if option == "--tune":
        assert other["function"] == "bench.tune" and not {"shapes", "dtype", "dry"} & changed
    elif option.startswith("--model"):
        assert changed == {"shapes"} and {(32, 48), (48, 32), (32, 16)} <= set(other["shapes"])
        assert (16, 32) not in other["shapes"], "(in, out)"
    else:
        assert changed == {BENCH[option]}
        value = option.partition("=")[2] or "True"
        assert str(other[BENCH[option]]) in (value, f"{value}.0")
    assert not Path("elsewhere").exists()
