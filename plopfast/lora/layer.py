"""LoRA on a model's linear modules, in place: inject, disable, merge, unload.

Hu et al., "LoRA", arXiv 2106.09685: W x + (alpha / rank) B A x with W frozen, A Kaiming-uniform and B zero at first;
rsLoRA (arXiv 2312.03732) scales by alpha / sqrt(rank) instead.
"""

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..models.linears import is_linear, is_transposed
from ..support.errors import AdapterError, ConfigError, PlacementError
from . import tuning
from .ops import lora_linear, path
from .placement import Placement

if TYPE_CHECKING:
    from .shared import SharedInput

INITS = ("kaiming", "gaussian", "orthogonal", "eva")


class LoRALinear(nn.Module):
    """A frozen linear module (nn.Linear or transformers' Conv1D) with a low-rank update.

    lora_A [rank, in] and lora_B [out, rank] are float32 whatever the base's dtype. Dropout draws one seed per call
    from torch's generator, so it is reproducible under `torch.manual_seed` and activation checkpointing; no mask is
    stored. `lora_A`: its first value (default: drawn Kaiming-uniform). `backend`: see `lora_linear`. Raises PlacementError where the rank is below 1 or above the smaller side of
    the weight, and BackendError where `backend` cannot run.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        backend: str = "auto",
        lora_A: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_rank(base, rank)
        path(base.weight.device, backend)  # type: ignore[arg-type]
        self.backend = backend
        self.base = base.requires_grad_(False)
        self.transposed = is_transposed(base)
        n_out, n_in = self.weight_NK.shape
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.enabled = True
        self.low: tuple[torch.Tensor, torch.Tensor] | None = None  # see prepared()
        self.shared: SharedInput | None = None
        device = self.weight_NK.device
        self.lora_A = nn.Parameter((_initial_A("kaiming", rank, n_in) if lora_A is None else lora_A).to(device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, device=device))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def weight_NK(self) -> torch.Tensor:
        return self.weight.T if self.transposed else self.weight

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]"""
        base = self.base
        if not self.enabled:
            return base(x)
        p = self.dropout if self.training else 0.0
        # a torch draw, not a counter of our own: checkpointing restores the generator before it recomputes
        seed = torch.randint(1 << 62, (), device="cpu") if p else None
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        weight = weight.T if self.transposed else weight
        return lora_linear(
            x,
            weight,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            bias=base.bias,  # type: ignore[arg-type]
            dropout_p=p,
            seed=seed,
            backend=self.backend,
            low=self.low,
            s=self.shared.s_of(self, x, weight) if self.shared and not p else None,
        )

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """W + s B A in the base's layout and dtype, summed in float32."""
        delta = self.scaling * (self.lora_B.float() @ self.lora_A.float())
        delta = delta.T if self.transposed else delta
        return (self.weight.float() + delta).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, rslora={self.rslora}"


def inject(
    model: nn.Module,
    placement: Placement,
    *,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
    backend: str = "auto",
    init: str = "kaiming",
    eva: Mapping[str, torch.Tensor] | None = None,
) -> list[str]:
    """Freezes `model` and puts a LoRALinear in each of the placement's modules, in place; returns their names.

    B is zero at first. `init` says what A is: "kaiming" (uniform, as PEFT's default), "gaussian" (standard deviation
    1 / rank, as PEFT's), "orthogonal" (random orthonormal rows; PEFT's draws A and B, both nonzero, with B A = 0, for
    even ranks alone), or "eva" (arXiv 2410.07170: the leading input directions, the first rows of `eva`, which is
    `report.eva` of `score(..., eva_rank=...)`). A random A is drawn from (seed, module name), so that it depends on
    nothing else. Raises PlacementError for names the model does not have and vectors that do not fit it, ConfigError
    for an `init` that is unknown or disagrees with `eva`, AdapterError where the model has adapters already, and
    BackendError where `backend` cannot run on the modules' device.
    """
    if init not in INITS:
        raise ConfigError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
    if (init == "eva") != (eva is not None):
        got = "no vectors" if eva is None else f"vectors with init={init!r}"
        raise ConfigError(f"init='eva' and eva=score(..., eva_rank=...).eva go together, got {got}")
    if adapters(model):
        raise AdapterError("the model has LoRA adapters already: unload(model) or merge(model) first")
    modules, on_gpu = dict(model.named_modules()), False
    for name in placement.modules:
        if name not in modules or not is_linear(modules[name]):
            raise PlacementError(
                f"the placement names {name!r}, which is not a linear module of this {type(model).__name__}; "
                "was it made for another model?"
            )
        _check_rank(modules[name], placement.modules[name][0], f"{name}: ")
        if eva is not None:
            _check_vectors(eva.get(name), modules[name], name, placement.modules[name][0])
        if path(modules[name].weight.device, backend) != "torch":
            on_gpu = True
    if on_gpu and (note := tuning.load()):
        warnings.warn(note, stacklevel=2)
    model.requires_grad_(False)
    for name, (rank, alpha) in placement.modules.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big"))
            n_in = modules[name].weight.shape[0 if is_transposed(modules[name]) else 1]
            lora_A = _initial_A(init, rank, n_in) if eva is None else eva[name][:rank].float().clone()
            wrapped = LoRALinear(
                modules[name], rank, alpha, dropout=dropout, rslora=rslora, backend=backend, lora_A=lora_A
            )
        replace_module(model, name, wrapped.train(modules[name].training))
    return list(adapters(model))


def _initial_A(init: str, rank: int, n_in: int) -> torch.Tensor:
    """A random A [rank, n_in], float32, drawn on the CPU: alike on any device."""
    lora_A = torch.empty(rank, n_in)
    if init == "gaussian":
        return nn.init.normal_(lora_A, std=1 / rank)
    if init == "orthogonal":
        return nn.init.orthogonal_(lora_A)
    return nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))


def _check_vectors(vectors: torch.Tensor | None, base: nn.Module, name: str, rank: int) -> None:
    n_in = base.weight.shape[0 if is_transposed(base) else 1]  # type: ignore[index]
    if vectors is None or vectors.shape[1] != n_in:
        got = "none" if vectors is None else str(list(vectors.shape))
        raise PlacementError(
            f"{name}: expected EVA vectors [rank, {n_in}], got {got}; were they made for another model?"
        )
    if len(vectors) < rank:
        raise PlacementError(
            f"{name}: rank {rank} needs as many EVA vectors, got {len(vectors)}; score with eva_rank={rank}"
        )


def _check_rank(base: nn.Module, rank: int, where: str = "") -> None:
    n_out, n_in = base.weight.shape  # type: ignore[misc]
    if not 1 <= rank <= min(n_in, n_out):
        raise PlacementError(
            f"{where}rank {rank} does not fit a {n_out} x {n_in} weight: choose 1 to {min(n_in, n_out)}"
        )


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Module name -> LoRALinear, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model alone while the context lasts."""
    modules = list(adapters(model).values())
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.enabled = True


def merge(model: nn.Module) -> list[str]:
    """Adds every low-rank update into its frozen weight and puts the plain modules back; returns their names."""
    merged = adapters(model)
    for module in merged.values():
        module.weight.data.copy_(module.merged_weight())
    return unload(model)


def unload(model: nn.Module) -> list[str]:
    """Takes the adapters out and puts the plain modules back, weights untouched; returns their names."""
    removed = adapters(model)
    for name, module in removed.items():
        replace_module(model, name, module.base)
    return list(removed)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
