"""Kills a command at each file that it opens for writing, renames, makes or deletes; or lets the disk be full from there on;
or raises an error where it enters a function.

A child counts these events by an audit hook, and at its n-th one ends by SIGKILL (kill), or gets ENOSPC for it and all
later ones (full). Or an error that no code expects, or Ctrl-C, comes at its n-th entry of a function (error), and the same
process goes on. Then the documented way of going on is taken, and what is there at the end must equal the result of
the command that nothing had stopped. Writers that are not Python's (safetensors, SQLite) are seen where their files are
renamed.
"""

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calling import HANG_S, Outcome, fork
from corpus import BASE, QUICK, STUDY, copy
from planted_errors import PlantedError, PlantedInterrupt, planted
from safetensors.torch import load_file

# These differ between two runs; a training's tokens and padding are those since it was resumed.
TIMES = {"seconds", "tokens_per_s", "peak_mib", "command", "machine", "versions", "tokens", "padding"}
KNOWN = {".lock"}
LEFT_OUT = ("previous", "checkpoints", "history.jsonl")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DELETES = ("os.remove", "os.rmdir")
ERRORS = 80  # points of each scenario, of some thousands
EVENTS = ("open", "os.rename", "os.mkdir", "os.truncate", "os.link", "os.symlink", *DELETES)


@dataclass
class Scenario:
    """A command in a copy of the corpus; then, after it was stopped, the ways to go on, in the order of trying: the next
    one is for where plopfast refuses the one before. `out`: the run folder. `kept`: it holds complete results before."""

    argv: list[str]
    ways: list[list[str]]
    out: str = "run"
    kept: bool = False


def _of(text: str, *ways: str, **more: Any) -> Scenario:
    argv = text.split()
    return Scenario(argv, [[*argv, *way.split()] for way in ways], **more)


RUN, FREE = [*BASE, *QUICK], "--max-steps 2 --save-every 1 --eval-rows 2 --batch-rows 2"
SCENARIOS = {
    "run": _of(f"run {' '.join(RUN)} --save-every 1 --out new", "--resume", "", out="new"),
    "run --overwrite": Scenario(
        ["run", *RUN, "--seed", "1", "--out", "run", "--overwrite"],
        [["run", *RUN, "--seed", "1", "--out", "run", *how] for how in (["--resume"], ["--overwrite"])], kept=True),
    "train": _of(f"train --out placed {FREE}", "--resume", "", out="placed"),
    "train --overwrite": Scenario(
        ["train", "--out", "run", "--seed", "1", *FREE.split(), "--overwrite"],
        [["train", "--out", "run", "--seed", "1", *FREE.split(), *how] for how in (["--resume"], ["--overwrite"])]),
    "score": _of(f"score {' '.join(BASE)} --score-prompts 6 --init eva --out new", "", "--overwrite", out="new"),
    "score --overwrite": _of("score --out run --seed 1 --init eva --overwrite", ""),
    "place --overwrite": _of("place --out run --k 2 --overwrite", ""),
    "eval --overwrite": _of("eval --out run --overwrite", ""),
    "report --overwrite": _of("report --out run --overwrite", ""),
    "merge": _of("merge --out run", "", "--overwrite"),
    "merge --overwrite": _of("merge --out merged --overwrite", "", out="merged"),
    "trial": _of(f"trial {' '.join([*BASE, *STUDY])} --out new", "--resume", "", out="new"),
}  # fmt: skip

FEW = ("run --overwrite", "train", "score --overwrite", "merge --overwrite")


def warm(folder: Path) -> None:
    """Imports all that commands need, once, before the forks."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from corpus import plopfast

    shutil.copytree(folder / "corpus", folder / "warm", symlinks=True)
    os.chdir(folder / "warm")
    for scenario in ("run --overwrite", "train", "merge"):
        plopfast(*SCENARIOS[scenario].argv)
    os.chdir(folder)


def points(folder: Path, quick: bool = False) -> list[tuple[str, str, int]]:
    """Lists (scenario, mode, number of the event), and keeps what each scenario gives where nothing stops it.

    The order is random, so that the first ones are a sample; those of the trial, a third of all, come last. `quick` takes
    the commands of FEW alone: each has to be run twice before.
    """
    found: dict[bool, list[tuple[str, str, int]]] = {False: [], True: []}
    for name, scenario in SCENARIOS.items():
        if quick and name not in FEW:
            continue
        place = folder / "whole" / name
        copy(folder / "corpus", place, scenario.argv)
        code, told = child(scenario.argv, place, "count", 0)
        assert code == 0, told
        kinds = (place / "events").read_text().split("\n")[:-1]
        steps = _steps(scenario, folder, place)
        numbers = {
            "kill": range(1, len(kinds) + 1),
            "full": [n for n, kind in enumerate(kinds, 1) if kind.split()[0] not in DELETES],
            "error": sorted(random.Random(name).sample(range(1, steps + 1), ERRORS)),
        }
        found[name == "trial"] += [(name, mode, number) for mode, some in numbers.items() for number in some]
    for some in found.values():
        random.Random(0).shuffle(some)
    (folder / "points.json").write_text(json.dumps(found[False] + found[True]))
    return found[False] + found[True]


def _steps(scenario: Scenario, folder: Path, whole: Path) -> int:
    """How many functions of plopfast's and calls of modules a scenario enters; the names go to `steps` of `whole`."""

    def count() -> None:
        copy(folder / "corpus", folder / "counted", scenario.argv)
        with planted(0) as steps:
            code, told = _here(scenario.argv, folder / "counted", "plain", 0)
            assert code == 0, told
        (whole / "steps").write_text("\n".join(steps))

    _in_a_child(count)
    shutil.rmtree(folder / "counted")
    return len((whole / "steps").read_text().split("\n"))


def run(point: tuple[str, str, int], folder: Path, place: Path) -> Outcome:
    """Stops the scenario at its point, in `place`, which is made and deleted, and goes on."""
    name, mode, number = point
    scenario, began = SCENARIOS[name], time.perf_counter()
    copy(folder / "corpus", place, scenario.argv)
    try:
        if mode == "error":
            told_at = place.parent / f"{place.name}.json"
            _in_a_child(
                lambda: told_at.write_text(
                    json.dumps(_stopped_and_gone_on(scenario, mode, number, place, folder / "whole" / name))
                )
            )
            fault, told = json.loads(told_at.read_text())
        else:
            fault, told = _stopped_and_gone_on(scenario, mode, number, place, folder / "whole" / name)
        events = (folder / "whole" / name / ("steps" if mode == "error" else "events")).read_text().split("\n")
        detail = f"{name}, {mode} at event {number}: {events[number - 1]}\n{told}"
        short = f"{mode}: {name}: {fault}" if fault else ""
        return Outcome(scenario.argv, 0, "", short, detail, time.perf_counter() - began)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _stopped_and_gone_on(scenario: Scenario, mode: str, number: int, place: Path, whole: Path) -> tuple[str, str]:
    """Returns what is wrong, and what was said."""
    out, want = place / scenario.out, results(whole / scenario.out, whole)
    before = results(out, place) if scenario.kept else {}
    call = _here if mode == "error" else child
    code, told = call(scenario.argv, place, mode, number)
    if mode == "kill" and code != -signal.SIGKILL:
        return f"exit code {code} instead of the kill", told
    if mode == "full" and (fault := _not_one_error(code, told)):
        return f"on a full disk, {fault}", told
    now, aside = results(out, place), results(out / "previous", place)
    if scenario.kept and not any(found in (before, want) for found in (now, aside, aside | now, now | aside)):
        return "complete results were lost", ", ".join(sorted(path.name for path in out.iterdir()))
    if mode == "full" and code == 0:
        return _differences(want, results(out, place)), told
    for way in scenario.ways:
        code, more = call(way, place, "plain", 0)
        told += f"\n$ plopfast {' '.join(way)}\n{more}"
        if code == 0:
            break
        if fault := _not_one_error(code, more):
            return f"going on, {fault}", told
    if code:
        return "no way to go on", told
    left = [path.name for folder in (place, out) for path in folder.rglob(".*") if path.name not in KNOWN]
    return _differences(want, results(out, place)) or (f"left behind: {left[0].split('.')[1]}" if left else ""), told


def _not_one_error(code: int, told: str) -> str:
    lines = [line for line in told.splitlines() if line.startswith("plopfast: error:")]
    if "Traceback" in told:
        return f"traceback: {told.strip().splitlines()[-1][:80]}"
    if code == 0 or (code == 2 and len(lines) == 1):
        return ""
    return f"exit code {code}, {len(lines)} error lines"


def _differences(want: dict[str, Any], got: dict[str, Any]) -> str:
    for name in sorted(want.keys() | got.keys()):
        one, other = want.get(name), got.get(name)
        if one != other:
            inner = isinstance(one, dict) and isinstance(other, dict)
            return f"differs: {name} {_differences(one, other).removeprefix('differs: ') if inner else ''}".strip()
    return ""


def results(folder: Path, place: Path) -> dict[str, Any]:
    """What a run folder in `place` holds, without times; checkpoints and history are left out, they depend on the way."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith(("previous", "checkpoints", ".")) or path.name == "history.jsonl":
            continue
        if path.suffix == ".safetensors":
            found[name] = {key: tensor.flatten().tolist() for key, tensor in load_file(path).items()}
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text().replace(str(place), "")))
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]  # no paths in them
        else:
            found[name] = path.stat().st_size > 0
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _in_a_child(do: Callable[[], object]) -> None:
    """Runs `do` in a copy of this process. Raises AssertionError where it fails."""
    assert os.waitpid(fork(do), 0)[1] == 0


def _error(number: int) -> contextlib.AbstractContextManager:
    return planted(number, PlantedInterrupt if number % 2 else PlantedError)


def _here(argv: list[str], place: Path, mode: str, number: int) -> tuple[int, str]:
    """Runs `plopfast ARGV...` in this process, with an error at its step `number` (mode error); returns as `child` does."""
    from plopfast.cli import main

    os.chdir(place)
    code, said = 70, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            with _error(number) if mode == "error" else contextlib.nullcontext():
                code = main.main(argv)
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
    return code, said.getvalue()


def child(argv: list[str], place: Path, mode: str, number: int) -> tuple[int, str]:
    """Runs `plopfast ARGV...` in a child; returns its exit code (below 0: the signal) and what it printed on stderr."""
    log = place.parent / f"{place.name}.err"
    pid = os.fork()
    if not pid:
        try:
            _be_child(argv, place, mode, number, log)
        finally:
            os._exit(70)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told = log.read_text(errors="replace")
    log.unlink()
    return code, told


def _be_child(argv: list[str], place: Path, mode: str, number: int, log: Path) -> None:
    from plopfast.cli import main

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(6 * HANG_S)
    os.chdir(place)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in (1, 2))
    seen: list[str] = []
    if mode != "plain":
        sys.addaudithook(lambda event, args: _at(event, args, str(place), mode, number, seen))
    try:
        code = main.main(argv)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stderr.flush()
    if mode == "count":
        (place / "events").write_text("".join(line + "\n" for line in [*seen]))
    os._exit(code)


def _at(event: str, args: tuple[Any, ...], place: str, mode: str, number: int, seen: list[str]) -> None:
    """Counts an event that changes files under `place`, and stops there when its turn has come."""
    if event not in EVENTS or (event == "open" and not (isinstance(args[2], int) and args[2] & WRITES)):
        return
    if not isinstance(args[0], str | bytes | os.PathLike):
        return
    name = os.fsdecode(args[0])
    if event in ("os.remove", "os.rmdir", "os.mkdir") and isinstance(args[-1], int) and args[-1] >= 0:
        name = f"{Path(f'/proc/self/fd/{args[-1]}').readlink()}/{name}"
    name = os.path.abspath(name)  # noqa: PTH100  # no Path: it would be slow, and is itself a file operation
    if not name.startswith(place):
        return
    seen.append(f"{event} {name[len(place) + 1 :]}")
    if mode == "kill" and len(seen) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "full" and len(seen) >= number and event not in DELETES:
        raise OSError(errno.ENOSPC, "No space left on device", name)
