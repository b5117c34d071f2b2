"""Cases of odd options: every option of every command, alone and in pairs, with values of any kind."""

import dataclasses
import hashlib
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any, get_args

from calling import Outcome, call
from corpus import BASE, QUICK, STUDY, copy

from plopfast.cli.commands import COMMANDS
from plopfast.cli.options import names_of
from plopfast.support.config import TYPES, RunConfig

FIELDS = {item.name: item for item in dataclasses.fields(RunConfig)}
START = {
    "run": [*BASE, *QUICK, "--out", "new"], "data": BASE, "score": [*BASE, "--out", "new"],
    "audit": [*BASE, "--score-prompts", "6", "--out", "new"], "place": ["--out", "run", "--overwrite"],
    "estimate": ["--out", "run", "--overwrite"], "train": ["--out", "run", "--overwrite"],
    "eval": ["--out", "run", "--overwrite"], "report": ["--out", "run", "--overwrite"],
    "merge": ["--out", "run", "--overwrite"],
    "generate": ["--model", "model", "--prompt", "a bird", "--max-new-tokens", "2"], "info": ["--model", "model"], "trial": [*BASE, *STUDY, "--out", "new"],
    "search": [*BASE, "--rank", "2", "--search-trials", "1", "--max-steps", "1", "--out", "new"], "doctor": ["--model", "model", "--seconds", "0.1"],
}  # fmt: skip
WEIGHTS = {"run": 1, "data": 6, "score": 5, "audit": 1, "place": 6, "estimate": 1, "train": 5, "eval": 3, "report": 1, "merge": 3, "info": 1, "generate": 4}  # fmt: skip
SLOW = {"trial": 1, "search": 1, "doctor": 1}  # seconds each where they accept
ODD = (
    "", " ", "-1", "0", "1", "2", "4.7", "nan", "inf", "-inf", "1e400", "1e300", "9" * 5000, "999999999", "x", "\udcff", "a\nb",
    "a\0b", "x" * 100_000, "../..", "é", "--", "-", "=", ",", "a,b", "None", "true", "{}", "%s%n", "a?mode=memory",
    "run", "rows/train.jsonl", "rows", "pipe", "loop", "nowhere/x", "/dev/null", "mine", "model",
)  # fmt: skip
GRAMMAR = {
    "budget": ("0", "-1M", "2.5X", "1e400M", "infM", "nanMB", "match:all:r0", "match:all:r-1", "match:all:r9" + "9" * 400, "match:", "10MB", "1"),
    "rule": ("attn,,mlp", "q_proj,q_proj", "[", "(a+)+$", "random", "all", "q_proj", "plop-inverse"),
    "columns": ("prompt=prompt", "=", "prompt=", "a=b=c", "prompt=x,prompt=y", "completion=prompt"),
    "device": ("cuda:99", "cuda:-1", "cpu:7", "meta", "xla", "mps", "cuda"),
    "log_to": ("tensorboard,,", "none,none", "both", "tensorboard,none"),
    "lrs": ("0", "-1", "nan", "1e400", "1e-3,1e-3", "1e-3,", ","), "seeds": ("0,0,0", "-1,0,1", "0,1", "9" * 30, "0,1,x"),
    "arms": ("plop", "plop,plop", "x,y", "plop,attn:", "all,random"),
}  # fmt: skip
LONG = {
    "max_steps",
    "epochs",
    "search_trials",
    "threads",
    "seconds",
    "timeout",
    "accumulate",
}  # large ones are work, or wait
FREE_TEXT = ("out", "config", "adapter", "seconds", "prompt", "prompts", "answers")


def run(seed: int, corpus: Path, folder: Path, slow: bool = True) -> Outcome:
    """Runs the case `seed` in `folder`, which is made and deleted. `slow`: commands that take seconds are there too."""
    rng = random.Random(f"options {seed}")
    weights = WEIGHTS | (SLOW if slow else {})
    command = rng.choices([*weights], [*weights.values()])[0]
    argv, why = _argv(rng, command)
    place = folder / "a" / "b"  # ../.. stays within
    copy(corpus, place, ["run"])
    try:
        _beside(place)
        before = _hashes(place)
        outcome = call([command, *argv], place, why)
        after = _hashes(place)
        if not outcome.fault and (lost := [name for name, digest in before.items() if after.get(name) != digest]):
            outcome.fault = f"lost: {command} changed {lost[0]}, which it did not write"
        return outcome
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _argv(rng: random.Random, command: str) -> tuple[list[str], str]:
    """Returns arguments with one or two odd values, and why they must be refused, if they must."""
    flags = [flag for flag in COMMANDS[command].flags if flag in FREE_TEXT]
    known = [*names_of(COMMANDS[command]), "out", "config", *flags]
    names = rng.sample(known, min(len(known), rng.choice((1, 1, 2))))
    argv, why = list(START[command]), ""
    for name in names:
        if name in TYPES and TYPES[name] is bool:
            no = rng.choice(("", "no-")) if name != "compile" else "no-"  # compiling takes longer than the limit
            argv.append(f"--{no}{name.replace('_', '-')}")
            continue
        value = rng.choice(_usual(name) if rng.random() < 0.5 else ODD)
        reason = refusal(name, value)
        if name in LONG and not reason and value not in ("1", "2"):
            value = "0"
            reason = refusal(name, value)
        argv.append(f"--{name.replace('_', '-')}={value}")
        why = why or reason
    if (
        COMMANDS[command].flags
        and "overwrite" in COMMANDS[command].flags
        and rng.random() < 0.3
        and "--overwrite" not in argv
    ):
        argv.append("--overwrite")
    return argv, why


def _usual(name: str) -> tuple[str, ...]:
    """Values that are nearly right, so that what lies behind the first checks is reached too."""
    if name in GRAMMAR:
        return GRAMMAR[name]
    if name in FIELDS and FIELDS[name].metadata["choices"]:
        return tuple(FIELDS[name].metadata["choices"])
    kinds = get_args(TYPES.get(name)) or (TYPES.get(name),)
    return ("1", "2", "3", "7", "0.5", "1e-3", "64") if int in kinds or float in kinds else ODD


def refusal(name: str, text: str) -> str:
    """Says why an option's own rules do not allow a value; nothing where they do."""
    if "\0" in text or text == "--":  # argparse takes -- for the end of the options
        return ""  # no shell can give it; only a traceback would be wrong
    if name == "seconds":
        return "" if _number(text, float) > 0 and math.isfinite(_number(text, float)) else f"--seconds {text[:20]!r}"
    if name not in FIELDS:
        return (
            f"--{name} ''"
            if name == "out" and text in ("", "pipe", "loop", "rows/train.jsonl", "/dev/null", "rows", "mine")
            else ""
        )
    rules, hint = FIELDS[name].metadata, TYPES[name]
    kinds = get_args(hint) or (hint,)
    told = f"--{name.replace('_', '-')} {text[:20]!r}"
    if rules["choices"]:
        return "" if text in rules["choices"] else told
    if rules["file"]:
        return told if not text or text in ("loop", "nowhere/x") else ""
    if int in kinds or float in kinds:
        value = _number(text, int if int in kinds else float)
        enough = value > 0 if rules["positive"] else value >= 0
        return "" if enough and value < rules["below"] else told
    return ""


def _number(text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        return math.nan


def _beside(place: Path) -> None:
    """Files of the user's in the folder, named as plopfast's own results are; a pipe; a link to itself."""
    (place / "mine" / "trial").mkdir(parents=True)
    for name in ("mine/model.txt", "mine/trial/notes", "scores.txt", "search.db"):
        (place / name).write_text("mine")
    os.mkfifo(place / "pipe")
    (place / "loop").symlink_to("loop")


def _hashes(place: Path) -> dict[str, str]:
    """The inputs and the user's own files, with their hashes."""
    theirs = [path for name in ("model", "rows", "mine") for path in (place / name).rglob("*")]
    theirs += [
        path for path in place.iterdir() if path.name in ("scores.txt", "search.db", "settings.json", "tune.json")
    ]
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in theirs if path.is_file()
    }
