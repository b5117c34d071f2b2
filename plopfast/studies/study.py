"""A study: many trials of one plan, and what they say together of every criterion of where adapters belong.

    OUT/MODEL-TASK-BUDGET/   a run folder of each trial
    OUT/study.json           what evidence.py makes of the trials that are done

Several processes may work on one OUT: each takes the trials that no other one holds.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..report import kinds
from ..report.tables_study import study_tables
from ..run.folder import CONFIG
from ..run.run import Run
from ..support import files, machine
from ..support.errors import ConfigError, FileError, PlopfastError
from ..support.lock import locked
from ..support.model_settings import ModelSettings
from ..support.progress import say
from .arms import MADE_BY as BY_TRIAL, folder_of
from .evidence import Trial, evidence
from .plan import Cell
from .trial import run_trial

STUDY = "study.json"
MADE_BY = "plopfast study"


def run_study(out: Path, cells: Sequence[Cell], plan: Path, confidence: float = 0.95) -> tuple[str, bool]:
    """Runs the trials of `cells` in `out` that are not done, and returns the tables of those that are, and whether all are.

    What an interrupted trial has done stays, and it goes on from there. A trial that cannot be run is named and left out; the
    others go on. Raises FileError where study.json is not ours, ConfigError where nothing is done.
    """
    path = out / STUDY
    if path.exists() and not _is_ours(path):
        raise FileError(f"{path}: in the way, and not a study of plopfast: move it away, or {files.OTHER_OUT}")
    why: dict[str, str] = {}
    last: dict[str, Run] = {}  # the model that is loaded, by the settings that it was loaded with
    for number, cell in enumerate(cells, 1):
        say(f"study: {cell.name}, {number} of {len(cells)}")
        try:
            if _run(out / cell.name, cell, last) and number < len(cells):
                _keep(out, cells[:number], plan, why, confidence)
        except PlopfastError as error:
            why[cell.name] = str(error)
            say(f"{cell.name}: {error}")
    if len(why) == len(cells):
        raise ConfigError(f"no trial of {plan} is done: {next(iter(why.values()))}")
    return "\n\n".join(map(str, study_tables(_keep(out, cells, plan, why, confidence)))), not why


def _keep(out: Path, cells: Sequence[Cell], plan: Path, why: dict[str, str], confidence: float) -> dict[str, Any]:
    """Writes and returns study.json: what those of `cells` say that are done, and `why` the others are not."""
    done = [_read(out / cell.name, cell) for cell in cells if cell.name not in why]
    value = {
        "plopfast": "study", "command": machine.command(), "plan": {"file": str(plan), "sha256": files.sha256(plan)},
        "machine": done[0].value["machine"], "versions": done[0].value["versions"], "left": why,
        **evidence(done, confidence),
    }  # fmt: skip
    files.write_json(out / STUDY, value)
    return value


def _is_ours(path: Path) -> bool:
    value = files.read_json(path, MADE_BY)
    return isinstance(value, dict) and value.get("plopfast") == "study"


def _run(folder: Path, cell: Cell, last: dict[str, Run]) -> bool:
    """Runs a trial that is not done, with the model of the trial before where that is the same, and returns whether it did. Raises
    FileError where another process has it."""
    loaded = str([getattr(cell.config, field.name) for field in dataclasses.fields(ModelSettings)])
    with contextlib.ExitStack() as ends:
        ends.enter_context(locked(folder))
        if loaded not in last:
            last.clear()  # one model in memory at a time
        begun = (folder / CONFIG).exists()  # of a finished trial, too, the settings are compared
        run = Run(folder, cell.config, resume=begun, progress=True, like=last.get(loaded))
        ends.callback(run.at.close)
        run_trial(run)
        if run.is_loaded:
            last[loaded] = run
        return run.is_loaded


def _read(folder: Path, cell: Cell) -> Trial:
    """A finished trial, with the test rows' nats of each seed of each arm. Raises FileError for one that lacks them."""
    value = kinds.read(folder / "trial.json", BY_TRIAL)
    if "criteria" not in value:
        raise FileError(f"{folder}/trial.json: of an earlier version, without what a study needs: train it anew")
    nats: dict[str, torch.Tensor] = {}
    tokens = torch.tensor([])
    for arm in (*value["arms"], *value["dropped"]):
        paths = [folder_of(folder / "trial" / arm["name"], arm["lr"], run["seed"]) for run in arm["runs"]]
        tests = [kinds.read(path / "test.json", BY_TRIAL) for path in paths]
        nats[arm["name"]] = torch.tensor([test["nats"] for test in tests], dtype=torch.float64)
        tokens = torch.tensor(tests[0]["tokens"], dtype=torch.float64)
    return Trial(cell, value, nats, tokens)
