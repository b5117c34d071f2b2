"""Which modules a training does not move: those of which no parameter ever had a gradient other than zero.

Nobody sees an adapter that stays as it was, because the others still learn. AdamW keeps a mean of squared gradients
(`exp_avg_sq`) for each parameter that had one, which is zero only if all were zero. So the optimizer knows, and no copy of
the parameters is needed. An adapter's A and B are looked at together, as A has no gradient while B is zero.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..lora.experts import ExpertLoRA
from ..lora.layer import adapters
from ..models.frozen import is_linear
from ..models.linears import place_in_layer, shortest_suffixes
from .moments import has_moved

NAMED = 8  # layers in a message


@dataclass(frozen=True)
class Unmoved:
    """The modules of one type that did not move: `count` of the `total` that are trained. `layers` are theirs, in order."""

    type: str
    count: int
    total: int
    layers: tuple[int, ...]


def census(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    each_expert: bool = False,
) -> list[Unmoved]:
    """Returns what did not move in the steps that `optimizer` took, by module type; one look waits once for the device (with `each_expert` twice).

    `parameters` are the trained ones of `model`, by name, and types are named as `linear_modules` does. On several ranks,
    gradients are those of all of them, so each rank finds the same. With `each_expert`, single experts of adapters that moved
    are counted, too, as the type "experts.down_proj expert" (not with 8-bit moments, whose blocks may hold several).
    """
    moments = [has_moved(optimizer, p) for p in parameters.values() if p in optimizer.state]
    largest = iter(torch.stack(torch._foreach_norm(moments, torch.inf)).tolist() if moments else [])
    moved: dict[str, bool] = {}
    for name, parameter in parameters.items():
        module = _parent(name)
        moves = parameter in optimizer.state and next(largest) != 0
        moved[module] = moved.get(module, False) or moves
    return _by_type(model, moved) + (_single_experts(model, optimizer, moved) if each_expert else [])


def _single_experts(model: nn.Module, optimizer: torch.optim.Optimizer, moved: Mapping[str, bool]) -> list[Unmoved]:
    lora = {name: m for name, m in adapters(model).items() if isinstance(m, ExpertLoRA) and moved.get(name)}
    counts: dict[str, torch.Tensor] = {}
    for name, module in lora.items():
        trained = [p for p in (module.lora_A, module.lora_B) if p in optimizer.state]
        moments = [m for p in trained if (m := has_moved(optimizer, p)).shape == p.shape]
        if moments:
            counts[name] = (torch.stack([m.flatten(1).amax(1) for m in moments]).amax(0) == 0).sum()
    still: dict[str, dict[str, int]] = {}
    total: Counter[str] = Counter()
    for name, alone in zip(counts, torch.stack([*counts.values()]).tolist() if counts else [], strict=True):
        type_ = ".".join(name.split(".")[-2:]) + " expert"
        total[type_] += lora[name].frozen.experts
        if alone:
            still.setdefault(type_, {})[name] = alone
    return [
        Unmoved(type_, sum(by_name.values()), total[type_], tuple(_layers(by_name))) for type_, by_name in still.items()
    ]


def _layers(names: Iterable[str]) -> list[int]:
    return sorted({layer for layer, _ in map(place_in_layer, names) if layer is not None})


def warning(found: Sequence[Unmoved], when: str, *, full: bool, dtype: torch.dtype) -> str:
    """Says in a line what `census` found, `when`, and what the likely cause is. `dtype` is the model's."""
    what = "modules" if full else "adapters"
    parts = []
    for one in found:
        layers = ", ".join(map(str, one.layers[:NAMED])) + (", ..." if len(one.layers) > NAMED else "")
        where = f" (layer{'s' * (len(one.layers) != 1)} {layers})" if layers else ""
        parts.append(f"{one.count} of {one.total} {one.type} {what}{where}")
    causes = [
        "these modules are not used in this forward pass (such as routed experts that get no token)",
        "a hook, detach or no_grad cuts off their gradient",
        "every label is masked",
    ]
    if dtype == torch.float16:
        causes.insert(0, "float16 is too narrow for their gradients: take --dtype bfloat16 or float32")
    return (
        f"no gradient reached {' and '.join(parts)} {when}, so they learn nothing. Likely causes: {'; '.join(causes)}"
    )


def _by_type(model: nn.Module, moved: Mapping[str, bool]) -> list[Unmoved]:
    """Groups the modules by type; their order is the model's."""
    lora = adapters(model)
    linears = [name for name, module in model.named_modules() if is_linear(module) and _parent(name) not in lora]
    places = {name: place_in_layer(name) for name in (*lora, *linears, *moved)}
    types = shortest_suffixes({inner for _, inner in places.values()})
    of: dict[str, list[str]] = {}
    for module in moved:
        of.setdefault(types[places[module][1]], []).append(module)
    found = []
    for type_, modules in of.items():
        if still := [module for module in modules if not moved[module]]:
            found.append(Unmoved(type_, len(still), len(modules), tuple(_layers(still))))
    return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
