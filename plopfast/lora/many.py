"""Several adapters with names on one frozen linear module, and which rows of a batch take which.

    y = W x + scaling_a B_a A_a x     for each row that takes the adapter a

Each is a LoRA (Hu et al., arXiv 2106.09685) of its own rank and alpha. The frozen product is one for all rows, whoever they
belong to, so the base is read once (as in Punica, arXiv 2310.18547, and LoRAFusion, arXiv 2510.00206). `active` (active.py)
says which rows take which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.frozen import FrozenWeight
from ..models.running import in_backward
from ..support.errors import AdapterError
from .layer import LoRALinear
from .many_ops import lora_linear_grouped
from .ops import lora_linear, new_seed


@dataclass(frozen=True)
class Use:
    """What a row of a batch takes: the adapter of this name (None: the base alone), but not in the modules `without`.

    These are types (`down_proj`), parts of names (`mlp`, `layers.0`) or whole names of modules.

    >>> pf.Use("legal", without=["mlp"])
    Use(name='legal', without=['mlp'])
    """

    name: str | None
    without: Sequence[str] = ()

    def leaves_out(self, module: str) -> bool:
        """Whether the adapter is off in the module of this name."""
        return any(f".{part}." in f".{module}." for part in self.without)


class Routing:
    """Which runs of rows take what, in the batches that come. A model has one, which its ManyLoRA modules share."""

    def __init__(self) -> None:
        self.runs: tuple[tuple[Use, int], ...] = ()  # with their rows, or tokens where rows are packed; empty: not said
        self.outer: list[tuple[tuple[Use, int], ...]] = []  # those of the contexts around
        self.turn = 0  # changes with `runs`
        self.is_checked = False  # whether the modules are known to read rows one after the other

    def enter(self, runs: Sequence[tuple[Use, int]]) -> None:
        """Puts `runs` in force."""
        self.outer.append(self.runs)
        self.runs, self.turn = tuple(runs), self.turn + 1

    def leave(self) -> None:
        """Puts those in force that were before."""
        self.runs, self.turn = self.outer.pop(), self.turn + 1

    def names(self) -> set[str]:
        """The adapters that are chosen now, or will be again when a context ends."""
        return {use.name for runs in (*self.outer, self.runs) for use, _ in runs if use.name is not None}


class NamedLoRA(LoRALinear):
    """One of several adapters of a module, by itself a LoRALinear. The module's base is registered with its ManyLoRA alone.

    Dropout's seeds come from `generator`, where it has one: so each of several trainings draws what it would draw alone.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, *, name: str, **options: Any) -> None:
        super().__init__(base, rank, alpha, **options)
        self.name = name
        self.generator: torch.Generator | None = None
        self._seed: torch.Tensor | None = None
        del self._modules["base"]
        self.__dict__["base"] = base

    def draw_seed(self, device: torch.device) -> torch.Tensor:
        """The seed of one call's dropout; where a block is computed again in the backward pass, that of its first time."""
        if self.generator is None:
            return new_seed(device)
        if self._seed is None or not in_backward():
            self._seed = torch.randint(1 << 62, (), generator=self.generator, device="cpu")
        return self._seed


class ManyLoRA(nn.Module):
    """Stands in the place of a linear module that has adapters with names."""

    def __init__(self, name: str, base: nn.Module, frozen: FrozenWeight, routing: Routing) -> None:
        super().__init__()
        self.name, self.frozen, self.routing = name, frozen, routing
        self.base = base
        self.members: Any = nn.ModuleList()  # of NamedLoRAs
        self.merged: str | None = None  # the name of the adapter whose update is in W now
        self.before_merge: torch.Tensor | None = None  # W as it was, in CPU memory
        self._turn = -1
        self._taken: list[tuple[NamedLoRA | None, int]] = []

    @property
    def weight(self) -> torch.Tensor:
        """The frozen parameter, because some models read the dtype of their linear modules' weights."""
        return self.frozen.stored

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def member(self, name: str | None) -> NamedLoRA | None:
        """The adapter of this name, if the module has one."""
        return next((one for one in self.members if one.name == name), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]"""
        if not any(one.enabled for one in self.members):  # see `disabled`
            return self._alone(x, None)
        taken = [(one if one is not None and one.enabled else None, rows) for one, rows in self._runs()]
        if len(taken) == 1:
            return self._alone(x, taken[0][0])
        total, tokens = sum(rows for _, rows in taken), x.numel() // x.shape[-1]
        if tokens % total:
            raise AdapterError(
                f"{self.name} gets {tokens} tokens of a batch for which {total} adapters were named, so no token's own is known"
            )
        cuts = [0]
        for _, rows in taken:
            cuts.append(cuts[-1] + rows * (tokens // total))
        if any(one is not None and one.lora_magnitude is not None for one, _ in taken):  # DoRA scales whole outputs
            x_MK = x.reshape(tokens, x.shape[-1])
            parts = [self._alone(x_MK[i:j], one) for (one, _), i, j in zip(taken, cuts, cuts[1:], strict=False)]
            return torch.cat(parts).view(*x.shape[:-1], -1)
        terms = [self._term(one, x.device) for one, _ in taken]
        a, b, scalings, ps, seeds, low = map(list, zip(*terms, strict=True))
        return lora_linear_grouped(
            x, self.frozen.weight_NK, a, b, cuts, scalings, bias=self.bias, dropout_ps=ps, seeds=seeds,
            backend=self.members[0].backend, low=low,
        )  # fmt: skip

    def _runs(self) -> list[tuple[NamedLoRA | None, int]]:
        """Which adapter each run of rows takes here; neighbours alike are one run."""
        routing = self.routing
        if self._turn == routing.turn:
            return self._taken
        if not routing.runs:
            raise AdapterError(
                f"the model has adapters with names ({', '.join(one.name or '' for one in self.members)}), and none was chosen: "
                'with pf.active(model, "NAME"): ..., or a name for each row; None is the base alone'
            )
        found: list[tuple[NamedLoRA | None, int]] = []
        for use, rows in routing.runs:
            one = None if use.leaves_out(self.name) else self.member(use.name)
            if found and found[-1][0] is one:
                rows += found.pop()[1]
            found.append((one, rows))
        self._turn, self._taken = routing.turn, found
        return found

    def _alone(self, x: torch.Tensor, one: NamedLoRA | None) -> torch.Tensor:
        """All rows with one adapter, or with none."""
        merged = self.member(self.merged)
        if one is merged:
            return self.base(x)
        if merged is None and one is not None:
            return one(x)
        a, b, scaling, p, seed, _ = self._term(one, x.device)
        return lora_linear(
            x, self.frozen.weight_NK, a, b, scaling=scaling, bias=self.bias, dropout_p=p, seed=seed, backend=self.members[0].backend
        )  # fmt: skip

    def _term(self, one: NamedLoRA | None, device: torch.device) -> tuple[Any, ...]:
        """(A, B, scaling, dropout rate, its seed, A and B in the weight's dtype) of what is added to W x. Where an update is in
        W, it is taken off again for rows that don't take it."""
        merged = self.member(self.merged)
        if one is merged:
            return None, None, 1.0, 0.0, None, None
        if merged is None and one is not None:
            p = one.dropout if one.training else 0.0
            return one.lora_A, one.lora_B, one.scaling, p, one.draw_seed(device) if p else None, one.low
        parts = [(each, sign * each.scaling) for each, sign in ((merged, -1.0), (one, 1.0)) if each is not None]
        a = torch.cat([c * each.lora_A.detach() for each, c in parts])
        return a, torch.cat([each.lora_B.detach() for each, _ in parts], 1), 1.0, 0.0, None, None

    def extra_repr(self) -> str:
        return f"adapters={[one.name for one in self.members]}"


def named_places(model: nn.Module) -> list[ManyLoRA]:
    """The modules that have adapters with names."""
    return [module for module in model.modules() if isinstance(module, ManyLoRA)]


def routing_of(model: nn.Module) -> Routing | None:
    """The model's Routing; None for a model without adapters that have names."""
    return next((place.routing for place in named_places(model)), None)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, none where they have none."""
    return list(dict.fromkeys(str(one.name) for place in named_places(model) for one in place.members))


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its name in the plain model, where one that has adapters with names is the one that these were put on."""
    found = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name, module in found.items() if isinstance(module, ManyLoRA))
    return {
        name: module.base if isinstance(module, ManyLoRA) else module
        for name, module in found.items()
        if not name.startswith(inside)
    }


@torch.no_grad()
def merge_place(place: ManyLoRA, one: NamedLoRA) -> None:
    """W += the update of `one`; W as it was is kept in CPU memory."""
    place.before_merge = place.frozen.stored.detach().to("cpu", copy=True)
    place.frozen.add_(one.delta_NK())
    place.merged = one.name


@torch.no_grad()
def unmerge_place(place: ManyLoRA) -> None:
    """Puts W back as it was before `merge_place`, bit for bit."""
    if place.before_merge is not None:
        place.frozen.stored.detach().copy_(place.before_merge)
    place.merged, place.before_merge = None, None
