"""Products of routed rows with the weights of experts, and how these weights are stored: densely, or as codes.

E experts, N out, K in, S rows: one for each token and expert that it is routed to, sorted by expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels import library_segments
from ..kernels.autograd import once
from ..kernels.codes import Stack
from ..support.errors import ModelError
from .frozen import StoredWeight, whole
from .quantized import ExpertCodes


class Route(NamedTuple):
    """Which rows are whose: the expert [S] of each row, where each expert's rows end [E] (int32), the token [S] of each row, and
    where the rows came from [S]."""

    experts: torch.Tensor
    ends: torch.Tensor
    tokens: torch.Tensor
    order: torch.Tensor

    @classmethod
    def of(cls, chosen_Tk: torch.Tensor, experts: int) -> "Route":
        """The rows of tokens that are routed to the experts `chosen_Tk` each. Nothing waits for the device."""
        experts_S, order_S = chosen_Tk.reshape(-1).sort(stable=True)
        each = torch.arange(experts, device=chosen_Tk.device, dtype=experts_S.dtype)
        ends_E = torch.searchsorted(experts_S, each, right=True, out_int32=True)
        return cls(experts_S, ends_E, order_S // chosen_Tk.shape[-1], order_S)

    @classmethod
    def of_all(cls, rows: int, experts: int, device: torch.device) -> "Route":
        """The rows of a module that runs every expert on all tokens."""
        order_S, each = torch.arange(rows, device=device), rows // experts
        ends_E = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * each
        return cls(order_S // each, ends_E, order_S % each, order_S)


class ExpertWeight(StoredWeight):
    """The frozen weight W [E, N, K] of all experts of a layer, in a parameter of its module."""

    def __init__(self, module: nn.Module, key: str, transposed: bool) -> None:
        self.module, self.key, self.transposed = module, key, transposed

    @property
    def stored(self) -> torch.Tensor:
        return self.module._parameters[self.key]  # type: ignore[return-value]

    @property
    def weight_ENK(self) -> Any:
        """What stands for W [E, N, K] in products: a view of the parameter, or its Stack."""
        return self.stored.transpose(1, 2) if self.transposed else self.stored

    @property
    def bias_EN(self) -> torch.Tensor | None:
        return self.module._parameters.get(f"{self.key}_bias")

    @property
    def experts(self) -> int:
        return len(self.weight_ENK)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of one expert."""
        _, n_out, n_in = self.weight_ENK.shape
        return n_out, n_in

    def product(self, x_SK: torch.Tensor, route: Route, backend: str = "auto") -> torch.Tensor:
        """W_e x [S, N], without the bias. Raises UnsupportedError where `backend` cannot run."""
        y_SN: torch.Tensor = library_segments.run(
            "segment_product", x_SK.to(self.dtype), self.weight_ENK, route.ends, backend
        )
        return y_SN

    def with_bias(self, y_SN: torch.Tensor, route: Route) -> torch.Tensor:
        return y_SN if self.bias_EN is None else y_SN + self.bias_EN[route.experts]

    def frobenius(self) -> torch.Tensor:
        """||W_e||_F of each expert [E], in float32 (float64 for float64)."""
        stored = whole(self.stored.detach())
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.stack([torch.linalg.vector_norm(one, dtype=wide) for one in stored])  # no wide copy of all

    @torch.no_grad()
    def add_(self, delta_ENK: Callable[[int], torch.Tensor]) -> None:
        """W_e += delta_ENK(e) [N, K] for each expert, summed in float32 and rounded once."""
        for e, one in enumerate(self.weight_ENK):
            one.copy_(one.float() + delta_ENK(e))


class QuantizedExpertWeight(ExpertWeight):
    """The same as codes, in a child of the module that has the parameter's name. It takes no update in place."""

    @property
    def held(self) -> ExpertCodes:
        return self.module._modules[self.key]  # type: ignore[return-value]

    @property
    def stored(self) -> torch.Tensor:
        codes: torch.Tensor = self.held._parameters["weight"]  # type: ignore[assignment]
        return codes

    @property
    def kind(self) -> str:
        return self.held.kind

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    @property
    def weight_ENK(self) -> Stack:
        return self.held.stack

    def fingerprint(self) -> list[float]:
        return self._wide()[0].flatten()[:4].tolist()

    def frobenius(self) -> torch.Tensor:
        return torch.stack([torch.linalg.vector_norm(one) for one in self._wide()])

    def add_(self, delta_ENK: Callable[[int], torch.Tensor]) -> None:
        """Raises ModelError: most of a small update would be lost between two codes."""
        raise ModelError(f"{self.kind} weights take no update in place: make them dense first")

    @torch.no_grad()
    def plus(self, delta_ENK: Callable[[int], torch.Tensor] | None = None) -> torch.Tensor:
        """W_e + delta_ENK(e), in the layout and dtype of the parameter that the codes stand for: summed in float32, rounded once."""
        n_out, n_in = self.shape
        new = torch.empty(self.experts, n_out, n_in, dtype=self.dtype, device=self.device)
        for e, one in enumerate(self._wide()):
            new[e] = one if delta_ENK is None else one + delta_ENK(e)
        return new.transpose(1, 2).contiguous() if self.transposed else new

    def _wide(self) -> Stack:
        return Stack(self.held.codes.to(torch.float32), self.held.experts)


def weight_of(module: nn.Module, key: str, transposed: bool) -> ExpertWeight:
    kind = QuantizedExpertWeight if isinstance(module._modules.get(key), ExpertCodes) else ExpertWeight
    return kind(module, key, transposed)


class PlainProduct(torch.autograd.Function):
    """x W_e^T [S, N] of experts without adapters, with gradients for x and, where all weights are trained, W."""

    @staticmethod
    def forward(
        ctx: Any, x_SK: torch.Tensor, w_ENK: torch.Tensor | Stack, ends_E: torch.Tensor, backend: str
    ) -> torch.Tensor:
        kept = (w_ENK,) if isinstance(w_ENK, torch.Tensor) else ()
        ctx.save_for_backward(x_SK if ctx.needs_input_grad[1] else None, ends_E, *kept)
        ctx.backend, ctx.codes = backend, None if kept else w_ENK
        y_SN: torch.Tensor = library_segments.run("segment_product", x_SK, w_ENK, ends_E, backend)
        return y_SN

    @staticmethod
    @once
    def backward(ctx: Any, dy_SN: torch.Tensor) -> Any:
        x_SK, ends_E, *kept = ctx.saved_tensors
        dy_SN, (need_x, need_w, *_) = dy_SN.contiguous(), ctx.needs_input_grad
        dx = dw = None
        if need_x:
            w_EKN = (kept[0] if kept else ctx.codes).transpose(1, 2)
            dx = library_segments.run("segment_product", dy_SN, w_EKN, ends_E, ctx.backend)
        if need_w:
            dw = torch.ops.plopfast.segment_outer(dy_SN, x_SK, ends_E)
        return dx, dw, None, None


def plain_product(weight: ExpertWeight, x_SK: torch.Tensor, route: Route, backend: str = "auto") -> torch.Tensor:
    """W_e x_s + bias_e [S, N] of experts without adapters."""
    x_SK = x_SK.to(weight.dtype).contiguous()
    return weight.with_bias(PlainProduct.apply(x_SK, weight.weight_ENK, route.ends, backend), route)
