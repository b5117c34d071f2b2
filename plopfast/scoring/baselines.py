"""The denominators of NFN: the norm that a random input of length 1 has after each module's weight."""

import math
from collections.abc import Sequence

import torch

from ..models.experts import ExpertInfo
from ..models.linears import LinearInfo
from ..support.errors import ModelError


def denominators(infos: Sequence[LinearInfo], baseline: str, samples: int, seed: int) -> torch.Tensor:
    """Returns E||W u|| of a random unit vector u for each module, by "closed-form" or "monte-carlo", [modules] float32.

    Raises ModelError naming the first module whose weight is all zeros or not finite.
    """
    found = closed_form(infos) if baseline == "closed-form" else monte_carlo(infos, samples, seed)
    _check([info.name for info in infos], found)
    return found


def expert_denominators(info: ExpertInfo, baseline: str, samples: int, seed: int) -> torch.Tensor:
    """As `denominators`, for each expert of a weight: [E] float32. Raises ModelError for an expert that is all zeros or not
    finite."""
    if baseline == "closed-form":
        found = info.frozen.frobenius() / info.n_in**0.5
    else:
        unit = _unit_vectors(samples, info.n_in, torch.Generator().manual_seed(seed)).to(info.frozen.device)
        found = torch.stack([(unit @ w_NK.float().T).norm(dim=1).mean() for w_NK in info.frozen.weight_ENK])
    _check([f"{info.name}: expert {e}" for e in range(info.experts)], found)
    return found


def _check(names: Sequence[str], found: torch.Tensor) -> None:
    for name, value in zip(names, found.tolist(), strict=True):
        if not math.isfinite(value):
            raise ModelError(f"{name}: the weight holds NaN or infinity; is the model file damaged?")
        if value == 0:
            raise ModelError(f"{name}: the weight is all zeros; was the model initialised?")


def closed_form(infos: Sequence[LinearInfo]) -> torch.Tensor:
    """Returns ||W||_F / sqrt(n_in) of each module, [modules] float32.

    This is the root of the second moment of ||W u|| for a random unit vector u; nfn.py says how far it is from the mean.
    """
    first = infos[0].frozen.device
    return torch.stack([i.frozen.frobenius().to(first) / i.n_in**0.5 for i in infos])


def monte_carlo(infos: Sequence[LinearInfo], samples: int, seed: int) -> torch.Tensor:
    """Returns the mean of ||W u|| over `samples` random unit vectors u for each module, [modules] float32."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    means = []
    for info in infos:
        unit, w_NK = _unit_vectors(samples, info.n_in, generator), info.frozen.dequantize()
        unit = unit.to(w_NK.device)
        means.append((unit @ w_NK.float().T).norm(dim=1).mean().cpu())
    return torch.stack(means)


def _unit_vectors(samples: int, n_in: int, generator: torch.Generator) -> torch.Tensor:
    """Random unit vectors [samples, n_in]."""
    g = torch.randn(samples, n_in, generator=generator)
    return g / g.norm(dim=1, keepdim=True)
