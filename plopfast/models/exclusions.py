"""Linear modules inside the layers that no rule chooses, and why; what else of the layers' weights is left out.

gates       a product with one output or one input: no low-rank update is smaller than its weight
indexers    of sparse attention: they choose tokens, so no gradient reaches them
read        another module reads the weight itself, so an update of the module would be left out of what it computes:
            Mamba's kernels take out_proj.weight (PEFT refuses that one, too), and Jamba's router is never called
shared      one weight of several modules (Zamba's shared blocks): merging an update would change them all
"""

import ast
import functools
import sys
from collections.abc import Container, Iterator
from pathlib import Path

from torch import nn

from .frozen import frozen_of, is_altered, is_linear, sharers

INDEXERS = frozenset({"indexer"})  # components of names
HARMLESS = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "requires_grad", "is_cuda", "numel"})
PREPARING = ("__init__", "_init", "init_", "reset_")  # how methods begin that only make values
NAMED = 6  # types in a line

GATE = "whose weight has one row or one column: gates"
INDEXER = "of sparse attention's indexers, which no gradient reaches"
READ = "whose weight other modules read themselves, so that an update would not count everywhere"
SHARED = "that share their weight with other modules"


def exclusions(model: nn.Module) -> dict[str, str]:
    """Linear module inside the layers -> why no rule chooses it."""
    read = {f"{name}.{child}" if name else child for name, m in model.named_modules() for child in read_by(type(m))}
    named = {name: module for name, module in model.named_modules() if in_layers(name) and is_linear(module)}
    shared = sharers(model, named)
    found = {}
    for name, module in named.items():
        if min(frozen_of(module, name).shape) == 1:
            found[name] = GATE
        elif INDEXERS & {*name.split(".")}:
            found[name] = INDEXER
        elif name in read:
            found[name] = READ
        elif name in shared:
            found[name] = SHARED
    return found


def left_out(model: nn.Module, scored: Container[str] = ()) -> list[str]:
    """A line for each reason of `exclusions`, for each class that is nn.Linear's by name alone (`frozen.is_altered`), and for
    experts that are not `scored`, with their share of the layers' weights."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in exclusions(model).items():
        by_reason.setdefault(reason, []).append(name)
    for name, module in model.named_modules():
        if in_layers(name) and is_altered(module):
            reason = f"of the class {type(module).__name__}, whose forward is not nn.Linear's"
            by_reason.setdefault(reason, []).append(name)
    lines = [
        f"left out: {len(names)} module{'s' * (len(names) != 1)} {reason} ({_ends(names)})"
        for reason, names in by_reason.items()
    ]
    experts = {
        name: p.numel()
        for name, p in model.named_parameters()
        if in_layers(name) and is_of_experts(name, p) and name not in scored
    }
    if experts:
        layers = sum(p.numel() for name, p in model.named_parameters() if in_layers(name))
        share = sum(experts.values()) / layers
        lines.append(
            f"left out: {share:.0%} of the layers' weights, the experts ({_ends([*experts])}): "
            "no token reached them, or plopfast does not know how their class computes"
        )
    return lines


def in_layers(name: str) -> bool:
    """Whether the name has a number, as those of modules in repeated layers have (`linears.place_in_layer`)."""
    return any(part.isdigit() for part in name.split("."))


def is_of_experts(name: str, parameter: nn.Parameter) -> bool:
    """Whether it holds one weight for each expert of a mixture."""
    return parameter.dim() == 3 and "experts" in name


def _ends(names: list[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in names})
    return ", ".join(ends[:NAMED]) + ", ..." * (len(ends) > NAMED)


def read_by(kind: type) -> frozenset[str]:
    """The submodules, such as "out_proj" or "mlp.gate", whose weight the methods of a class read for more than its dtype or
    place. Empty where Python has no source of the class."""
    bases = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
    return frozenset[str]().union(*(_read_in(base.__module__).get(base.__qualname__, frozenset()) for base in bases))


@functools.cache
def _read_in(module: str) -> dict[str, frozenset[str]]:
    """Class of a source file -> what its methods read. The file is parsed once, as inspect.getsource would for each class."""
    try:
        tree = ast.parse(Path(sys.modules[module].__file__ or "").read_text(encoding="utf-8"))
    except (KeyError, AttributeError, OSError, SyntaxError, ValueError):
        return {}
    return {
        node.name: frozenset(
            path
            for method in node.body
            if isinstance(method, ast.FunctionDef) and not method.name.startswith(PREPARING)
            for path in _weights_read(method)
        )
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def _weights_read(method: ast.FunctionDef) -> Iterator[str]:
    """Slices of weights don't count: BLOOM and its kin take them only to repeat how they were trained on several devices."""
    asked = {id(node.value) for node in ast.walk(method) if isinstance(node, ast.Subscript)}
    asked |= {id(node.value) for node in ast.walk(method) if isinstance(node, ast.Attribute) and node.attr in HARMLESS}
    for call in ast.walk(method):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "hasattr"):
            asked.update(map(id, call.args))
    for node in ast.walk(method):
        if not isinstance(node, ast.Attribute) or node.attr != "weight" or not isinstance(node.ctx, ast.Load):
            continue
        if id(node) not in asked and (path := _path(node.value)):
            yield path


def _path(node: ast.expr) -> str:
    """`self.a.b` -> "a.b"; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if parts and isinstance(node, ast.Name) and node.id == "self" else ""
