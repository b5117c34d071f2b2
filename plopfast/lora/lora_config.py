"""A placement as PEFT's own configuration, for who trains with PEFT, TRL or any trainer that takes one."""

from typing import Any

from torch import nn

from ..support.errors import ConfigError, PlacementError
from .peft_targets import key_of, targets_of
from .placement import Placement, ranks_and_patterns

OURS = ("target_modules", "target_parameters", "r", "lora_alpha", "rank_pattern", "alpha_pattern")


def lora_config(placement: Placement, model: nn.Module | None, overrides: dict[str, Any]) -> Any:
    """See Placement.lora_config."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"lora_config makes a peft.LoraConfig ({error}): pip install peft") from None
    if given := [name for name in OURS if name in overrides]:
        raise ConfigError(
            f"lora_config: {' and '.join(given)} come from the placement; for others, place anew (pf.place(report, rank=...))"
        )
    fields = fields_for(placement, model, as_parameters=not overrides.get("use_dora"))
    return peft.LoraConfig(**fields | overrides)


def fields_for(placement: Placement, model: nn.Module | None, as_parameters: bool = True) -> dict[str, Any]:
    """Returns the fields of the placement's LoraConfig; PEFT need not be installed.

    `model` may be without values. `as_parameters`: linear modules whose names PEFT takes for experts' go to
    target_parameters, which it cannot train with DoRA. Raises PlacementError where `model` lacks a module.
    """
    fields = placement.peft_config()
    return fields if model is None else fields | _fields_of(placement, model, as_parameters)


def _fields_of(placement: Placement, model: nn.Module, as_parameters: bool) -> dict[str, Any]:
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    if missing := [name for name in placement.modules if name not in known]:
        raise PlacementError(
            f"the placement names {missing[0]!r}, which this {type(model).__name__} does not have; was it made for another "
            "model? (PEFT has renamed the modules of a model that it wraps: give the model from before)"
        )
    linears = [name for name in placement.modules if name not in placement.experts]
    found = targets_of(model, linears, as_parameters)  # PEFT has no DoRA of parameters
    parameters = sorted({*found.get("target_parameters", ()), *placement.experts})
    ranks = {key_of(name, parameters): value for name, value in placement.modules.items()}
    return found | ({"target_parameters": parameters} if parameters else {}) | ranks_and_patterns(ranks)
