"""The file of `plopfast multi`: several trainings, each with settings of its own.

max_steps: 200                     # for every job that does not say otherwise
jobs:
  legal: {train: legal.jsonl, test: legal-test.jsonl, rank: 8, lr: 5e-4}
  support: {train: support.jsonl, rule: "q_proj,v_proj", seed: 3}
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from ..support import config as groups
from ..support.config import RunConfig
from ..support.errors import ConfigError, nearest, shown
from ..support.options import Settings
from ..support.settings_file import checked_settings, read_mapping
from ..training.together import CANNOT, OF_THE_PASS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a folder
OWN = (groups.DataSettings, groups.ScoreSettings, groups.PlaceSettings, groups.AdapterSettings, groups.TrainConfig)


def _names(*kinds: type[Settings]) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


# what a job may say for itself; the others are the base's, or of the one pass through it
OF_A_JOB = _names(*OWN) - _names(groups.ModelSettings, groups.RankSettings) - {*OF_THE_PASS, *CANNOT, "full", "backend"}


def read_jobs(path: Path, base: RunConfig) -> tuple[RunConfig, dict[str, RunConfig]]:
    """What a JSON or YAML file says of all jobs, and its jobs by name: the settings of `base`, of the file, and of the job, the
    last one first. `base` is as the user gave it: a job has other defaults where it has rows of its own.

    Raises FileError for a file that cannot be read, and ConfigError, with the job's name, for settings that cannot be, for those
    that all jobs have to share, and for a name that cannot be a folder's.
    """
    value = read_mapping(path)
    jobs = value.pop("jobs", None) if isinstance(value, dict) else None
    if not isinstance(jobs, dict) or not jobs:
        raise ConfigError(
            f'{path}: expected "jobs", a mapping of names to settings such as {{"legal": {{"train": "legal.jsonl"}}}}, got '
            f"{shown(jobs)}"
        )
    common = replaced(f"{path}", base, checked_settings(path, value))
    for setting in ("full", "fit", *CANNOT):
        if getattr(common, setting):
            why = CANNOT.get(setting, "is for one training")
            raise ConfigError(
                f"{setting} {why}, which several jobs at once cannot have: leave it out, or plopfast run each job"
            )
    found: dict[str, RunConfig] = {}
    for name, settings in jobs.items():
        where = f"{path}, job {name!r:.80}"
        if not NAME.fullmatch(name) or name.lower() in {one.lower() for one in found}:
            raise ConfigError(
                f"{where}: its folder has this name: expected letters, digits, _, . and -, other than another job's in any case"
            )
        if not isinstance(settings, dict):
            raise ConfigError(f"{where}: expected a mapping of settings, got {shown(settings)}")
        for setting, given in checked_settings(where, settings).items():
            if setting not in OF_A_JOB and given != getattr(common, setting):
                raise ConfigError(_not_its_own(where, setting, getattr(common, setting)))
        found[name] = replaced(where, common, checked_settings(where, settings))
    return common, found


def _not_its_own(where: str, setting: str, shared: Any) -> str:
    if setting in _names(groups.ModelSettings):
        why = "all jobs train on one base, with its tokenizer"
    elif setting in OF_THE_PASS:
        why = "all jobs are computed in one pass"
    else:
        return f"{where}: {setting} is no setting of a training{nearest(setting, sorted(OF_A_JOB))}; a job has {', '.join(sorted(OF_A_JOB))}"
    return f"{where}: {setting} is {shown(shared)} for all, as {why}: give it once, as --{setting.replace('_', '-')} or above jobs"


def replaced(where: str, base: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """`base` with settings that were read from `where`, which a ConfigError names."""
    for one, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
        if settings.get(one) is not None:
            settings = {other: None, **settings}  # both say how long to train: the one that is given last counts
    try:
        return dataclasses.replace(base, **settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
