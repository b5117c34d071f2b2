"""The structure of a causal language model: its linear modules, their types, and its repeated layers."""

import math
import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..support.errors import ModelError
from .exclusions import exclusions
from .frozen import FrozenWeight, find_frozen, frozen_of, is_linear, streamed_in
from .quantized import ExpertCodes, QuantizedMatrix
from .running import output_head

_LAYER = re.compile(r"(.*?\.)??\d+(?=\.)")  # a name up to its first number


@dataclass(frozen=True)
class LinearInfo:
    """A linear module inside the repeated layers, or the output head, whose layer is None."""

    name: str
    module: nn.Module
    type: str
    layer: int | None
    n_in: int
    n_out: int
    transposed: bool  # stored [in, out], as GPT-2's Conv1D does

    @property
    def frozen(self) -> FrozenWeight:
        """The module's weight [n_out, n_in]."""
        return frozen_of(self.module, self.name)


def linear_modules(model: nn.Module, include_head: bool = False) -> list[LinearInfo]:
    """Lists the linear modules inside the model's repeated layers, in order, each with its layer number and type; those that
    no rule chooses are left out (`exclusions.left_out` says which).

    The type is the last component of the name (`q_proj`). Where two different modules of one layer share that, it is as
    many components as tell them apart (GPT-2's `attn.c_proj` and `mlp.c_proj`). A place in a list belongs to it where the
    module is the list's own (CTRL's `ffn.0` and `ffn.2`). `include_head` adds the output head.
    Raises ModelError where there are none, and for weights that `frozen_of` does not take.

    >>> info = pf.linear_modules(model)[0]
    >>> info.name, info.type, info.n_in, info.n_out
    ('model.layers.0.self_attn.q_proj', 'q_proj', 32, 32)
    """
    head = output_head(model)
    in_head = set(head.modules()) if head is not None else set()
    excluded = exclusions(model)
    found: list[tuple[str, nn.Module, int | None, tuple[str, ...]]] = []
    module: nn.Module
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        layer, inner = place_in_layer(name)
        if module in in_head:
            if include_head:
                found.append((name, module, None, inner))
        elif layer is not None and name not in excluded:
            found.append((name, module, layer, inner))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear modules (nn.Linear or transformers' Conv1D) inside repeated layers; "
            "plopfast needs a transformer whose layers are a ModuleList"
            + "".join(f"; left out: modules {reason}" for reason in sorted({*excluded.values()}))
        )
    types = shortest_suffixes({inner for *_, inner in found})
    infos = []
    for name, module, layer, inner in found:
        frozen = frozen_of(module, name)
        n_out, n_in = frozen.shape
        infos.append(LinearInfo(name, module, types[inner], layer, n_in, n_out, frozen.transposed))
    return infos


def words_of_codes(model: nn.Module) -> str:
    """Says which linear weights are kept as codes, such as "nf4 codes in 210 linear modules"; empty where none are."""
    kinds = Counter(frozen.kind for module in model.modules() if is_linear(module) and (frozen := find_frozen(module)))
    experts = Counter(module.kind for module in model.modules() if isinstance(module, ExpertCodes))
    found = [f"{kind} codes in {count} linear modules" for kind, count in kinds.items() if kind != "dense"]
    return ", ".join(found + [f"{kind} codes in {count} weights of experts" for kind, count in experts.items()])


def number_of_weights(model: nn.Module) -> int:
    """The number of parameters; a weight kept as codes, or streamed, counts as the matrix that it stands for."""
    codes = [module for module in model.modules() if isinstance(module, QuantizedMatrix)]
    held = sum(p.numel() for module in codes for name, p in module.named_parameters() if name != "bias")
    stand_for = sum(module.in_features * module.out_features for module in codes)
    streamed = [module for module in map(model.get_submodule, streamed_in(model)) if module not in codes]
    elsewhere = sum(math.prod(frozen_of(module).shape) for module in streamed)
    return sum(p.numel() for p in model.parameters()) - held + stand_for + elsewhere


def place_in_layer(name: str) -> tuple[int | None, tuple[str, ...]]:
    """Returns a module's layer, if any, and the path to it within the layer, without the numbers of experts and the like.

    A number at the end stays, as it tells the modules of a list apart: `h.3.ffn.2` is (3, ("ffn", "2")). A module that is
    itself an entry of the first list is a layer with the list's name: `projections.1` is (1, ("projections",)).
    """
    parts = tuple(name.split("."))
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return None, parts[-1:]
    if at == len(parts) - 1:
        return int(parts[at]), parts[max(at - 1, 0) : max(at, 1)]
    inner = tuple(part for part in parts[at + 1 : -1] if not part.isdigit())
    return int(parts[at]), (*inner, parts[-1])


def shortest_suffixes(paths: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Gives each path its shortest end that no other path has, joined by dots; more than a number, where there is more."""
    result = {}
    for path in paths:
        ends = [path[at:] for at in reversed(range(len(path)))]
        names = [end for end in ends if not end[0].isdigit()] or ends
        own = [end for end in names if sum(other[-len(end) :] == end for other in paths) == 1]
        result[path] = ".".join(own[0] if own else path)
    return result


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the repeated layers that hold linear modules, by name, in order."""
    matches = (_LAYER.match(info.name) for info in linear_modules(model))
    names = dict.fromkeys(match.group() for match in matches if match)
    return {name: model.get_submodule(name) for name in names}
