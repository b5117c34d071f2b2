"""What plopfast's own study found of models that are built like the one at hand, in sentences. All verdicts follow from the figures.

studied.json is what bench/study_summary.py makes of bench/results/study.json; docs/study.md has the whole of it.
"""

import json
from functools import cache
from importlib import resources
from typing import Any

from .words import listed, several

RIVALS = {"all": "adapters on all modules", "mlp": "adapters on the MLP", "no-qk": "adapters on all but query and key"}


def what_the_study_found(model_type: str) -> str:
    """Return whether NFN's order agreed with results on models of this `model_type`, and how its pick fared; where the study has
    none, or the type is not known (""), the same of those that it has."""
    studied = _studied()
    alike = [one for one in studied["models"] if model_type in one["built_alike"]]
    said = ["plopfast's study has no model that is built like this one."] if model_type and not alike else []
    for one in alike or studied["models"]:
        which = f"{one['model']} ({several(one['tasks'], 'task')}), {'which is built like this model, ' * bool(alike)}"
        order = (
            f"the order by NFN {_order(one, studied['confidence'])} (Kendall's tau {one['tau']:+.2f}, p {one['p']:.2g})"
        )
        said.append(f"In plopfast's study of {which}{order}, and its pick {_pick(one, studied['confidence'])}.")
    return " ".join(said)


@cache
def _studied() -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath("studied.json").read_text())


def _order(one: dict[str, Any], confidence: float) -> str:
    alone = "how well each module type does alone"
    if one["p"] > 1 - confidence:
        return f"was not shown to agree with {alone}"
    return f"{'agreed with' if one['tau'] > 0 else 'was the reverse of'} {alone}"


def _pick(one: dict[str, Any], confidence: float) -> str:
    """PLoP's pick against its rivals: `mean` is a rival's test loss above the pick's, `p` that of all changes of sign over tasks."""
    found: dict[str, list[str]] = {"did better than": [], "did worse than": [], "showed no difference from": []}
    for rival, name in RIVALS.items():
        of = one["above_plop"][rival]
        verdict = "did better than" if of["mean"] > 0 else "did worse than"
        found["showed no difference from" if of["p"] > 1 - confidence else verdict].append(name)
    return listed([f"{verdict} {listed(names)}" for verdict, names in found.items() if names])
