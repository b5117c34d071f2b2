"""Adapters are put into a model, and taken out again: inject, unload."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..models.exclusions import READ, exclusions
from ..models.experts import expert_weights
from ..models.frozen import frozen_in, frozen_of, is_linear, sharers
from ..models.running import remember_requires_grad
from ..support.errors import AdapterError, ConfigError, PlacementError
from ..support.options import problem_of_text
from . import tuning
from .experts import ExpertLoRA, inject_experts, remove_experts
from .init import check_init, check_vectors, draw_seeded_A
from .layer import LoRALinear, adapters, every_adapter, replace_module
from .many import ManyLoRA, NamedLoRA, Routing, adapter_names, named_places, plain_modules, routing_of, unmerge_place
from .ops import path
from .placement import Placement, check_rank
from .replaced import put_back


def inject(
    model: nn.Module,
    placement: Placement,
    *,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
    backend: str = "auto",
    init: str = "kaiming",
    eva: Mapping[str, torch.Tensor] | None = None,
    name: str | None = None,
) -> list[str]:
    """Freezes `model` and puts a LoRALinear in place of each of the placement's modules; returns their names. Weights of
    experts (`...experts.down_proj`) get an update for each expert (experts.py).

    `init` says how A begins: "kaiming", "gaussian", "orthogonal" or "eva" (see init.py); B begins at zero. "eva" takes the
    first rows of `eva`, which is `report.eva` of `score(..., eva_rank=...)`. Otherwise A is drawn from the seed and the
    module's name, so that it depends on nothing else. If an error is raised, the model is unchanged.

    With a `name` the model can take more adapters, each of its own modules, ranks and options, and `active` says which rows of
    a batch take which (many.py). Weights of experts have no names.

    Raises PlacementError for modules that the model does not have, for ranks and vectors that do not fit it and for modules
    that share their weight with others, ConfigError for an `init` that is unknown or disagrees with `eva` and for what
    experts cannot have (dropout, DoRA, a name), AdapterError where the model has adapters already (with `name`: one of this
    name, or one without), ModelError for quantised modules, and BackendError where `backend` cannot run on the modules'
    device.

    >>> placement = pf.place(pf.score(model, batches), rule=["v_proj"], rank=4)
    >>> pf.inject(model, placement)
    ['model.layers.0.self_attn.v_proj', 'model.layers.1.self_attn.v_proj', 'model.layers.2.self_attn.v_proj']
    """
    check_init(init, eva)
    check_name(model, name)
    options = {"dropout": dropout, "rslora": rslora, "dora": dora, "backend": backend}
    modules = plain_modules(model)
    experts = _checked(model, modules, placement, options, eva, name)
    with undone_on_error(model, name):
        kept = {id(parameter) for one in every_adapter(model) for parameter in one.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
        _put(model, modules, experts, placement, options, seed, init, eva, name)
        return list(adapters(model, name))


def check_name(model: nn.Module, name: str | None) -> None:
    """Raises AdapterError where the model has adapters that an adapter of this name, or without one, does not go with."""
    if every_adapter(model) and (name is None or adapters(model)):
        named = f" with names ({', '.join(adapter_names(model))})" * bool(adapter_names(model))
        raise AdapterError(f"the model has LoRA adapters{named} already: unload(model) or merge(model) first")
    if name is not None and not isinstance(name, str):
        raise AdapterError(f"name of an adapter: expected a text, got {name!r:.60}")
    if name is not None and (problem := problem_of_text(name)):
        raise AdapterError(f"name of an adapter: {problem}")
    if name in adapter_names(model):
        raise AdapterError(
            f"the model has an adapter {name!r} already: unload(model, {name!r}) first, or give another name"
        )
    if any(place.merged for place in named_places(model)):
        raise AdapterError("an adapter is merged into the weights: unmerge_adapter(model) first")


def _checked(
    model: nn.Module, modules: Mapping[str, nn.Module], placement: Placement, options: Mapping[str, Any],
    eva: Mapping[str, torch.Tensor] | None, called: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Raises what `inject` raises for a placement, and warns; returns the weights of experts by name."""
    on_gpu, backend = False, options["backend"]
    linear = all(name in modules and is_linear(modules[name]) for name in placement.modules)
    experts = {} if linear else {info.name: info for info in expert_weights(model)}
    for name, (rank, _) in placement.modules.items():
        if name not in experts and (name not in modules or not is_linear(modules[name])):
            adapted = name.removesuffix(".base") in modules and name != name.removesuffix(".base")
            remedy = "make it before any adapter is put in" if adapted else "was it made for another model?"
            raise PlacementError(
                f"the placement names {name!r}, which is not a linear module of this {type(model).__name__}; {remedy}"
            )
        frozen = experts[name].frozen if name in experts else frozen_of(modules[name], name)
        n_out, n_in = frozen.shape
        if name in experts:
            _check_expert_options(name, {"dropout": options["dropout"], "dora": options["dora"], "name": called})
        if (made_for := placement.shapes.get(name, (n_out, n_in))) != (n_out, n_in):
            raise PlacementError(
                f"{name}: the placement was made for a {made_for[0]} x {made_for[1]} weight, and this model's is {n_out} x "
                f"{n_in}: place anew for this model"
            )
        check_rank(rank, n_in, n_out, f"{name}: ")
        if eva is not None and name not in experts:
            check_vectors(eva.get(name), name, rank, n_in)
        on_gpu |= path(frozen.device, backend) != "torch"
    if shared := sharers(model, [name for name in placement.modules if name not in experts]):
        name, others = next(iter(shared.items()))
        raise PlacementError(
            f"{name} shares its weight with {' and '.join(others)}, so merging would change these too: leave it out of the "
            "placement, or give it a weight of its own (for a tied head: tie_word_embeddings = False)"
        )
    excluded = exclusions(model)
    if read := [name for name in placement.modules if excluded.get(name) == READ]:
        warnings.warn(
            f"{read[0]}{f' and {len(read) - 1} more' * (len(read) > 1)}: another module of this {type(model).__name__} reads the "
            "weight itself, and there the adapter does not count; no rule chooses such modules",
            stacklevel=2,
        )
    if eva is not None and (without := experts.keys() & placement.modules.keys()):
        warnings.warn(
            f"{min(without)}{f' and {len(without) - 1} more' * (len(without) > 1)}: EVA has no vectors of experts, so their A begins "
            "as with init kaiming",
            stacklevel=2,
        )
    if on_gpu and (note := tuning.load()):
        warnings.warn(note, stacklevel=2)
    return experts


def _put(
    model: nn.Module, modules: Mapping[str, nn.Module], experts: Mapping[str, Any], placement: Placement,
    options: dict[str, Any], seed: int, init: str, eva: Mapping[str, torch.Tensor] | None, called: str | None,
) -> None:  # fmt: skip
    """Puts the adapters in."""
    rslora, backend, routing = options["rslora"], options["backend"], routing_of(model) or Routing()
    for name, (rank, alpha) in placement.modules.items():
        if name in experts:
            info = experts[name]
            kind = "kaiming" if init == "eva" else init
            draws = [draw_seeded_A(kind, rank, info.n_in, seed, f"{name}.{e}") for e in range(info.experts)]
            lora_A = torch.stack(draws)
            adapter = ExpertLoRA(info.frozen, rank, alpha, rslora=rslora, lora_A=lora_A, backend=backend)
            inject_experts(model, name, info.mixture, adapter)
            continue
        base = modules[name]
        n_in = frozen_of(base).shape[1]
        lora_A = draw_seeded_A(init, rank, n_in, seed, name) if eva is None else eva[name][:rank].float().clone()
        if called is None:
            wrapped = LoRALinear(base, rank, alpha, lora_A=lora_A, **options)
            wrapped.frozen = frozen_in(model, base, name)
            replace_module(model, name, wrapped.train(base.training))
            continue
        place = model.get_submodule(name)
        if not isinstance(place, ManyLoRA):
            place = ManyLoRA(name, base, frozen_in(model, base, name), routing).train(base.training)
            replace_module(model, name, place)
        member = NamedLoRA(base, rank, alpha, name=called, lora_A=lora_A, **options)
        member.frozen = place.frozen
        place.members.append(member.train(base.training))
        routing.is_checked = False


def _check_expert_options(name: str, options: Mapping[str, Any]) -> None:
    if given := [f"--{option}" for option, value in options.items() if value]:
        raise ConfigError(
            f"{name}: adapters of experts have no {' or '.join(given)} (PEFT's files hold none for them): leave it out, or the "
            "experts (give --rule module types without experts)"
        )


@contextlib.contextmanager
def undone_on_error(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Takes adapters out again (those of this name) where an exception comes, Ctrl-C too, and gives parameters their
    `requires_grad` back."""
    put_back = remember_requires_grad(model)
    try:
        yield
    except BaseException:
        unload(model, name)
        put_back()
        raise


def unload(model: nn.Module, name: str | None = None) -> list[str]:
    """Takes the adapters out, or those of this name, and puts the plain modules back with their weights unchanged, also where one
    was merged by `merge_adapter`. Returns the names of their modules. Raises AdapterError for one that `active` has chosen now."""
    routing = routing_of(model)
    if routing and (in_use := routing.names() if name is None else routing.names() & {name}):
        raise AdapterError(f"the adapter {min(in_use)!r} answers rows now: unload it after pf.active(...) has ended")
    removed = adapters(model, name)
    for module_name, module in removed.items():
        take_out(model, module_name, module)
    if name is not None:
        return list(removed)
    for other in adapter_names(model):
        removed |= dict.fromkeys(unload(model, other))
    put_back(model)
    return list(removed)


def take_out(model: nn.Module, name: str, module: Any) -> None:
    """Puts what an adapter was put on back in its place."""
    if isinstance(module, ExpertLoRA):
        remove_experts(model, name)
    elif isinstance(module, NamedLoRA):
        place: Any = model.get_submodule(name)
        if place.merged == module.name:
            unmerge_place(place)
        place.members = nn.ModuleList(one for one in place.members if one is not module)
        place.routing.turn += 1
        if not place.members:
            replace_module(model, name, place.base)
    else:
        replace_module(model, name, module.base)
