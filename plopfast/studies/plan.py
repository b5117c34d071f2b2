"""The file of `plopfast study`: models x tasks x budgets, each a trial.

lrs: "2e-3,4e-3,8e-3"              # for every trial that does not say otherwise
models: {small: {}, other: {model: other.gguf}}
tasks: {sums: {train: sums.jsonl, valid: sums-valid.jsonl, test: sums-test.jsonl}}
budgets: {r4: {rank: 4}, r16: {rank: 16}}
trials: [small-sums-r4, other-sums-r4]   # of them, in this order; default: all
controls: [random]                       # models that are shown, and left out of all means
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run.jobs import NAME, replaced
from ..support.config import RunConfig
from ..support.errors import ConfigError, nearest, shown
from ..support.settings_file import checked_settings, read_mapping

AXES = ("models", "tasks", "budgets")


@dataclass(frozen=True)
class Cell:
    """A trial of a study: a model, a task and a budget by their names in the file, and its settings. `control`: its model is one."""

    name: str
    model: str
    task: str
    budget: str
    config: RunConfig
    control: bool


def read_plan(path: Path, base: RunConfig) -> list[Cell]:
    """The trials of a JSON or YAML file, in the order of its "trials": settings of `base`, of the file, of the model, the task and
    the budget, of which the last one counts.

    Raises FileError for a file that cannot be read, ConfigError for names and settings that cannot be.
    """
    value = read_mapping(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping with {', '.join(AXES)}, got {shown(value)}")
    axes = {axis: _axis(path, axis, value.pop(axis, None)) for axis in AXES}
    wanted, controls = value.pop("trials", None), value.pop("controls", [])
    _check(path, "controls", controls, [*axes["models"]])
    common = replaced(f"{path}", base, checked_settings(path, value))
    cells = []
    for model, of_model in axes["models"].items():
        for task, of_task in axes["tasks"].items():
            for budget, of_budget in axes["budgets"].items():
                name = f"{model}-{task}-{budget}"
                where = f"{path}, {name}"
                config = replaced(where, common, checked_settings(where, {**of_model, **of_task, **of_budget}))
                cells.append(Cell(name, model, task, budget, config, model in controls))
    known = [cell.name for cell in cells]
    if len({*known}) < len(known):
        twice = next(name for name in known if known.count(name) > 1)
        raise ConfigError(f"{path}: two trials are named {twice}: rename a model, a task or a budget")
    if wanted is None:
        return cells
    _check(path, "trials", wanted, known)
    if not wanted:
        raise ConfigError(f"{path}: trials: none is named: leave the key out for all of them")
    by_name = dict(zip(known, cells, strict=True))
    return [by_name[name] for name in dict.fromkeys(wanted)]


def _axis(path: Path, axis: str, value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not value or not all(isinstance(settings, dict) for settings in value.values()):
        raise ConfigError(
            f"{path}: expected {axis!r}, a mapping of names to settings such as {{mine: {{...}}}}, got {shown(value)}"
        )
    for name in value:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{path}, {axis}: {name!r:.80} names folders: expected letters, digits, _, . and -")
    return value


def _check(path: Path, key: str, names: Any, known: list[str]) -> None:
    if not isinstance(names, list):
        raise ConfigError(f"{path}: {key}: expected a list of names, got {shown(names)}")
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{path}: {key}: expected some of {', '.join(known)}, got {shown(name)}{nearest(str(name), known)}"
            )
