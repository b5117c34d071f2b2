"""Embedding rows looked up in CPU memory: only the rows that are asked for go to the model's device."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..support.errors import ModelError

PLACES = ("device", "cpu")


class HostRows:
    """The forward of an embedding whose weight is in CPU memory: rows for ids on any device, on that device.

        embedding.forward = HostRows(embedding)

    It works wherever the weight is. The ids of a GPU are waited for.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        weight: Any = self.module.weight
        rows = type(self.module).forward(self.module, ids.to(weight.device))  # which may scale them
        return rows.to(ids.device)


def move(model: Any, device: torch.device, embedding: str = "device") -> None:
    """Moves a model to `device`; with `embedding="cpu"` its input embedding stays where it is, in CPU memory, and never
    passes through the device. Then `model.computes_on` is `device`, as the first parameter's device no longer says it.

    On the CPU there is nothing to keep. Raises ModelError where another module has the embedding's weight, too.
    """
    with at_home(model, device, embedding):
        model.to(device)


@contextlib.contextmanager
def at_home(model: Any, device: torch.device, embedding: str) -> Iterator[None]:
    """While it lasts, the model has no input embedding, so that whatever moves it to `device` leaves that in CPU memory, as
    `move` says; with `embedding="device"` nothing is done."""
    name, inner = _embedding(model) if embedding == "cpu" else ("", None)
    if inner is None or device.type == "cpu":
        yield
        return
    model.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        model.set_submodule(name, inner)
    inner.forward = HostRows(inner)
    model.computes_on = device


def _embedding(model: Any) -> tuple[str, Any]:
    """The input embedding, and its name."""
    inner = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is inner), None)
    if name is None or not isinstance(getattr(inner, "weight", None), nn.Parameter):
        raise ModelError(f"model {model.name_or_path!r} has no embedding of one weight: leave out --embedding")
    every = model.named_parameters(remove_duplicate=False)
    others = [other for other, p in every if p is inner.weight and other != f"{name}.weight"]
    if others:
        raise ModelError(
            f"model {model.name_or_path!r}: --embedding cpu would save nothing, as {others[0].rpartition('.')[0]} has the same "
            "weight (they are tied), and computes on the device: leave it out"
        )
    return name, inner
