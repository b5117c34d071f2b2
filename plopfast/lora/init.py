"""The first value of lora_A. lora_B is zero at first, so that an adapter changes nothing before it is trained.

kaiming     uniform, as PEFT's default (Hu et al., arXiv 2106.09685)
gaussian    standard deviation 1 / rank, as PEFT's
orthogonal  random orthonormal rows; PEFT's draws A and B, both nonzero, with B A = 0, and for even ranks only
eva         the leading input directions (Paischer et al., arXiv 2410.07170), measured by `score(..., eva_rank=...)`
"""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import nn

from ..support.errors import ConfigError, PlacementError

INITS = ("kaiming", "gaussian", "orthogonal", "eva")


def check_init(init: str, eva: Mapping[str, torch.Tensor] | None) -> None:
    """Raises ConfigError for an unknown `init`, and where `init` and the vectors `eva` do not go together."""
    if init not in INITS:
        raise ConfigError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
    if (init == "eva") != (eva is not None):
        got = "no vectors" if eva is None else f"vectors with init={init!r}"
        raise ConfigError(f"init='eva' and eva=score(..., eva_rank=...).eva go together, got {got}")


def check_vectors(vectors: torch.Tensor | None, name: str, rank: int, n_in: int) -> None:
    """Raises PlacementError unless EVA's vectors of module `name` are [at least rank, n_in]."""
    if vectors is None or vectors.shape[1] != n_in:
        got = "none" if vectors is None else str(list(vectors.shape))
        raise PlacementError(
            f"{name}: expected EVA vectors [rank, {n_in}], got {got}; were they made for another model?"
        )
    if len(vectors) < rank:
        raise PlacementError(
            f"{name}: rank {rank} needs as many EVA vectors, got {len(vectors)}; score with eva_rank={rank}"
        )


def draw_A(init: str, rank: int, n_in: int) -> torch.Tensor:
    """Draws lora_A [rank, n_in], float32, from torch's generator on the CPU: the same values for every device."""
    lora_A = torch.empty(rank, n_in)
    if init == "gaussian":
        return nn.init.normal_(lora_A, std=1 / rank)
    if init == "orthogonal":
        return nn.init.orthogonal_(lora_A)
    return nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))


def draw_seeded_A(init: str, rank: int, n_in: int, seed: int, name: str) -> torch.Tensor:
    """As `draw_A`, but the values depend on the seed and the module's name alone; torch's own generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big"))
        return draw_A(init, rank, n_in)
