"""What the names in `--arms` stand for: a rule, module types, or several arms at once.

plop, all, mlp, ...       a rule of placing/rules.py
v_proj, o_proj+down_proj  module types or modules, joined by +
each-type                 each module type alone
each-layer-third          layers-first, layers-middle, layers-last: all modules of a third of the layers
full                      all weights
"""

from collections.abc import Sequence

from ..placing.rules import EACH_LAYER_THIRD, EACH_TYPE, arm_names
from ..scoring.report import NFNReport
from ..support.errors import ConfigError, nearest

THIRDS = ("layers-first", "layers-middle", "layers-last")


def rules_of_arms(names: Sequence[str], report: NFNReport) -> dict[str, str]:
    """Returns arm -> what a setting `rule` takes for it. Only types, names and layers of `report` count.

    Raises ConfigError for an unknown name (with the nearest), an arm that is there twice, and layers too few to be parted.
    """
    found: dict[str, str] = {}
    for name in names:
        for arm, rule in _stands_for(name, report).items():
            if arm in found:
                raise ConfigError(f"arms: {arm!r} is there twice, by its name and in each-...: leave one of them out")
            found[arm] = rule
    return found


def _stands_for(name: str, report: NFNReport) -> dict[str, str]:
    if name == EACH_TYPE:
        return _types(report)
    if name == EACH_LAYER_THIRD:
        return _thirds(report)
    if name in arm_names():
        return {name: name}
    parts = name.split("+")
    for part in parts:
        if part not in report.types and part not in report.scores:
            known = [*arm_names(), *report.types]
            raise ConfigError(f"arms: expected some of {', '.join(known)}, got {part!r}{nearest(part, known)}")
        if parts.count(part) > 1:
            raise ConfigError(f"arms: {part!r} is twice in {name!r}")
    return {name: ",".join(parts)}


def _types(report: NFNReport) -> dict[str, str]:
    """In the model's order: that of their scores is not known before scoring, and the first arm is what others are held against."""
    types = dict.fromkeys(score.type for score in report.scores.values() if score.layer is not None)
    if len(types) < 2:
        raise ConfigError("arms: each-type needs two module types, and this model has one: name two arms to compare")
    return {type_: type_ for type_ in types}


def _thirds(report: NFNReport) -> dict[str, str]:
    layers = sorted({score.layer for score in report.scores.values() if score.layer is not None})
    count = len(layers)
    if count < len(THIRDS):
        raise ConfigError(f"arms: each-layer-third needs three layers, and this model has {count}: leave it out")
    return {
        third: ",".join(name for name, score in report.scores.items() if score.layer in layers[number * count // 3 : (number + 1) * count // 3])
        for number, third in enumerate(THIRDS)
    }  # fmt: skip
