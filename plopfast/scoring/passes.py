"""Forward passes that score: where the norms come from, and where a pass may end.

A module's norms come from its own product where that moves fewer bytes (`lora.ops.linear_and_norms`). Otherwise a forward
hook reads the module's output. Nothing after the last scored module matters, so the pass ends there, and the output of that
module is not written.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import nn

from ..lora.ops import linear_and_norms, or_backend_error, path, row_norms
from ..models.experts import BySegments, ExpertInfo
from ..models.frozen import is_sharded, is_transposed, whole
from ..models.linears import LinearInfo
from ..models.routed import Route
from .sums import NFNState


class PassEnded(BaseException):
    """Leaves a forward pass at its last scored module. It is no Exception, so that no model takes it for an error."""


class PassEnd:
    """Tells at which call of a scored module a forward pass may end.

    The first pass runs to its end and gives the order of calls. If it called every one of the `modules` scored modules once,
    later passes end where they have made the same calls. They run to their ends if they make others. (A model that goes on to
    call a module again in later passes alone would have that call missed; no transformer is known to.)
    """

    def __init__(self, model: nn.Module, modules: int) -> None:
        self.calls: list[int] = []  # of the pass that runs
        self.first: list[int] | None = None  # those of the first pass; empty where no pass may end early
        self._every = list(range(modules)) if may_be_left(model) else None

    def open(self) -> None:
        """Begins a pass."""
        self.calls = []

    def close(self) -> None:
        """Ends a pass."""
        if self.first is None:
            self.first = self.calls if sorted(self.calls) == self._every else []

    def reached(self, index: int) -> bool:
        """Notes the call of a module; True where it is the last one."""
        self.calls.append(index)
        return self.calls == self.first


def may_be_left(model: nn.Module) -> bool:
    """Whether a forward pass may be left by an exception: nothing waits for the end of a module's forward.

    Forward hooks do (FSDP, offloading, captured outputs), and so do replaced forwards, compiled ones, and the wrappers of
    torch.distributed. Outputs that a model collects on request are captured by replaced forwards, too.
    """
    config = getattr(model, "config", None)
    if any(getattr(config, name, False) for name in ("output_hidden_states", "output_attentions")):
        return False
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or not isinstance(vars(module).get("forward"), NoneType | BySegments)
        or module._compiled_call_impl is not None
        or type(module).__module__.startswith(("torch.distributed", "torch.nn.parallel", "torch._dynamo"))
        for module in model.modules()
    )


@contextlib.contextmanager
def scored(infos: Sequence[LinearInfo | ExpertInfo], state: NFNState, end: PassEnd) -> Iterator[None]:
    """While it lasts, each call of a module adds its norms to `state`, and passes end where `end` says. See `run_pass`."""
    with contextlib.ExitStack() as stack:
        mixtures: dict[Any, dict[str, tuple[int, ExpertInfo]]] = {}
        for index, info in enumerate(infos):
            if isinstance(info, ExpertInfo):
                mixtures.setdefault(info.mixture.module, {})[info.key] = index, info
                continue
            module, bias = info.module, whole(getattr(info.module, "bias", None))
            if _may_be_computed_here(module, state.backend):
                module.forward = _with_norms(index, info, state, end)
                stack.callback(delattr, module, "forward")
            else:
                hook = _after(index, info.name, bias, state, end)
                stack.enter_context(module.register_forward_hook(hook))
        for module, by_key in mixtures.items():
            before = vars(module).get("forward")  # of experts that are codes
            module.forward = _experts_with_norms(by_key, state, end)
            put_back = (
                partial(delattr, module, "forward") if before is None else partial(setattr, module, "forward", before)
            )
            stack.callback(put_back)
        yield


def run_pass(model: nn.Module, **inputs: Any) -> None:
    """Runs a pass, which may be left at its last scored module."""
    with contextlib.suppress(PassEnded):
        model(**inputs)


def _may_be_computed_here(module: nn.Module, backend: str) -> bool:
    """Whether kernels run where the module is, and its forward is x W^T + bias and nothing else."""
    kind = type(module)
    own = kind.forward is nn.Linear.forward or (is_transposed(module) and kind.__module__.startswith("transformers."))
    if not own or "forward" in vars(module) or module._compiled_call_impl is not None:
        return False
    weight: Any = module.weight
    return not is_sharded(weight) and path(weight.device, backend) != "torch"


def _with_norms(index: int, info: LinearInfo, state: NFNState, end: PassEnd) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a forward of a module that computes the norms with the output, and does not write the pass's last one."""
    module: Any = info.module
    frozen = info.frozen

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, last = frozen.weight_NK, end.reached(index)
        if x.is_meta or torch.is_autocast_enabled(x.device.type) or x.dtype != weight.dtype:
            y = type(module).forward(module, x)
            norms = row_norms(y, module.bias, backend=state.backend)
        else:
            y, norms = linear_and_norms(x, weight, module.bias, store=not last, backend=state.backend)
        state.take(index, info.name, x, norms)
        if last:
            raise PassEnded
        return y

    return forward


def _experts_with_norms(by_key: dict[str, tuple[int, ExpertInfo]], state: NFNState, end: PassEnd) -> Callable[..., Any]:
    """Returns a forward of a module of experts that takes the norms of both of its products."""
    mixture = next(iter(by_key.values()))[1].mixture

    def product(key: str, x_SK: torch.Tensor, route: Route) -> torch.Tensor:
        (index, info), frozen = by_key[key], mixture.weight(key)
        y_SN = or_backend_error(frozen.product, x_SK, route, state.backend)
        state.take_routed(index, info.name, x_SK, row_norms(y_SN, backend=state.backend), route)
        if end.reached(index):
            raise PassEnded
        return frozen.with_bias(y_SN, route)

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        return mixture.run(product, *args, **kwargs)

    return forward


def _after(index: int, name: str, bias: torch.Tensor | None, state: NFNState, end: PassEnd) -> Callable[..., None]:
    """Returns a forward hook that takes the norms of a module's output."""
    take = state.hook(index, name, bias)

    def record(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        take(module, args, output)
        if end.reached(index):
            raise PassEnded

    return record
