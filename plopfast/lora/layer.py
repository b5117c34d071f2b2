"""LoRA on a model's linear modules, in place: inject, disable, merge, unload.

    y = W x + scaling B A x,   scaling = alpha / rank

W is frozen, and A and B are trained (Hu et al., "LoRA", arXiv 2106.09685). With rsLoRA (arXiv 2312.03732) the scaling
is alpha / sqrt(rank).
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..models.exclusions import READ, exclusions
from ..models.experts import expert_weights
from ..models.frozen import QuantizedWeight, frozen_in, frozen_of, is_linear, sharers, streamed_in
from ..models.quantized_experts import make_dense
from ..models.routed import QuantizedExpertWeight
from ..models.running import remember_requires_grad
from ..support.errors import AdapterError, ConfigError, PlacementError
from . import dora as dora_math, tuning
from .experts import ExpertLoRA, inject_experts, merge_codes, remove_experts
from .init import check_init, check_vectors, draw_A, draw_seeded_A
from .ops import lora_linear, new_seed, path
from .placement import Placement, check_rank
from .replaced import base_values, keep_values, put_back


class LoRALinear(nn.Module):
    """A frozen linear module (nn.Linear or transformers' Conv1D) with a low-rank update.

    lora_A [rank, in] and lora_B [out, rank] are float32, whatever the dtype of `base`. `lora_A` gives the first value of
    A; without it, A is drawn Kaiming-uniform. `backend` is that of `lora_linear`. `dora` trains the length of each row of
    the weight, too: lora_magnitude [out], float32 (dora.py).

    Dropout draws one seed a call from torch's generator and stores no mask, so it is reproducible under
    `torch.manual_seed` and activation checkpointing.

    Raises ModelError for a `base` that isn't a linear module or is quantised, PlacementError where the rank is below 1 or
    above the smaller side of the weight, and BackendError where `backend` cannot run.
    """

    squares: torch.Tensor | None

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        backend: str = "auto",
        lora_A: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.frozen = frozen_of(base)
        n_out, n_in = self.frozen.shape
        device = self.frozen.device
        check_rank(rank, n_in, n_out)
        path(device, backend)
        self.backend = backend
        self.base = base
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.enabled = True
        self.low: tuple[torch.Tensor, torch.Tensor] | None = None  # see Prepared()
        self.shared: Any = None  # a SharedInput of shared.py, where it reads what others read too
        self.lora_A = nn.Parameter((draw_A("kaiming", rank, n_in) if lora_A is None else lora_A).to(device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, device=device))
        squares_N = dora_math.squares(self.frozen).to(device) if dora else None
        self.lora_magnitude = None if squares_N is None else nn.Parameter(squares_N.sqrt())
        self.register_buffer("squares", squares_N, persistent=False)  # ||W||^2 of each row
        base.requires_grad_(False)  # nothing above changes the base, in case it raises

    @property
    def weight(self) -> torch.Tensor:
        """The frozen parameter, because some models read the dtype of their linear modules' weights."""
        return self.frozen.stored

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]"""
        base, magnitude = self.base, self.lora_magnitude
        if not self.enabled:
            return base(x)
        p = self.dropout if self.training else 0.0
        y = None if self.shared is None else self.shared.y_of(self, x, p)
        if y is None:
            y = lora_linear(
                x,
                self.frozen.weight_NK,
                self.lora_A,
                self.lora_B,
                scaling=self.scaling,
                bias=base.bias if magnitude is None else None,  # type: ignore[arg-type]
                dropout_p=p,
                seed=new_seed(x.device) if p else None,
                backend=self.backend,
                low=self.low,
            )
        return y if magnitude is None else dora_math.scaled(y, magnitude, self.lengths(), self.bias)

    @property
    def product_bias(self) -> torch.Tensor | None:
        """The bias that the product adds; with DoRA it comes after the lengths."""
        return self.base.bias if self.lora_magnitude is None else None  # type: ignore[return-value]

    def lengths(self) -> torch.Tensor:
        """||W + scaling B A|| of each row [out], in float32, without a gradient."""
        assert self.squares is not None, "it has no lora_magnitude"
        return dora_math.lengths(self.frozen.weight_NK, self.squares, self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def delta_NK(self) -> torch.Tensor:
        """The update of the weight, scaling B A [out, in], in float32; with DoRA g (W + scaling B A) - W."""
        delta = self.scaling * (self.lora_B.float() @ self.lora_A.float())
        if self.lora_magnitude is None:
            return delta
        w_NK = self.frozen.dequantize().float()
        whole = w_NK + delta
        return whole * (self.lora_magnitude / whole.norm(dim=1).clamp_min(dora_math.TINY))[:, None] - w_NK

    def merged_weight(self) -> torch.Tensor:
        """W + scaling B A in the base module's layout and dtype; the base stays as it is."""
        return self.frozen.plus(self.delta_NK())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, rslora={self.rslora}"


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


def adapters(model: nn.Module) -> dict[str, Any]:
    """Name -> LoRALinear, or ExpertLoRA for a weight of experts, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear | ExpertLoRA)}


def _take_out(model: nn.Module, name: str, module: Any) -> None:
    """Puts what an adapter was put on back in its place."""
    if isinstance(module, ExpertLoRA):
        remove_experts(model, name)
    else:
        replace_module(model, name, module.base)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switches the adapters off while the context lasts, and what they replace whole; those that were off before stay off."""
    modules = [module for module in adapters(model).values() if module.enabled]
    try:
        for module in modules:
            module.enabled = False
        with base_values(model):
            yield
    finally:
        for module in modules:
            module.enabled = True


def merge(model: nn.Module, *, into: str | None = None) -> list[str]:
    """Adds each update to its frozen weight and puts the plain modules back; returns their names.

    Quantised weights take no update in place, so for them say `into`: "dense" makes all of the model's quantised modules
    dense, "quantized" those with an update quantised anew, which rounds W and its update to codes.

    `merge_checked` compares the logits, too. Raises AdapterError, before anything is changed, where a weight is shared, and
    for quantised weights without `into`. After an exception half way, such as Ctrl-C, each module is either merged or as it
    was, so the model computes the same; another call merges the rest.
    """
    merged = adapters(model)
    if streamed := streamed_in(model):
        raise AdapterError(
            f"{streamed[0].removesuffix('.base')} is streamed, and the host's copy takes no update: unstream(model) first, or "
            "load the model without --stream"
        )
    for name, others in sharers(model, [n for n, m in merged.items() if isinstance(m, LoRALinear)]).items():
        raise AdapterError(f"{name} shares its weight with {' and '.join(others)}: merging would change these too")
    if into not in (None, "dense", "quantized"):
        raise AdapterError(f'merge: expected into="dense" or into="quantized", got {into!r}')
    if into is None and (codes := {name: m.frozen.kind for name, m in merged.items() if m.frozen.kind != "dense"}):
        name, kind = next(iter(codes.items()))
        raise AdapterError(
            f'{name} has {kind} weights, which take no update in place: merge(model, into="dense"), or into="quantized", which '
            "rounds the sum to codes"
        )
    for name, module in merged.items():
        if isinstance(module.frozen, QuantizedWeight):
            replace_module(model, name, module.frozen.merged(module.delta_NK(), dense=into == "dense"))
            continue
        if isinstance(module.frozen, QuantizedExpertWeight):
            merge_codes(model, name, module, dense=into == "dense")
            continue
        before = module.frozen.stored.detach().clone()
        try:
            module.frozen.add_(module.delta_NK if isinstance(module, ExpertLoRA) else module.delta_NK())
            _take_out(model, name, module)
        except BaseException:
            if name in adapters(model):
                module.frozen.stored.detach().copy_(before)
            raise
    keep_values(model)
    if into == "dense":
        make_dense(model)
    return list(merged)


def unload(model: nn.Module) -> list[str]:
    """Takes the adapters out and puts the plain modules back with their weights unchanged; returns their names."""
    removed = adapters(model)
    for name, module in removed.items():
        _take_out(model, name, module)
    put_back(model)
    return list(removed)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
