"""A frozen weight that is streamed: what stands for it in products, in all other questions, and in its module.

N out, K in.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..kernels.codes import Codes, Weight, frozen_linear
from ..support.errors import ModelError
from .frozen import FrozenWeight
from .quantized import QuantizedLinear
from .streamer import Streamer


class Streamed(Codes):
    """Stands for a weight W [N, K] of a streamed block in products: it knows where W is to be found, and holds no values."""

    def __init__(self, streamer: Streamer, block: int, name: str, host: FrozenWeight) -> None:
        super().__init__((), host.shape, host.dtype)
        self.streamer, self.block, self.name, self.host = streamer, block, name, host
        self.strides = host.weight_NK.stride()

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.host.kind

    @property
    def host_tensors(self) -> Mapping[str, torch.Tensor]:
        """The module's tensors in host memory, by their names in the module."""
        return self.streamer.payloads[self.block].tensors[self.name]

    @property
    def device(self) -> torch.device:
        return self.streamer.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.host_tensors.values())

    def stride(self) -> tuple[int, int]:
        return self.strides

    def held(self) -> Weight:
        tensors = self.streamer.views(self.block)[self.name]
        module: Any = self.host.module
        if isinstance(module, QuantizedLinear):
            return module.codes_of(tensors).to(self.dtype)
        weight = tensors["weight"].to(self.dtype)
        return weight.T if self.host.transposed else weight


class StreamedWeight(FrozenWeight):
    """The frozen weight of a streamed module. What is asked of its values is computed from the host's copy, as `host` says."""

    streamed = True

    def __init__(self, host: FrozenWeight, weight: Streamed) -> None:
        self.module, self.transposed, self.host, self.weight = host.module, host.transposed, host, weight

    @property
    def stored(self) -> torch.Tensor:
        return self.host.stored

    @property
    def kind(self) -> str:
        return self.host.kind

    @property
    def weight_NK(self) -> Streamed:
        return self.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.host.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def dequantize(self) -> torch.Tensor:
        return self.host.dequantize()

    def frobenius(self) -> torch.Tensor:
        return self.host.frobenius()

    def fingerprint(self) -> list[float]:
        return self.host.fingerprint()

    def plus(self, delta_NK: torch.Tensor) -> torch.Tensor:
        return self.host.plus(delta_NK.to(self.stored.device))

    def add_(self, delta_NK: torch.Tensor) -> None:
        """Raises ModelError: the host's copy may be a file."""
        raise ModelError("streamed weights take no update: unstream(model) first")


class _StreamedModule:
    """Mixed into the class of a linear module while its weight is streamed. Its `weight` is the host's, and no parameter."""

    frozen: StreamedWeight
    bias: Any

    def __getattr__(self, name: str) -> Any:
        frozen = self.__dict__.get("frozen")
        tensors = frozen.weight.host_tensors if frozen is not None else {}
        return tensors[name] if name in tensors else super().__getattr__(name)  # type: ignore[misc]

    @property
    def codes(self) -> Codes:
        """Those of a QuantizedLinear, on the host."""
        return self.codes_of(self.frozen.weight.host_tensors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x, self.frozen.weight_NK, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({f"{prefix}{name}": t for name, t in self.frozen.weight.host_tensors.items()})
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if given := [name for name in self.frozen.weight.host_tensors if f"{prefix}{name}" in state_dict]:
            raise ModelError(f"{prefix}{given[0]} is streamed and cannot be loaded into: unstream(model) first")
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)  # type: ignore[arg-type]


@functools.cache
def streamed_class(plain: type) -> type:
    """The class of a linear module of class `plain` while it is streamed; its attribute `plain` leads back."""
    return type(plain.__name__, (_StreamedModule, plain), {"__module__": __name__, "plain": plain})
