"""Modules that read the same input compute together, and adapters are cast once for a whole training step."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..kernels import block_ops, dispatch, library
from ..kernels.codes import Codes, Weight
from ..kernels.groups import Group
from ..models.lean import LeanNorm
from ..models.running import body, device_of, evaluating
from .experts import LoRAExperts
from .grouped import LoRAGroup
from .layer import LoRALinear, adapters, every_adapter
from .ops import check, is_direct, new_seed, or_backend_error

MAX_RANKS = 256  # together, in a group: the limit of the kernels
MAX_MEMBERS = 3  # likewise


class SharedInput:
    """Modules that read one input (query, key and value; gate and up): the first that is called computes for all.

    It works while `stacked_A` is set, by `Prepared`; at other times each module computes by itself.
    """

    def __init__(self, members: list[LoRALinear], producer: nn.Module | None = None) -> None:
        self.members = members
        self.producer = producer  # the module whose output the members read, if there is one
        self.stacked_A: torch.Tensor | None = None  # the members' `low` copies of A, one below the other
        self._x: Callable[[], torch.Tensor | None] = lambda: None
        self._key: tuple[Any, ...] = ()
        self._outputs: dict[LoRALinear, torch.Tensor] = {}
        self._normed: Callable[[], torch.Tensor | None] = lambda: None
        self._made: tuple[int, Group, list[torch.Tensor]] | None = None  # y's version, and S beside it

    def start(self, stacked_A: torch.Tensor) -> None:
        """Switches on: from now on the members compute together, and a lean norm before them makes their S."""
        self.stacked_A = stacked_A
        if norm := self.norm:
            norm.reader = self

    def clear(self) -> None:
        """Forgets what nobody fetched, and switches off."""
        self.stacked_A, self._outputs, self._x = None, {}, lambda: None
        self._normed, self._made = lambda: None, None
        if norm := self.norm:
            norm.reader = None

    @property
    def norm(self) -> LeanNorm | None:
        """The lean norm before the members, if there is one now."""
        forward = vars(self.producer).get("forward") if self.producer is not None else None
        return forward if isinstance(forward, LeanNorm) else None

    def normed(self, x: torch.Tensor, weight: torch.Tensor, norm: LeanNorm) -> torch.Tensor | None:
        """The norm's y [..., K], with the members' S made in the same read of x; None where that is no gain.

        That is elsewhere than in an eager training step, where the members take plain torch (whose S is the vendor's product),
        and for members of several ranks.
        """
        first = self.members[0]
        p = first.dropout if first.training else 0.0
        if not self._is_on(x) or x.dtype != first.frozen.dtype or any(m.rank != first.rank for m in self.members):
            return None
        if (plan := self._plan_of(x, p)).backend != "triton":
            return None
        group = self._group_of(x, p, plan)
        copies = [m.low[0] for m in self.members if m.low]
        y, s = block_ops.rms_norm_shrink(x, weight, norm.eps, norm.kind, copies, group.c, p, group.seeds, norm.backend)
        self._normed, self._made = weakref.ref(y), (y._version, group, list(s))
        return y

    def y_of(self, member: LoRALinear, x: torch.Tensor, p: float) -> torch.Tensor | None:
        """This member's output [..., N], or None where the member has to compute it: elsewhere than in an eager training
        step, and under autocast."""
        if not self._is_on(x):
            return None
        key = (x._version, torch.is_grad_enabled(), p)  # x could be changed in place
        if self._x() is not x or self._key != key or member not in self._outputs:
            self._outputs = self.together(x, p)
            self._x, self._key = weakref.ref(x), key
        return self._outputs.pop(member)

    def _is_on(self, x: torch.Tensor) -> bool:
        return self.stacked_A is not None and is_direct(x) and not torch.is_autocast_enabled(x.device.type)

    def _plan_of(self, x: torch.Tensor, p: float) -> dispatch.Plan:
        """The path of all members: that of the widest."""
        first, widest = self.members[0], max((m.frozen.weight_NK for m in self.members), key=len)
        x_MK = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        return or_backend_error(library.plan_of, x_MK, widest, first.rank, first.backend, p > 0)

    def _group_of(self, x: torch.Tensor, p: float, plan: dispatch.Plan) -> Group:
        """What the members share in a call on x, with new seeds."""
        members, first = self.members, self.members[0]
        seeds = [new_seed(x.device) if p else None for _ in members]
        for m, seed in zip(members, seeds, strict=True):
            check(x, _weight_for(x, m), m.lora_A, m.lora_B, m.base.bias, m.scaling, p, seed)
        factors, numbers = zip(*(library.factors(first.scaling, p, seed) for seed in seeds), strict=True)
        return Group(factors[0], p, numbers, tuple(m.rank for m in members), plan)

    def together(self, x: torch.Tensor, p: float) -> dict[Any, torch.Tensor]:
        """Each member's output [..., N]."""
        members, made = self.members, self._made
        if made is not None and self._normed() is x and made[0] == x._version and made[1].p == p:
            _, group, s = made
        else:
            group, s = self._group_of(x, p, self._plan_of(x, p)), None
        self._made = None
        x_MK = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()
        weights, biases = [_weight_for(x, m) for m in members], [m.product_bias for m in members]
        low = [m.low[0] for m in members if m.low], [m.low[1] for m in members if m.low]
        trained = [m.lora_A for m in members] + [m.lora_B for m in members]
        outputs = LoRAGroup.apply(x_MK, s, weights, biases, low, self.stacked_A, group, *trained)
        shape = x.shape[:-1]
        return {m: y if x.dim() == 2 else y.view(*shape, y.shape[1]) for m, y in zip(members, outputs, strict=True)}


class Prepared(contextlib.AbstractContextManager["Prepared"]):
    """Saves work in a training step, while its context lasts: the adapters are cast to the weights' dtype once instead of
    in every call, by one operation and into buffers that are kept, and modules that share an input (see
    `find_shared_inputs`) compute together.

    The adapters must not change while the context lasts. Adapters that are put in later are not known to it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = every_adapter(model)
        self.experts = [module for module in model.modules() if isinstance(module, LoRAExperts)]
        self.groups = list({id(m.shared): m.shared for m in self.modules if m.shared}.values())
        self._stacks: list[torch.Tensor] = []
        self._low: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._made_for: list[tuple[Any, ...]] = []

    def __enter__(self) -> "Prepared":
        try:
            self._prepare()
        except BaseException:  # Ctrl-C half way
            self.__exit__()
            raise
        return self

    @torch.no_grad()
    def _prepare(self) -> None:
        kinds = [(m.frozen.dtype, m.lora_A.device, m.lora_A.dtype, m.lora_B.dtype) for m in self.modules]
        if kinds != self._made_for:
            self._allocate()
            self._made_for = kinds
        copies: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for module, low in zip(self.modules, self._low, strict=True):
            for copy, value in zip(low, (module.lora_A, module.lora_B), strict=True):
                if copy is not value:
                    copies.append(copy)
                    values.append(value)
            module.low = low
        if copies:
            torch._foreach_copy_(copies, values)
        for group, stack in zip(self.groups, self._stacks, strict=True):
            group.start(stack)

    def __exit__(self, *raised: object) -> None:
        for module in self.modules:
            module.low = None
        for group in self.groups:
            group.clear()

    def _allocate(self) -> None:
        """Makes the copies: a member's A lies in the stack of its group; what has the weights' dtype is no copy."""
        stacked: dict[LoRALinear, torch.Tensor] = {}
        self._stacks = []
        for group in self.groups:
            first = group.members[0]
            rows = [m.rank for m in group.members]
            self._stacks.append(first.lora_A.new_empty(sum(rows), first.lora_A.shape[1], dtype=first.frozen.dtype))
            stacked.update(zip(group.members, self._stacks[-1].split(rows), strict=True))
        self._low = [
            (stacked[m] if m in stacked else _copy_of(m.lora_A, m.frozen.dtype), _copy_of(m.lora_B, m.frozen.dtype))
            for m in self.modules
        ]


@contextlib.contextmanager
def apart(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, members inside one of `modules`, which get parts of their input, compute together on these parts alone:
    not with members elsewhere, and not with S from a norm, which saw the whole input."""
    places = {inner: module for module in modules for inner in module.modules() if isinstance(inner, LoRALinear)}
    kept = {inner.shared: inner.shared.producer for inner in places if inner.shared}
    mixed = [one for one in kept if len({places.get(member) for member in one.members}) > 1]
    try:
        for one in kept:
            one.producer = None
        for one in mixed:
            for member in one.members:
                member.shared = None
        yield
    finally:
        for one, producer in kept.items():
            one.producer = producer
        for one in mixed:
            for member in one.members:
                member.shared = one


def _weight_for(x: torch.Tensor, member: LoRALinear) -> Weight:
    weight = member.frozen.weight_NK
    return weight.to(x.dtype) if isinstance(weight, Codes) else weight


def _copy_of(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value if value.dtype == dtype else torch.empty_like(value, dtype=dtype, requires_grad=False)


@torch.no_grad()
def find_shared_inputs(model: nn.Module) -> list[list[str]]:
    """Groups the adapters that read the same input tensor, for `Prepared`; returns the names in each group.

    All members of a group have one scaling, one dropout rate, one backend and one dtype, are at most MAX_MEMBERS, and their
    ranks sum to at most MAX_RANKS.
    """
    names = {module: name for name, module in adapters(model).items()}
    found = readers(model, names, _alike)
    found = [(members, producer) for members, producer in found if sum(m.rank for m in members) <= MAX_RANKS]
    for members, producer in found:
        shared = SharedInput(members, producer)
        for member in members:
            member.shared = shared
    return [[names[module] for module in members] for members, _ in found]


@torch.no_grad()
def readers(
    model: nn.Module, modules: Iterable[nn.Module], alike: Callable[[Any, Any], bool]
) -> list[tuple[list[Any], nn.Module | None]]:
    """Groups of two or three of `modules` that read the same input tensor one after the other and are `alike`, each with the
    module whose output that is, if there is one. They are found by running the model on two tokens."""
    seen: list[tuple[torch.Tensor, list[Any]]] = []  # keeps the inputs alive, so that their identities differ
    made: dict[int, nn.Module] = {}  # by the output's identity
    outputs: list[Any] = []  # likewise kept alive

    def note(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if seen and seen[-1][0] is args[0] and alike(seen[-1][1][0], module) and len(seen[-1][1]) < MAX_MEMBERS:
            seen[-1][1].append(module)
        else:
            seen.append((args[0], [module]))

    def note_output(module: nn.Module, args: Any, output: Any) -> None:
        made[id(output)] = module
        outputs.append(output)

    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))  # dropout would move torch's generator on
        for module in modules:
            stack.enter_context(module.register_forward_pre_hook(note))
        for leaf in model.modules():
            if not any(leaf.children()):
                stack.enter_context(leaf.register_forward_hook(note_output))
        body(model)(input_ids=torch.ones(1, 2, dtype=torch.long, device=device_of(model)), use_cache=False)
    return [(members, made.get(id(x))) for x, members in seen if len(members) > 1]


def _alike(one: LoRALinear, other: LoRALinear) -> bool:
    kinds = [(m.scaling, m.dropout, m.backend, m.frozen.dtype, m.lora_A.dtype, m.lora_B.dtype) for m in (one, other)]
    return kinds[0] == kinds[1] and one.frozen.device == other.frozen.device
