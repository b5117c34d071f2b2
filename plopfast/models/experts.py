"""The experts of a mixture: one parameter for all experts of a layer, and what computes with it.

    y_t = sum over the experts e that token t is routed to of  p_te down_e(gate(up_e(x_t)))

transformers' classes of experts name these parameters gate_up_proj (up_proj without a gate) and down_proj, with biases [E, N],
and store them [E, N, K], or [E, K, N] (GPT-OSS). Llama 4's runs every expert on all tokens, with those of other experts
set to zero. A module counts where `Mixture.run` gives what its own forward gives.

E experts, N out, K in, T tokens, S rows: one for each token and expert that it is routed to, sorted by expert.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..support.errors import ModelError
from .exclusions import in_layers
from .frozen import DTYPES, FrozenWeight, frozen_of
from .linears import LinearInfo, linear_modules, place_in_layer
from .quantized import ExpertCodes
from .routed import ExpertWeight, Route, plain_product, weight_of

UP = ("gate_up_proj", "up_proj")
DOWN = "down_proj"


@dataclass(frozen=True)
class ExpertInfo:
    """One weight of all experts of a layer, as `linears.LinearInfo` is one of a linear module."""

    name: str  # of the parameter
    mixture: "Mixture"
    key: str
    type: str
    layer: int | None
    n_in: int
    n_out: int
    experts: int

    @property
    def frozen(self) -> "ExpertWeight":
        return self.mixture.weight(self.key)


Product = Callable[[str, torch.Tensor, Route], torch.Tensor]  # (key, x [S, K], route) -> y [S, N], bias included


@dataclass(frozen=True)
class Mixture:
    """A module of experts, and how it computes."""

    module: Any
    routed: bool  # tokens to their own experts, or all tokens to every expert

    @property
    def keys(self) -> tuple[str, str]:
        """The parameters that are applied first and last."""
        return next(key for key in UP if key in self.module._parameters or key in self.module._modules), DOWN

    def weight(self, key: str) -> ExpertWeight:
        return weight_of(self.module, key, getattr(self.module, "is_transposed", not self.routed))

    def run(self, product: Product, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's forward for its own arguments, with `product` for its two products."""
        module, (up, down) = self.module, self.keys
        hidden, *routing = _signature(type(module).forward).bind(module, *args, **kwargs).args[1:]
        experts = self.weight(down).experts
        x_TK = hidden.reshape(-1, hidden.shape[-1])
        if not self.routed:
            route = Route.of_all(len(x_TK), experts, x_TK.device)
            gate, value = product(up, x_TK, route).chunk(2, dim=-1)
            return product(down, value * module.act_fn(gate), route)
        chosen_Tk, weights_Tk = routing
        route = Route.of(chosen_Tk, experts)
        h_SN = product(up, x_TK[route.tokens], route)
        y_SN = product(down, module._apply_gate(h_SN) if module.has_gate else module.act_fn(h_SN), route)
        if module.has_post_expert_norm:
            y_SN = module.post_expert_norm(y_SN)
        y_SN = y_SN * weights_Tk.reshape(-1)[route.order, None]
        back_S = torch.empty_like(route.order)
        back_S[route.order] = torch.arange(len(back_S), device=back_S.device)
        # a sum over each token's own rows: index_add_ has another order in each run on a GPU
        return y_SN[back_S].view(*chosen_Tk.shape, -1).sum(1).to(hidden.dtype).view(hidden.shape)


_signature = functools.cache(inspect.signature)  # of a class's forward, which takes longer to find than to bind


def mixtures(model: nn.Module) -> dict[str, Mixture]:
    """Modules of experts inside the layers, by name, that compute what `Mixture.run` does."""
    found = {name: mixture_of(module) for name, module in model.named_modules() if in_layers(name)}
    return {name: mixture for name, mixture in found.items() if mixture is not None}


def expert_weights(model: nn.Module) -> list[ExpertInfo]:
    """Lists the weights of the mixtures, in order. Their type is "experts.down_proj": the module's own name with the weight's."""
    infos = []
    for name, mixture in mixtures(model).items():
        layer, inner = place_in_layer(name)
        for key in mixture.keys:
            weight = mixture.weight(key)
            n_out, n_in = weight.shape
            infos.append(
                ExpertInfo(f"{name}.{key}", mixture, key, f"{inner[-1]}.{key}", layer, n_in, n_out, weight.experts)
            )
    return infos


def weights_of(model: nn.Module, include_head: bool = False) -> list[LinearInfo | ExpertInfo]:
    """All that can be scored and adapted: linear modules, then weights of experts. Raises as `linear_modules` does."""
    return [*linear_modules(model, include_head), *expert_weights(model)]


def weight_at(model: nn.Module, name: str) -> FrozenWeight | ExpertWeight:
    """The frozen weight of a linear module, or of the experts of a layer, by its name. Raises ModelError as `frozen_of` does,
    and where the model has neither."""
    place, _, key = name.rpartition(".")
    try:
        owner: Any = model.get_submodule(place)
    except AttributeError:
        owner = None
    module = None if owner is None else owner._modules.get(key)
    if module is None or isinstance(module, ExpertCodes):
        mixture = None if owner is None else mixture_of(owner)
        if mixture is None or key not in mixture.keys:
            raise ModelError(f"{type(model).__name__} has no linear module or weight of experts {name!r}")
        return mixture.weight(key)
    carried = getattr(module, "frozen", None)  # an adapter's
    return carried if isinstance(carried, ExpertWeight) else frozen_of(module, name)


def mixture_of(module: Any) -> Mixture | None:
    """How a module of experts computes; None for every other module, and for experts of another kind."""
    if isinstance(computed := vars(module).get("forward"), BySegments):
        return computed.mixture
    own = module._parameters
    held = [own.get(key) for key in (*UP, DOWN)]
    if held[2] is None or (held[0] is None) == (held[1] is None):
        return None
    if any(p is not None and (p.dim() != 3 or p.dtype not in DTYPES) for p in held):
        return None
    if getattr(module, "_is_expert_parallel", False):
        return None
    kind = type(module)
    if any(p is not None and not _has_values(p) for p in held):
        return Mixture(module, True) if hasattr(module, "has_gate") else None
    if kind not in _KNOWN:
        _KNOWN[kind] = next((routed for routed in (True, False) if _agrees(Mixture(module, routed))), None)
    routed = _KNOWN[kind]
    return None if routed is None else Mixture(module, routed)


class BySegments:
    """The forward of a module of experts by `Mixture.run`: of those whose weights are codes, which its class does not read."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the module's own."""
        return self.mixture.run(self._product, *args, **kwargs)

    def _product(self, key: str, x_SK: torch.Tensor, route: Route) -> torch.Tensor:
        return plain_product(self.mixture.weight(key), x_SK, route)


_KNOWN: "weakref.WeakKeyDictionary[type, bool | None]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def _agrees(mixture: Mixture) -> bool:
    """Whether `run` gives what the module's own forward gives for a few tokens."""
    module, weight = mixture.module, mixture.weight(mixture.keys[0])
    n_in, experts = weight.shape[1], weight.experts
    draw = torch.Generator().manual_seed(0)
    tokens, most = (3, min(2, experts)) if mixture.routed else (2 * experts, 0)
    x_TK = torch.randn(tokens, n_in, generator=draw).to(weight.stored)
    chosen = torch.stack([torch.randperm(experts, generator=draw)[:most] for _ in range(tokens)]).to(weight.device)
    inputs = [x_TK, chosen, torch.rand(tokens, most, generator=draw).to(weight.stored)] if mixture.routed else [x_TK]

    def plain(key: str, x_SK: torch.Tensor, route: Route) -> torch.Tensor:
        one = mixture.weight(key)
        return one.with_bias(one.product(x_SK, route), route)

    try:
        want, got = type(module).forward(module, *inputs), mixture.run(plain, *inputs)
    except Exception:  # anybody's forward may raise anything where it takes other inputs
        return False
    if not isinstance(want, torch.Tensor) or (got.shape, got.dtype) != (want.shape, want.dtype):
        return False
    within = 16 * torch.finfo(want.dtype).eps
    return bool((got - want).norm() <= within * want.norm())


def _has_values(parameter: torch.Tensor) -> bool:
    """False for those of "meta" and for fake ones, with which nothing can be compared."""
    return type(parameter) in (torch.Tensor, nn.Parameter) and not parameter.is_meta
