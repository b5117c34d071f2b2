"""PEFT's LoRA layers with plopfast's operations behind them: the same objects, of a subclass.

A layer computes by `lora_linear` where exactly one adapter is active, is plain LoRA on a frozen weight, and nobody watches
the parts inside; layers that read one input compute together. PEFT's own forward does all else: several adapters at once,
`adapter_names`, merged or disabled adapters, variants such as DoRA, hooks. It is decided anew in each call, so whatever PEFT
does to a layer later holds.

Nothing here binds a layer from outside, so a copied or unpickled model computes with its own weights.
"""

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from ..lora.ops import is_direct, lora_linear, new_seed
from ..lora.shared import MAX_RANKS, SharedInput
from ..models.frozen import FrozenWeight, QuantizedWeight, find_frozen, is_altered, is_sharded
from ..support.errors import AdapterError

FROZEN, READS_WITH = "_plopfast_frozen", "_plopfast_reads_with"  # attributes of a layer: a FrozenWeight, a ReadTogether
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fast:
    """The forward of a PEFT LoRA layer, ahead of the layer's own class."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args and not kwargs and (member := member_of(self, x)) is not None:
            together = vars(self).get(READS_WITH)
            y = None if together is None else together.y_of(self, member, x)
            return member.y_of(x) if y is None else y
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class FastLinear(Fast, PeftLinear):
    """A `peft.tuners.lora.Linear`."""


@dataclass(eq=False, slots=True)
class Member:
    """What one call of a layer computes with; named as a LoRALinear's, so that SharedInput takes it for one."""

    frozen: FrozenWeight
    lora_A: torch.Tensor  # noqa: N815
    lora_B: torch.Tensor  # noqa: N815
    scaling: float
    dropout: float
    backend: str = "auto"
    training: bool = True  # `dropout` is 0 where the layer doesn't train
    low: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def base(self) -> nn.Module:
        return self.frozen.module

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    @property
    def product_bias(self) -> torch.Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def y_of(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]"""
        seed = new_seed(x.device) if self.dropout else None
        return lora_linear(
            x, self.frozen.weight_NK, self.lora_A, self.lora_B,
            scaling=self.scaling, bias=self.product_bias, dropout_p=self.dropout, seed=seed,
        )  # fmt: skip

    def kind(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """What members have to have in common; first the dtype of the product, which codes take from x."""
        own = dtype if isinstance(self.frozen, QuantizedWeight) else self.frozen.dtype
        return own, self.scaling, self.dropout, self.lora_A.dtype, self.lora_B.dtype

    def state(self) -> tuple[Any, ...]:
        """Differs where the same x would give another y now."""
        tensors = self.frozen.stored, self.lora_A, self.lora_B
        return (self.scaling, self.dropout, *((id(one), _version(one)) for one in tensors))


def member_of(layer: Any, x: torch.Tensor) -> Member | None:
    """What `layer` computes with on x; None where PEFT's forward has to do it."""
    if layer.disable_adapters or layer.merged_adapters or len(active := layer.active_adapters) != 1:
        return None
    name, frozen = active[0], vars(layer)[FROZEN]
    parts = vars(layer)["_modules"]
    base, lora_A, lora_B = parts["base_layer"], parts["lora_A"], parts["lora_B"]
    if name not in lora_A or name in layer.lora_variant or layer.lora_bias.get(name) or frozen.module is not base:
        return None
    down, up, drop = lora_A[name], lora_B[name], parts["lora_dropout"][name]
    if not are_plain(base, down, up, drop) or _is_transformed():
        return None
    p = drop.p if type(drop) is nn.Dropout and drop.training else 0.0
    scaling, A, B, bias = layer.scaling[name], down.weight, up.weight, base.bias
    dtype, autocast = computed_in(x)
    fits = (
        isinstance(scaling, int | float)  # PEFT's hot swapping of compiled models makes it a tensor
        and math.isfinite(scaling)
        and p < 1.0
        and {A.dtype, B.dtype} <= {dtype, torch.float32}
        and x.shape[-1:] == A.shape[1:]
        and A.device == B.device == x.device == frozen.device
        and (autocast or _takes(base, frozen, dtype))
        and not (frozen.stored.requires_grad or (bias is not None and bias.requires_grad))
        and not any(is_sharded(one) for one in (x, frozen.stored, A, B))
    )
    return Member(frozen, A, B, float(scaling), p) if fits else None


def computed_in(x: torch.Tensor) -> tuple[torch.dtype, bool]:
    """The dtype that a product of x is computed in, and whether autocast says so."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind), True
    return x.dtype, False


def _takes(base: nn.Module, frozen: FrozenWeight, dtype: torch.dtype) -> bool:
    """Whether the base computes in `dtype`: 4-bit layers of bitsandbytes may have a dtype of their own for it."""
    if isinstance(frozen, QuantizedWeight):
        return getattr(base, "compute_dtype", None) in (None, dtype)
    return frozen.dtype == dtype


def are_plain(*modules: nn.Module) -> bool:
    """Whether calling them would do nothing but compute: no hooks, and no forward that somebody put in its place."""
    if not torch.compiler.is_compiling() and nn.modules.module._has_any_global_hook():
        return False
    return not any("forward" in vars(one) or any(vars(one)[hooks] for hooks in HOOKS) for one in modules)


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which take no such operations."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active()) or torch.autograd.forward_ad._current_level >= 0


class ReadTogether:
    """Layers that read one input (query, key and value; gate and up): the first that is called computes for all.

    Their A are stacked anew in each call: what changes them through `.data`, as hot swapping does, leaves no trace.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.__setstate__(layers)
        self._x: Callable[[], torch.Tensor | None] = lambda: None
        self._key: tuple[Any, ...] = ()
        self._found: dict[Any, tuple[tuple[Any, ...], torch.Tensor]] = {}  # layer -> its state, and its output

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReadTogether":
        memo[id(self)] = made = ReadTogether([])
        made.__setstate__(copy.deepcopy(self.__reduce__()[2], memo))
        return made

    def __reduce__(self) -> Any:
        # the layers hold this object, so they come as its state, after it is made
        return ReadTogether, ([],), [layer for ref in self.layers if (layer := ref()) is not None]

    def __setstate__(self, layers: list[Any]) -> None:
        # weak, or a deleted model would wait for the garbage collector
        self.layers = [weakref.ref(layer) for layer in layers]

    def y_of(self, layer: Any, member: Member, x: torch.Tensor) -> torch.Tensor | None:
        """This layer's output [..., out], or None where it has to compute by itself."""
        if not is_direct(x):
            return None
        # x could be changed in place
        key = (_version(x), torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        if self._x() is not x or self._key != key:
            self._found = self._together(layer, member, x)
            self._x, self._key = weakref.ref(x), key
        state, y = self._found.pop(layer, (None, None))
        return y if state == member.state() else None

    def _together(self, layer: Any, member: Member, x: torch.Tensor) -> dict[Any, tuple[tuple[Any, ...], torch.Tensor]]:
        layers = [ref() for ref in self.layers]
        found = [member if one is layer else one and member_of(one, x) for one in layers]
        members: list[Any] = [one for one in found if one is not None]
        dtype, _ = computed_in(x)
        same = {m.kind(dtype) for m in members} == {(dtype, *member.kind(dtype)[1:])}
        if len(members) < len(found) or not same or sum(m.rank for m in members) > MAX_RANKS:
            return {}
        with torch.no_grad():
            stacked = torch.cat([m.lora_A for m in members]).to(dtype)
            for m, low in zip(members, stacked.split([m.rank for m in members]), strict=True):
                m.low = low, m.lora_B.to(dtype)
        shared = SharedInput(members)
        shared.stacked_A = stacked
        with torch.autocast(x.device.type, enabled=False):
            outputs = shared.together(x.to(dtype), member.dropout)
        return {one: (m.state(), outputs[m]) for one, m in zip(layers, members, strict=True)}


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def alike(one: Any, other: Any) -> bool:
    """Whether two layers may read together, whatever adapters they have later."""
    return vars(one)[FROZEN].device == vars(other)[FROZEN].device


def why_left(layer: Any) -> str:
    """Why a LoRA layer of PEFT's stays as it is, or ""."""
    base = layer.base_layer
    if type(layer) not in classes_of(layer):
        return f"PEFT's {type(layer).__name__}"
    if "forward" in vars(base):
        return "the base layer's forward was replaced, as accelerate's offloading does"
    if hasattr(base, "parametrizations"):
        return "the base layer is parametrized"
    frozen = find_frozen(base)
    if frozen is None or is_altered(base) or (frozen.kind != "dense" and type(layer) is PeftLinear):
        return f"a base layer of class {type(base).__name__}"
    if frozen.stored.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "the base weight is trained"
    if frozen.device.type == "meta":
        return "the base weight has no values"
    reasons = {name: _why_slow(layer, name) for name in layer.lora_A}
    return ", ".join(f"{name}: {why}" for name, why in reasons.items()) if all(reasons.values()) else ""


def _why_slow(layer: Any, name: str) -> str:
    if name in layer.lora_variant:
        return type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
    return "lora_bias" if layer.lora_bias.get(name) else ""


def classes_of(layer: Any) -> dict[type, type]:
    """PEFT's classes -> plopfast's, of the file that the layer's class is from. bitsandbytes is imported where it is used."""
    if type(layer).__module__ == "peft.tuners.lora.bnb":
        from .peft_bitsandbytes import CLASSES

        return CLASSES
    return {PeftLinear: FastLinear}


def quicken(layer: Any) -> None:
    """Puts plopfast's forward before the layer's own."""
    vars(layer)[FROZEN] = find_frozen(layer.base_layer)
    layer.__class__ = classes_of(layer)[type(layer)]


def read_together(layers: list[Any]) -> None:
    """Lets layers that read one input compute together."""
    together = ReadTogether(layers)
    for layer in layers:
        vars(layer)[READS_WITH] = together


def slow_down(layer: Any) -> None:
    """Makes it PEFT's again. Raises AdapterError where fully_shard has put a class of its own before plopfast's."""
    if Fast not in type(layer).__bases__:
        raise AdapterError(f"a layer was wrapped as a {type(layer).__name__}: restore the model before fully_shard")
    layer.__class__ = next(kind for kind in type(layer).__mro__ if not issubclass(kind, Fast))
    for name in (FROZEN, READS_WITH):
        vars(layer).pop(name, None)
