"""The LoRA linear: a frozen linear module with a low-rank update; and how a model's are found and switched off.

    y = W x + scaling B A x,   scaling = alpha / rank

W is frozen, and A and B are trained (Hu et al., "LoRA", arXiv 2106.09685). With rsLoRA (arXiv 2312.03732) the scaling
is alpha / sqrt(rank).
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..models.frozen import frozen_of
from . import dora as dora_math
from .experts import ExpertLoRA
from .init import draw_A
from .ops import lora_linear, new_seed, path
from .placement import check_rank
from .replaced import base_values


class LoRALinear(nn.Module):
    """A frozen linear module (nn.Linear or transformers' Conv1D) with a low-rank update.

    lora_A [rank, in] and lora_B [out, rank] are float32, whatever the dtype of `base`. `lora_A` gives the first value of
    A; without it, A is drawn Kaiming-uniform. `backend` is that of `lora_linear`. `dora` trains the length of each row of
    the weight, too: lora_magnitude [out], float32 (dora.py).

    Dropout draws one seed a call from torch's generator and stores no mask, so it is reproducible under
    `torch.manual_seed` and activation checkpointing.

    Raises ModelError for a `base` that isn't a linear module or is quantised, PlacementError where the rank is below 1 or
    above the smaller side of the weight, and BackendError where `backend` cannot run.

    >>> module = pf.LoRALinear(torch.nn.Linear(64, 48), rank=4, alpha=8)
    >>> module(torch.randn(2, 64)).shape, module.lora_A.shape, module.lora_B.shape
    (torch.Size([2, 48]), torch.Size([4, 64]), torch.Size([48, 4]))
    """

    squares: torch.Tensor | None
    name: str | None = None  # of a NamedLoRA (many.py)

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        backend: str = "auto",
        lora_A: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.frozen = frozen_of(base)
        n_out, n_in = self.frozen.shape
        device = self.frozen.device
        check_rank(rank, n_in, n_out)
        path(device, backend)
        self.backend = backend
        self.base = base
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.enabled = True
        self.low: tuple[torch.Tensor, torch.Tensor] | None = None  # see Prepared()
        self.shared: Any = None  # a SharedInput of shared.py, where it reads what others read too
        self.lora_A = nn.Parameter((draw_A("kaiming", rank, n_in) if lora_A is None else lora_A).to(device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, device=device))
        squares_N = dora_math.squares(self.frozen).to(device) if dora else None
        self.lora_magnitude = None if squares_N is None else nn.Parameter(squares_N.sqrt())
        self.register_buffer("squares", squares_N, persistent=False)  # ||W||^2 of each row
        base.requires_grad_(False)  # nothing above changes the base, in case it raises

    @property
    def weight(self) -> torch.Tensor:
        """The frozen parameter, because some models read the dtype of their linear modules' weights."""
        return self.frozen.stored

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]"""
        base, magnitude = self.base, self.lora_magnitude
        if not self.enabled:
            return base(x)
        p = self.dropout if self.training else 0.0
        y = None if self.shared is None else self.shared.y_of(self, x, p)
        if y is None:
            y = lora_linear(
                x,
                self.frozen.weight_NK,
                self.lora_A,
                self.lora_B,
                scaling=self.scaling,
                bias=base.bias if magnitude is None else None,  # type: ignore[arg-type]
                dropout_p=p,
                seed=self.draw_seed(x.device) if p else None,
                backend=self.backend,
                low=self.low,
            )
        return y if magnitude is None else dora_math.scaled(y, magnitude, self.lengths(), self.bias)

    def draw_seed(self, device: torch.device) -> torch.Tensor:
        """The seed of one call's dropout."""
        return new_seed(device)

    @property
    def product_bias(self) -> torch.Tensor | None:
        """The bias that the product adds; with DoRA it comes after the lengths."""
        return self.base.bias if self.lora_magnitude is None else None  # type: ignore[return-value]

    def lengths(self) -> torch.Tensor:
        """||W + scaling B A|| of each row [out], in float32, without a gradient."""
        assert self.squares is not None, "it has no lora_magnitude"
        return dora_math.lengths(self.frozen.weight_NK, self.squares, self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def delta_NK(self) -> torch.Tensor:
        """The update of the weight, scaling B A [out, in], in float32; with DoRA g (W + scaling B A) - W."""
        delta = self.scaling * (self.lora_B.float() @ self.lora_A.float())
        if self.lora_magnitude is None:
            return delta
        w_NK = self.frozen.dequantize().float()
        whole = w_NK + delta
        return whole * (self.lora_magnitude / whole.norm(dim=1).clamp_min(dora_math.TINY))[:, None] - w_NK

    def merged_weight(self) -> torch.Tensor:
        """W + scaling B A in the base module's layout and dtype; the base stays as it is."""
        return self.frozen.plus(self.delta_NK())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, rslora={self.rslora}"


def adapters(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Module -> LoRALinear, or ExpertLoRA for a weight of experts, in the model's order: those without a name, or those that
    `inject` gave this name."""
    found = {
        path: one
        for path, one in model.named_modules()
        if isinstance(one, LoRALinear | ExpertLoRA) and one.name == name
    }
    return found if name is None else {path.rsplit(".", 2)[0]: one for path, one in found.items()}


def every_adapter(model: nn.Module) -> list[Any]:
    """All of the model's LoRALinears and ExpertLoRAs, whatever their names."""
    return [module for module in model.modules() if isinstance(module, LoRALinear | ExpertLoRA)]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switches the adapters off while the context lasts, and what they replace whole; those that were off before stay off."""
    modules = [module for module in every_adapter(model) if module.enabled]
    try:
        for module in modules:
            module.enabled = False
        with base_values(model):
            yield
    finally:
        for module in modules:
            module.enabled = True


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
