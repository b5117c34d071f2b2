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
from . import tuning
from .experts import ExpertLoRA, inject_experts, remove_experts
from .init import check_init, check_vectors, draw_seeded_A
from .layer import LoRALinear, adapters, replace_module
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
) -> list[str]:
    """Freezes `model` and puts a LoRALinear in place of each of the placement's modules; returns their names. Weights of
    experts (`...experts.down_proj`) get an update for each expert (experts.py).

    `init` says how A begins: "kaiming", "gaussian", "orthogonal" or "eva" (see init.py); B begins at zero. "eva" takes the
    first rows of `eva`, which is `report.eva` of `score(..., eva_rank=...)`. Otherwise A is drawn from the seed and the
    module's name, so that it depends on nothing else. If an error is raised, the model is unchanged.

    Raises PlacementError for names that the model does not have, for ranks and vectors that do not fit it and for modules
    that share their weight with others, ConfigError for an `init` that is unknown or disagrees with `eva` and for what
    experts cannot have (dropout, DoRA), AdapterError where the model has adapters already, ModelError for quantised
    modules, and BackendError where `backend` cannot run on the modules' device.
    """
    check_init(init, eva)
    if adapters(model):
        raise AdapterError("the model has LoRA adapters already: unload(model) or merge(model) first")
    modules, on_gpu = dict(model.named_modules(remove_duplicate=False)), False
    linear = all(name in modules and is_linear(modules[name]) for name in placement.modules)
    experts = {} if linear else {info.name: info for info in expert_weights(model)}
    for name, (rank, _) in placement.modules.items():
        if name not in experts and (name not in modules or not is_linear(modules[name])):
            raise PlacementError(
                f"the placement names {name!r}, which is not a linear module of this {type(model).__name__}; "
                "was it made for another model?"
            )
        frozen = experts[name].frozen if name in experts else frozen_of(modules[name], name)
        n_out, n_in = frozen.shape
        if name in experts:
            _check_expert_options(name, {"dropout": dropout, "dora": dora})
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
    with undone_on_error(model):
        model.requires_grad_(False)
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
            wrapped = LoRALinear(
                base, rank, alpha, dropout=dropout, rslora=rslora, dora=dora, backend=backend, lora_A=lora_A
            )
            wrapped.frozen = frozen_in(model, base, name)
            replace_module(model, name, wrapped.train(base.training))
        return list(adapters(model))


def _check_expert_options(name: str, options: Mapping[str, Any]) -> None:
    if given := [f"--{option}" for option, value in options.items() if value]:
        raise ConfigError(
            f"{name}: adapters of experts have no {' or '.join(given)} (PEFT's files hold none for them): leave it out, or the "
            "experts (give --rule module types without experts)"
        )


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Takes adapters out again where an exception comes, Ctrl-C too, and gives parameters their `requires_grad` back."""
    put_back = remember_requires_grad(model)
    try:
        yield
    except BaseException:
        unload(model)
        put_back()
        raise


def unload(model: nn.Module) -> list[str]:
    """Takes the adapters out and puts the plain modules back with their weights unchanged; returns their names."""
    removed = adapters(model)
    for name, module in removed.items():
        take_out(model, name, module)
    put_back(model)
    return list(removed)


def take_out(model: nn.Module, name: str, module: Any) -> None:
    """Puts what an adapter was put on back in its place."""
    if isinstance(module, ExpertLoRA):
        remove_experts(model, name)
    else:
        replace_module(model, name, module.base)
