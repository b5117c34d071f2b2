"""Adapters of experts in PEFT's files, where `target_parameters` names the weights.

PEFT wraps a module once for each of its weights, in the order of its parameters, the last one outermost: where both are
adapted, `experts.lora_A` is down_proj's and `experts.base_layer.lora_A` gate_up_proj's. lora_A is [E R, in] with the ranks of an
expert together, lora_B [out, R E] with the experts of a rank together. PEFT takes a weight for [E, out, in] unless
the module says `is_transposed`; Llama 4's, stored [E, in, out], does not, so there A and B change places. PEFT before 0.19 takes
every weight for [E, in, out].
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..models.experts import Mixture
from ..models.quantized import ExpertCodes
from ..models.routed import ExpertWeight
from ..support.errors import AdapterError
from .peft_targets import is_targeted

NATURAL = (0, 19)  # the PEFT that first took weights for [E, out, in]


def names_in_file(mixtures: Mapping[str, Mixture], targeted: Collection[str]) -> dict[str, str]:
    """Name of a weight of experts -> the module of PEFT's file that has its tensors; `targeted` are full names or their ends."""
    found = {}
    for place, mixture in mixtures.items():
        own = list(mixture.module._parameters)  # the order in which PEFT wraps them
        if any(isinstance(child, ExpertCodes) for child in mixture.module.children()):
            own = list(mixture.keys)
        keys = [key for key in own if is_targeted(f"{place}.{key}", targeted)]
        for depth, key in enumerate(reversed(keys)):
            found[f"{place}.{key}"] = place + ".base_layer" * depth
    return found


def to_file(adapter: Any) -> dict[str, torch.Tensor]:
    """lora_A and lora_B of an ExpertLoRA as PEFT's file has them."""
    a_ERK, b_ENR = adapter.lora_A.detach(), adapter.lora_B.detach()
    if _is_swapped(adapter.frozen):
        a_ERK, b_ENR = b_ENR.transpose(1, 2), a_ERK.transpose(1, 2)
    return {"A": a_ERK.flatten(0, 1), "B": b_ENR.permute(1, 2, 0).flatten(1)}


def from_file(
    name: str, part: Mapping[str, torch.Tensor], weight: ExpertWeight, early: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A [E, R, K] and lora_B [E, N, R]; `early`: as PEFT before 0.19 wrote them. Raises AdapterError for tensors that
    are not of this weight's shape."""
    (n_out, n_in), experts = weight.shape, weight.experts
    a, b = part["A"], part["B"]
    swapped = not weight.transposed if early else _is_swapped(weight)
    sides = (n_out, n_in) if swapped else (n_in, n_out)
    if (a.shape[1], b.shape[0]) != sides or a.shape[0] % experts or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"made for another base model: {name} has {experts} experts of {n_in} -> {n_out} here, and its adapter has lora_A "
            f"{list(a.shape)} and lora_B {list(b.shape)}"
        )
    a_ERK = a.unflatten(0, (experts, -1))
    b_ENR = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return (b_ENR.transpose(1, 2), a_ERK.transpose(1, 2)) if swapped else (a_ERK, b_ENR)


def _is_swapped(weight: ExpertWeight) -> bool:
    return weight.transposed and not getattr(weight.module, "is_transposed", False)
