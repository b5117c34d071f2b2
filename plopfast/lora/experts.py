"""Low-rank updates of the experts of a mixture: A and B of its own for each expert, of one rank, as PEFT's target_parameters has.

    y_s = W_e x_s + bias_e + scaling B_e A_e x_s  for the rows s of expert e

E experts, N out, K in, R rank, S rows sorted by expert (models/experts.py).
"""

import math
from typing import Any

import torch
from torch import nn

from ..kernels import library_segments
from ..kernels.autograd import once
from ..kernels.codes import Stack
from ..models.experts import Mixture
from ..models.quantized_experts import codes_of, put_codes, put_dense
from ..models.routed import ExpertWeight, QuantizedExpertWeight, Route, plain_product
from .ops import or_backend_error, path
from .placement import check_rank


class ExpertLoRA(nn.Module):
    """The update of one weight of all experts of a layer: lora_A [E, R, K] and lora_B [E, N, R], float32.

    It has no dropout and no magnitudes, as PEFT's files have none for parameters. `backend` "auto" takes the Triton kernels
    wherever they run. Raises PlacementError for a rank below 1 or above the smaller side of an expert's weight, and
    BackendError where `backend` cannot run.
    """

    dropout, shared, lora_magnitude, name = 0.0, None, None, None

    def __init__(
        self,
        frozen: ExpertWeight,
        rank: int,
        alpha: float,
        *,
        rslora: bool,
        lora_A: torch.Tensor,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        n_out, n_in = frozen.shape
        check_rank(rank, n_in, n_out)
        path(frozen.device, backend)
        self.frozen, self.rank, self.alpha, self.rslora, self.backend = frozen, rank, alpha, rslora, backend
        self.enabled = True
        self.low: tuple[torch.Tensor, torch.Tensor] | None = None  # A and B in the weight's dtype, see `Prepared`
        self.lora_A = nn.Parameter(lora_A.to(frozen.device))
        self.lora_B = nn.Parameter(torch.zeros(frozen.experts, n_out, rank, device=frozen.device))

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x_SK: torch.Tensor, route: Route) -> torch.Tensor:
        """Rows sorted by expert -> [S, N], with the bias."""
        weight = self.frozen.weight_ENK
        a_ERK, b_ENR = self.low or (self.lora_A, self.lora_B)
        x_SK = x_SK.to(weight.dtype).contiguous()
        how = route.ends, self.scaling, self.backend
        y_SN = or_backend_error(Adapted.apply, x_SK, weight, self.lora_A, self.lora_B, a_ERK, b_ENR, *how)
        return self.frozen.with_bias(y_SN, route)

    @torch.no_grad()
    def delta_NK(self, expert: int) -> torch.Tensor:
        """The update of one expert's weight, scaling B A [N, K], in float32."""
        return self.scaling * (self.lora_B[expert].float() @ self.lora_A[expert].float())

    def extra_repr(self) -> str:
        return f"experts={self.frozen.experts}, rank={self.rank}, alpha={self.alpha:g}"


class Adapted(torch.autograd.Function):
    """x W_e^T + scaling (x A_e^T) B_e^T [S, N], for frozen W [E, N, K]. It keeps x and S = scaling x A_e^T [S, R] alone.

    `a_ERK` and `b_ENR` are lora_A and lora_B, or copies of them in x's dtype, which take no cast.
    """

    @staticmethod
    def forward(
        ctx: Any, x_SK: torch.Tensor, w_ENK: torch.Tensor | Stack, lora_A: torch.Tensor, lora_B: torch.Tensor, a_ERK: torch.Tensor,
        b_ENR: torch.Tensor, ends_E: torch.Tensor, scaling: float, backend: str,
    ) -> torch.Tensor:  # fmt: skip
        how = scaling, backend
        y_SN, s_SR = library_segments.run("segment_forward", x_SK, w_ENK, a_ERK, b_ENR, ends_E, *how)
        kept = (w_ENK,) if isinstance(w_ENK, torch.Tensor) else ()  # codes are decoded again
        ctx.save_for_backward(x_SK, s_SR, lora_A, lora_B, ends_E, *kept)
        ctx.low, ctx.how, ctx.codes = (a_ERK, b_ENR), how, None if kept else w_ENK
        return y_SN

    @staticmethod
    @once
    def backward(ctx: Any, dy_SN: torch.Tensor) -> Any:
        x_SK, s_SR, lora_A, lora_B, ends_E, *kept = ctx.saved_tensors
        needed = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        w_ENK = kept[0] if kept else ctx.codes
        found = library_segments.run(
            "segment_backward", dy_SN.contiguous(), x_SK, s_SR, w_ENK, *ctx.low, ends_E, *ctx.how, *needed
        )
        dx, da, db = (g if need else None for g, need in zip(found, needed, strict=True))
        da, db = (g if g is None else g.to(p.dtype) for g, p in ((da, lora_A), (db, lora_B)))
        return dx, None, da, db, None, None, None, None, None


class LoRAExperts(nn.Module):
    """Stands in the place of a module of experts, some of whose weights have adapters: children of the weights' names."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.base, self.mixture = mixture.module, mixture
        self.base.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the module itself."""
        if not any(module.enabled for module in self.adapters().values()):
            return self.base(*args, **kwargs)
        return self.mixture.run(self.product, *args, **kwargs)

    def adapters(self) -> dict[str, ExpertLoRA]:
        """The adapted weights, by name."""
        return {key: module for key, module in self.named_children() if isinstance(module, ExpertLoRA)}

    def product(self, key: str, x_SK: torch.Tensor, route: Route) -> torch.Tensor:
        """One weight's product, with its adapter where it has one and with its bias."""
        adapters = self.adapters()
        if key in adapters and adapters[key].enabled:
            return adapters[key](x_SK, route)
        backend = next(iter(adapters.values())).backend
        return or_backend_error(plain_product, self.mixture.weight(key), x_SK, route, backend)


def adapted_mixtures(model: nn.Module) -> dict[str, Mixture]:
    """Mixtures that have adapters, by name."""
    return {name: module.mixture for name, module in model.named_modules() if isinstance(module, LoRAExperts)}


def inject_experts(model: nn.Module, name: str, mixture: Mixture, adapter: ExpertLoRA) -> None:
    """Puts an adapter on the weight `name` of the model, "...experts.down_proj"."""
    place, _, key = name.rpartition(".")
    there = model.get_submodule(place)
    if not isinstance(there, LoRAExperts):
        there = LoRAExperts(mixture).train(there.training)
        model.set_submodule(place, there)
    there.add_module(key, adapter.train(there.training))


def remove_experts(model: nn.Module, name: str) -> None:
    """Takes an adapter out again, and puts the experts themselves back where it was the last."""
    place, _, key = name.rpartition(".")
    there: Any = model.get_submodule(place)
    del there._modules[key]
    if not there.adapters():
        model.set_submodule(place, there.base)


def merge_codes(model: nn.Module, name: str, adapter: ExpertLoRA, *, dense: bool) -> None:
    """Puts W + update in the place of codes, as a parameter or as codes of the same kind, and takes the adapter out."""
    weight, there = adapter.frozen, model.get_submodule(name.rpartition(".")[0])
    assert isinstance(weight, QuantizedExpertWeight) and isinstance(there, LoRAExperts)
    new = weight.plus(adapter.delta_NK)
    codes = None if dense else codes_of(new.transpose(1, 2) if weight.transposed else new, weight.kind)
    if codes is None:
        put_dense(there.mixture, weight.key, new)
    else:
        put_codes(there.mixture, weight.key, weight.kind, codes)
    remove_experts(model, name)
