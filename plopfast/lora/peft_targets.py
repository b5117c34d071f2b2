"""Which modules PEFT adapts for an adapter_config.json, written so that its versions adapt these and no others.

PEFT 0.19 and later take some names of linear modules for those that a mixture's experts had before transformers 5 put them
into one parameter: `mlp.shared_experts.gate_proj` becomes `experts.gate_up_proj`, and the module's tensors are dropped with
a warning (huggingface/peft#3711). Lists, full names and regular expressions all are changed so. `target_parameters` is
not: the weight of a linear module that it names gets the same tensors under the same keys.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..models.exclusions import is_of_experts
from ..models.quantized import ExpertCodes
from .experts import adapted_mixtures
from .placement import ends_of

# last components that PEFT renames, in transformers_weight_conversion.py
RENAMED = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
WEIGHT = ".weight"


def targets_of(model: nn.Module, names: Sequence[str], as_parameters: bool = True) -> dict[str, Any]:
    """The fields target_modules and target_parameters (where one is needed) for the modules `names` of `model`."""
    fused = as_parameters and _has_fused_experts(model)
    experts = {name for mixture in adapted_mixtures(model) for name in names if name.rpartition(".")[0] == mixture}
    parameters = [name for name in names if name.rpartition(".")[2] in RENAMED and name not in experts] if fused else []
    modules = [name for name in names if name not in parameters and name not in experts]
    found: dict[str, Any] = {"target_modules": _target_modules(model, modules) if modules else []}
    if parameters or experts:
        found["target_parameters"] = sorted({name + WEIGHT for name in parameters} | experts)
    return found


def key_of(name: str, target_parameters: Iterable[str]) -> str:
    """What PEFT matches rank_pattern and alpha_pattern with: the module's name, or its weight's where that is the target."""
    key = name + WEIGHT
    return key if is_targeted(key, target_parameters) else name


def is_targeted(name: str, target_parameters: Iterable[str]) -> bool:
    """Whether a parameter is one of the target_parameters, as PEFT matches them: full names, or ends of names."""
    return not {name, *ends_of(name)}.isdisjoint(target_parameters)


def _has_fused_experts(model: nn.Module) -> bool:
    codes = any(isinstance(module, ExpertCodes) for module in model.modules())
    return codes or any(is_of_experts(name, parameter) for name, parameter in model.named_parameters())


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """The names' last components, the full names, or a regular expression: the first that matches no other module."""
    others = {end for name, _ in model.named_modules() if name not in names for end in (name, *ends_of(name))}
    lasts = {name.rpartition(".")[2] for name in names}
    for targets in (lasts, set(names)):
        if not targets & others:
            return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(names))
