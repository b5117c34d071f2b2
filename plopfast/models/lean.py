"""RMS norms and gated MLPs in fewer operations that keep less for the backward pass, in a model of anybody's.

    found = lean_modules(model)          # name -> module, each with a forward of its own
    ...                                  # any trainer
    for module in found.values():
        del module.forward               # as it was

Such a model can be copied and pickled: a copy's forwards use the copy's weights.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..kernels import block_ops, torch_blocks
from .frozen import find_frozen, is_sharded
from .running import evaluating

EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
Lean = Callable[[torch.Tensor], torch.Tensor]
SCALES = (0.01, 1.0, 8.0)  # of the tokens that ways are compared on: small ones show eps, large ones the activation


class LeanNorm:
    """The forward of an RMS norm with a frozen weight, as one operation.

        norm.forward = LeanNorm(norm, "narrow", norm.variance_epsilon)

    `kind` says how the weight multiplies: "narrow" (Llama), "wide" or "offset" (Gemma), see `block_ops.rms_norm`. An input of
    another dtype than the weight takes the module's own forward, and so does a weight that is trained by now.
    """

    def __init__(self, module: nn.Module, kind: str, eps: float, backend: str = "auto") -> None:
        self.module, self.kind, self.eps, self.backend = module, kind, eps, backend
        self.reader: Any = None  # in a training step, the SharedInput of lora/shared.py that reads the output

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.module.weight
        if x.dtype != weight.dtype or weight.requires_grad:
            return type(self.module).forward(self.module, x)
        if self.reader is not None and (y := self.reader.normed(x, weight, self)) is not None:
            return y
        return block_ops.rms_norm(x, weight, self.eps, self.kind, self.backend)


class LeanMLP:
    """The forward of a gated MLP: down_proj(act(gate_proj(x)) up_proj(x)), with one operation between its products.

        mlp.forward = LeanMLP(mlp, "silu")

    `kind` is the activation: "silu", "gelu_tanh" or "gelu" (by erf). A module may have gate_up_proj in place of the two.
    """

    def __init__(self, module: nn.Module, kind: str, backend: str = "auto") -> None:
        self.module, self.kind, self.backend = module, kind, backend

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        if hasattr(module, "gate_up_proj"):
            y = block_ops.merged_gate(module.gate_up_proj(x), self.kind, self.backend)
        else:
            y = block_ops.gate(module.gate_proj(x), module.up_proj(x), self.kind, self.backend)
        return module.down_proj(y)


@torch.no_grad()
def lean_modules(model: nn.Module, known: Mapping[str, str] | None = None) -> dict[str, nn.Module]:
    """Gives RMS norms and gated MLPs a `LeanNorm` or `LeanMLP` as their forward, and returns these modules by name.
    `del module.forward` undoes it.

    A module is recognised by what it computes for a few random tokens, never by its class. Where the tensors have no
    values, `known` tells the kinds (`module.forward.kind`) that were found in a model like this one, by name. Trained
    norms, sharded weights and forwards that somebody has replaced are left alone.
    """
    found = {}
    with evaluating(model):  # dropout would hide that two ways agree
        for name, module in model.named_modules():
            make, kinds, width, like = _candidates(module)
            if not kinds or "forward" in vars(module) or not takes_one_tensor(module):
                continue
            kind = known.get(name) if known is not None else _kind(module, make, kinds, width, like)
            if kind in kinds:
                found[name] = module, make(kind, "auto")
    for module, forward in found.values():  # now that nothing more can raise
        module.forward = forward
    return {name: module for name, (module, _) in found.items()}


def _candidates(module: Any) -> tuple[Callable[[str, str], Lean], tuple[str, ...], int, Any]:
    """(a function of kind and backend, the kinds, width of the input, a tensor of its dtype and device), by the names of a
    module's parts; no kinds for other modules."""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_up_proj", "gate_proj", "up_proj", "down_proj")]
    merged, gate, up, down = (isinstance(part, nn.Module) for part in parts)
    frozen = find_frozen(parts[0] if merged else parts[1]) if down and (merged or (gate and up)) else None
    if frozen and not is_sharded(frozen.stored):
        like = torch.empty(0, dtype=frozen.dtype, device=frozen.device)
        return lambda kind, backend: LeanMLP(module, kind, backend), torch_blocks.ACTS, frozen.shape[1], like
    weight: Any = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in EPS_NAMES if hasattr(module, name)), None)
    is_frozen_vector = isinstance(weight, nn.Parameter) and weight.dim() == 1 and not weight.requires_grad
    if isinstance(eps, float) and is_frozen_vector and _has_no_other_tensor(module) and not is_sharded(weight):
        return lambda kind, backend: LeanNorm(module, kind, eps, backend), torch_blocks.MODES, len(weight), weight
    return lambda kind, backend: module, (), 0, None


def _has_no_other_tensor(module: nn.Module) -> bool:
    """A bias may be zero now, and trained."""
    return len([*module.parameters(), *module.buffers()]) == 1


def takes_one_tensor(module: nn.Module) -> bool:
    """A norm with a gate, say, takes two."""
    given = [*inspect.signature(type(module).forward).parameters.values()]
    return len(given) == 2 and all(one.kind is one.POSITIONAL_OR_KEYWORD for one in given)


def _kind(
    module: nn.Module, make: Callable[[str, str], Lean], kinds: tuple[str, ...], width: int, like: torch.Tensor
) -> str | None:
    """The kind that computes what the module does; of several, the nearest, as GELU's formulas differ by less than bfloat16's
    rounding. Torch's operations are compared: they round where the module does."""
    x = torch.randn(len(SCALES), 5, width, generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor(SCALES)[:, None, None]).to(like)
    try:
        want = module(x)
    except Exception:  # anybody's forward may raise anything where it takes inputs of another shape
        return None
    nearest, least = None, 4 * torch.finfo(x.dtype).eps
    for kind in kinds:
        error = relative_error(make(kind, "torch")(x), want)
        if error <= least and (nearest is None or error < least):
            nearest, least = kind, error
        if not error:
            break
    return nearest


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest relative error among the scales, infinite for another shape, another dtype or no number."""
    if not isinstance(want, torch.Tensor) or (got.shape, got.dtype) != (want.shape, want.dtype):
        return math.inf
    difference, size = (one.double().flatten(1).norm(dim=1) for one in (got - want, want))
    error = torch.where(difference == 0, 0.0, difference / size)
    return error.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
