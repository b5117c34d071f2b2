"""Puts the weights of experts into codes, and back: see ExpertCodes in quantized.py for what then stands in a parameter's place.

E experts, N out, K in.
"""

import copy
from typing import Any

import torch
from torch import nn

from ..kernels import torch_codes
from ..support.errors import ModelError
from .experts import DOWN, BySegments, Mixture, mixture_of
from .frozen import make_linears_dense
from .quantized import ExpertCodes, encoded
from .routed import QuantizedExpertWeight


def recognised(module: nn.Module) -> Mixture | None:
    """As `mixture_of`, for a module whose weights have no values yet: two experts get random ones, and show what it computes."""
    down = module._parameters.get(DOWN)
    between = any(True for child in module.children() for _ in child.parameters())
    if down is None or down.dim() != 3 or not down.is_meta or between:
        return mixture_of(module)  # one with a norm between, which has no values either, counts as it declares itself
    two: Any = copy.copy(module)
    draw = torch.Generator().manual_seed(0)
    with torch.device("cpu"):  # transformers makes models in a context of "meta"
        two._parameters = {
            name: None
            if p is None
            else nn.Parameter(torch.randn(2, *p.shape[1:], generator=draw).div(p.shape[-1] ** 0.5).to(p.dtype))
            for name, p in module._parameters.items()
        }
        two.num_experts = 2
        found = mixture_of(two)
    return None if found is None else Mixture(module, found.routed)


def check_shape(name: str, kind: str, n_out: int, n_in: int) -> None:
    """Raises ModelError for experts whose weights do not begin with a block of nf4."""
    if kind == "nf4" and n_out * n_in % torch_codes.BLOCK:
        raise ModelError(
            f"{name}: nf4 takes {torch_codes.BLOCK} values at a time, and an expert has {n_out} x {n_in}: --quantize int8 or fp8"
        )


def make_dense(model: nn.Module) -> list[str]:
    """Puts an nn.Linear with the decoded weight in the place of each quantised linear module, and a parameter in that of the codes
    of experts; returns their names. Raises ModelError for a streamed model."""
    return [*make_linears_dense(model), *_make_experts_dense(model)]


def codes_of(weight_ENK: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of an ExpertCodes. Raises ModelError as `encoded` does."""
    return encoded(weight_ENK.reshape(-1, weight_ENK.shape[-1]).contiguous(), kind)


def put_codes(mixture: Mixture, key: str, kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """Puts codes in the place of the parameter `key`, and changes what the module computes with."""
    module, weight = mixture.module, mixture.weight(key)
    n_out, n_in = weight.shape
    with torch.device("meta"):
        made = ExpertCodes(weight.experts, n_in, n_out, kind, weight.dtype)
    for name, tensor in tensors.items():
        setattr(made, name, nn.Parameter(tensor, requires_grad=False))
    module._parameters.pop(key, None)
    module._modules.pop(key, None)
    module.add_module(key, made.train(module.training))
    module.forward = BySegments(mixture)


def put_dense(mixture: Mixture, key: str, weight: torch.Tensor) -> None:
    """Puts a parameter, in its own layout, in the place of its codes."""
    module = mixture.module
    del module._modules[key]
    module.register_parameter(key, nn.Parameter(weight, requires_grad=False))
    if not any(isinstance(child, ExpertCodes) for child in module.children()):
        del module.forward


def codes_in(model: nn.Module) -> dict[str, tuple[Mixture, QuantizedExpertWeight]]:
    """The weights of experts that are codes, by name, each with its mixture."""
    found: dict[str, tuple[Mixture, QuantizedExpertWeight]] = {}
    for name, module in model.named_modules():
        if isinstance(computed := vars(module).get("forward"), BySegments):
            weights = {key: computed.mixture.weight(key) for key in computed.mixture.keys}
            found |= {
                f"{name}.{key}": (computed.mixture, w)
                for key, w in weights.items()
                if isinstance(w, QuantizedExpertWeight)
            }
    return found


def _make_experts_dense(model: nn.Module) -> list[str]:
    found = codes_in(model)
    for mixture, weight in found.values():
        put_dense(mixture, weight.key, weight.plus())
    return list(found)
