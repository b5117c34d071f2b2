"""Values of an adapter that stand in the place of the base's own: PEFT's modules_to_save, trained biases, and embeddings.

They are swapped in as Parameters, so each module computes as before with other values, and a tied head has its own from then
on. The base's values are kept beside, for `disabled` and `unload`. plopfast trains low-rank updates alone, so these stay as
the adapter has them.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.frozen import streamed_in
from ..support.errors import AdapterError

BASE = "plopfast_base_values"  # of a module: parameter name -> the base's own Parameter


def check_values(
    model: nn.Module, path: Path, values: Mapping[str, torch.Tensor], modules_to_save: list[str], bias: str
) -> None:
    """`values`: parameter name -> value, as the adapter in `path` has them beside its low-rank updates.

    Raises AdapterError for a value that the adapter's configuration does not speak of, of a parameter that this model lacks,
    streams or has in another shape, and for modules_to_save without values.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embeddings = {id(p) for module in _embeddings(model) for p in module.parameters()}
    said = dict.fromkeys(modules_to_save, False)
    if streamed := {f"{name}.weight" for name in streamed_in(model)} & {*values}:
        raise AdapterError(
            f"{path}: the adapter replaces {min(streamed)}, which is streamed: load the model without --stream"
        )
    for name, value in values.items():
        there = parameters.get(name)
        owners = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
        of = [one for one in modules_to_save if any(owner.endswith(one) for owner in owners)]  # as PEFT finds them
        said |= dict.fromkeys(of, True)
        known = of or (bias != "none" and name.endswith(".bias")) or id(there) in embeddings
        if not known:
            raise AdapterError(
                f"{path}: unexpected tensor {name!r}; expected *.lora_A.weight, *.lora_B.weight, with DoRA "
                "*.lora_magnitude_vector, and what modules_to_save and bias in its configuration speak of"
            )
        if there is None:
            raise AdapterError(f"{path}: made for another base model: this one has no parameter {name!r}")
        if there.shape != value.shape:
            words = ", or for another size of the vocabulary" * (id(there) in embeddings)
            raise AdapterError(
                f"{path}: made for another base model{words}: {name} is {list(there.shape)} here, the adapter's is "
                f"{list(value.shape)}"
            )
    if missing := [one for one, found in said.items() if not found]:
        raise AdapterError(f"{path}: modules_to_save = {missing!r:.80}, for which there are no tensors; was it edited?")


@torch.no_grad()
def replace_values(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Puts frozen Parameters with these values in the place of the model's own, in their dtype and on their device."""
    for name, value in values.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        own: Any = module._parameters[key]
        module.__dict__.setdefault(BASE, {}).setdefault(key, own)
        setattr(module, key, nn.Parameter(value.to(own.device, own.dtype, copy=True), requires_grad=False))


def replaced_values(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameter name -> the adapter's value, for those that stand in the place of the base's own."""
    return {f"{name}.{key}": module._parameters[key] for name, module, key in _places(model)}  # type: ignore[misc]


def put_back(model: nn.Module) -> None:
    """Gives the modules the base's own values again."""
    _swap(model)
    keep_values(model)


def keep_values(model: nn.Module) -> None:
    """Forgets the base's own values: the adapter's are now the model's."""
    places = list(_places(model))
    for _, module, _ in places:
        module.__dict__.pop(BASE, None)
    if places and len({id(module.weight) for module in _embeddings(model)}) > 1:
        config: Any = model.config
        for one in (config, config.get_text_config()):
            one.tie_word_embeddings = False  # or the head would be lost when the model is saved


@contextlib.contextmanager
def base_values(model: nn.Module) -> Iterator[None]:
    """While it lasts, the base's own values are in place."""
    _swap(model)
    try:
        yield
    finally:
        _swap(model)


def _swap(model: nn.Module) -> None:
    for _, module, key in list(_places(model)):
        kept: dict[str, Any] = module.__dict__[BASE]
        here: Any = module._parameters[key]
        own = kept[key]
        if own.device != here.device:
            own.data = own.data.to(here.device)  # the model was moved meanwhile
        kept[key], module._parameters[key] = here, own


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in model.named_modules():
        for key in module.__dict__.get(BASE, ()):
            yield name, module, key


def _embeddings(model: Any) -> list[nn.Module]:
    found = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    return [module for module in found if module is not None]
