"""Placing by criteria other than NFN's mean: what a trial's arms need is computed once, and kept for a resumed trial.

OUT/trial/criteria.json   rule -> module -> score
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..lora.placement import full_rank
from ..models.linears import linear_modules
from ..placing.by_settings import scored
from ..placing.rules import RULES, STRONGEST
from ..report import kinds
from ..run.run import Run
from ..scoring.report import NFNReport
from ..support import files
from ..support.errors import ConfigError
from .arms import MADE_BY
from .criteria import COMPUTE, Given

CRITERIA = "criteria.json"
RANK = 16  # of the inputs' spectrum and of the gradient, whatever the adapters' rank
Criteria = dict[str, dict[str, float]]


def wanted_of(rules: Iterable[str]) -> list[str]:
    """Returns those of `rules` whose scores `criteria_for` computes: what places by another criterion than NFN's mean."""
    rules = dict.fromkeys("gradient-energy" if rule == STRONGEST else rule for rule in rules)
    return [rule for rule in rules if rule in RULES and not RULES[rule].from_report]


def criteria_for(run: Run, report: NFNReport, rules: Iterable[str], folder: Path) -> Criteria:
    """Returns the scores of those of `rules` that need them, of `run`'s model and sample, and keeps them in `folder`, so it belongs
    into a stage.

    Raises ConfigError where the scores follow the authors' procedure, and whatever computing raises.
    """
    wanted = wanted_of(rules)
    if not wanted:
        return {}
    if run.config.compat:
        raise ConfigError(f"{wanted[0]}: other criteria are of our own scores: leave --compat {run.config.compat} out")
    path = folder / CRITERIA
    kept = kinds.read(path, MADE_BY) if run.resume and path.exists() else {}
    rank = min(RANK, *(full_rank(info.n_in, info.n_out) for info in linear_modules(run.model)))
    examples = run.sample()

    @cache
    def with_eva() -> NFNReport:
        settings = dataclasses.replace(run.config.scoring, init="eva", rank=rank)
        return scored(run.model, examples, settings, run.progress)

    given = Given(run.model, examples, rank, run.config.seed, run.progress, with_eva, report)
    for rule in wanted:
        if rule not in kept:
            run.say(f"{rule}: {RULES[rule].criterion} of every module")
            kept[rule] = dict(COMPUTE[rule](given))
            files.write_json(path, kept)
    return {rule: kept[rule] for rule in wanted}


def type_scores(report: NFNReport, criteria: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Returns what trial.json holds of them: NFN and each criterion's scores of the module types, and which end is best."""
    type_of = {name: score.type for name, score in report.scores.items() if score.layer is not None}
    found: dict[str, Any] = {"plop": {"types": dict(report.types), "chooses": "lowest"}}
    for rule, by_module in criteria.items():
        scores = RULES[rule].type_scores({name: by_module[name] for name in type_of}, type_of, report.types)
        found[rule] = {"types": scores, "chooses": "highest" if RULES[rule].highest else "lowest"}
    return found
