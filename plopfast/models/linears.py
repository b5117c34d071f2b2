"""Causal language models: finding and loading them, and the structure of their linear modules."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..support.errors import ModelError

if TYPE_CHECKING:
    pass

_LAYER = re.compile(r"(^|\.)\d+(?=\.)")


@dataclass(frozen=True)
class LinearInfo:
    """A linear module inside the repeated layers (or the output head, with layer None)."""

    name: str
    module: nn.Module
    type: str
    layer: int | None
    n_in: int
    n_out: int
    transposed: bool  # stored [in, out], as GPT-2's Conv1D does

    @property
    def weight_NK(self) -> torch.Tensor:
        weight = whole(self.module.weight)
        return weight.T if self.transposed else weight


def is_transposed(module: nn.Module) -> bool:
    """True for transformers' Conv1D, which stores its weight [in, out]."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def linear_modules(model: nn.Module, include_head: bool = False) -> list[LinearInfo]:
    """The linear modules inside the model's repeated layers, in order, each with its layer number and type.

    The type is the last component of the name (`q_proj`); where two different modules of one layer share it (GPT-2's
    `attn.c_proj` and `mlp.c_proj`), as many components as tell them apart. Raises ModelError where there are none.
    """
    head = output_head(model) if include_head else None
    found: list[tuple[str, nn.Module, int | None, tuple[str, ...]]] = []
    module: nn.Module
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        parts = tuple(name.split("."))
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if index is not None:
            inner = tuple(part for part in parts[index + 1 :] if not part.isdigit())
            found.append((name, module, int(parts[index]), inner))
        elif module is head:
            found.append((name, module, None, parts[-1:]))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear modules (nn.Linear or transformers' Conv1D) inside repeated layers; "
            "plopfast needs a transformer whose layers are a ModuleList"
        )
    types = _shortest_suffixes({inner for *_, inner in found})
    return [_info(name, module, types[inner], layer) for name, module, layer, inner in found]


def _info(name: str, module: nn.Module, type_: str, layer: int | None) -> LinearInfo:
    transposed = is_transposed(module)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ModelError(
            f"{name}: expected a floating-point weight [out, in], got {weight.dtype} {list(weight.shape)}; "
            "quantised weights are not supported yet: load the model in bfloat16 or float32"
        )
    n_out, n_in = weight.shape[::-1] if transposed else weight.shape
    return LinearInfo(name, module, type_, layer, n_in, n_out, transposed)


def _shortest_suffixes(paths: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    result = {}
    for path in paths:
        for length in range(1, len(path) + 1):
            suffix = path[-length:]
            if sum(other[-length:] == suffix for other in paths) == 1:
                break
        result[path] = ".".join(suffix)
    return result


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers that hold linear modules, by name, in order."""
    names = {info.name[: _LAYER.search(info.name).end()]: None for info in linear_modules(model)}  # type: ignore[union-attr]
    return {name: model.get_submodule(name) for name in names}


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, spread over several ranks; torch takes 0.6 s to import that class."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """A sharded tensor, gathered on each rank; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def body(model: nn.Module) -> nn.Module:
    """The model without its output head, which scoring does not need."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return inner if isinstance(inner, nn.Module) else model


def run_for_logits(model: nn.Module, batch: dict[str, torch.Tensor], where: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocabulary] at the n True positions of the bool mask `where` [rows, tokens], in row order.

    The hidden states are gathered just before the output head, so that logits exist only where they are asked for,
    and everything the model does to its logits (soft-capping, scaling) stays in force.
    """
    head = output_head(model)
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head; load it as a causal language model")
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][where].unsqueeze(0),))
    try:
        logits = model(**batch, use_cache=False).logits
    finally:
        hook.remove()
    return logits[0]


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Raises ModelError unless the model keeps the sequences of a packed batch (`data.collate_packed`) apart.

    Two forward passes of two short sequences: other tokens in the first one must not move the logits of the second.
    """
    device, training = device_of(model), model.training
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    model.eval()  # dropout would move them too
    try:
        one, two = (
            model(
                input_ids=torch.tensor([[*first, 9, 8, 7, 6]], device=device), position_ids=positions, use_cache=False
            )
            .logits[0, 4:]
            .float()
            for first in ((1, 2, 3, 4), (9, 5, 8, 7))
        )
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} takes no position_ids ({error}): train it without packing") from error
    finally:
        model.train(training)
    if not (one - two).norm() <= 0.01 * one.norm():  # 0 in dense models; rounding where experts share a batch
        raise ModelError(
            f"{type(model).__name__} mixes the sequences of a packed batch (its attention does not follow position_ids, "
            "or a recurrent state runs through them): train it without packing"
        )


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def context_length(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None)


def fingerprint(model: nn.Module, names: list[str]) -> list[float]:
    """The first four weights of each named linear module, by which an adapter recognises its base."""
    weights = (whole(model.get_submodule(name).weight.detach()) for name in sorted(names))  # type: ignore[operator]
    return [value for weight in weights for value in weight.flatten()[:4].float().tolist()]


def same_fingerprint(one: list[float], two: list[float]) -> bool:
    """True within 1 %: rounding to bfloat16 moves a weight by at most 0.4 %."""
    a, b = torch.tensor(one), torch.tensor(two)
    return a.shape == b.shape and bool((a - b).norm() <= 0.01 * a.norm())
