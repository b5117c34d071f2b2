"""How far two rankings of module types agree: Kendall's tau, the same pick, and random subsets of the scored prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..placing.rules import ranked
from ..scoring.report import NFNReport, types_of
from ..scoring.stopping import averages
from ..support.errors import ConfigError

SHORTEST = 8  # prompts in a subset, and tokens of a truncated row; then 16, 32, ...
REPEATS = 100  # random subsets of each size


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Kendall's tau-b of two lists of equal length, from -1 (opposite order) to 1 (same order).

    0 where all values of a list are ties, for which tau is undefined. Source: Kendall, "The treatment of ties in ranking
    problems", Biometrika 1945.
    """
    sign_a, sign_b = pair_signs(one), pair_signs(other)
    pairs = float((sign_a.abs().sum() * sign_b.abs().sum()).sqrt())
    return float((sign_a * sign_b).sum()) / pairs if pairs else 0.0


def pair_signs(values: Sequence[float]) -> torch.Tensor:
    """Return for each two values which one is larger: 1, -1, or 0 for a tie [values, values] float64."""
    x = torch.tensor(values, dtype=torch.float64)
    return (x[:, None] - x).sign()


def tau_of(base: Mapping[str, float], other: Mapping[str, float], highest: bool = False) -> float:
    """Return Kendall's tau of two scorings of the same types. `highest`: `other` prefers high values, `base` low ones."""
    return kendall_tau(list(base.values()), [-other[type_] if highest else other[type_] for type_ in base])


def pick(types: Mapping[str, float], k: int, highest: bool = False) -> list[str]:
    """Return the k lowest (or highest) types, best first."""
    return ranked(types, highest)[:k]


def agreement(kind: str, what: str, base: Mapping[str, float], others: Sequence[Mapping[str, float]], k: int) -> Any:
    """Return a row of audit.json's "stability": how far `others` agree with `base`."""
    taus = [tau_of(base, other) for other in others]
    same = [set(pick(other, k)) == set(pick(base, k)) for other in others]
    return {
        "kind": kind, "what": what, "repeats": len(others),
        "tau": sum(taus) / len(taus), "tau_low": min(taus), "same_pick": sum(same) / len(same),
    }  # fmt: skip


def subset_rows(report: NFNReport, k: int, seed: int = 0, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Compare the ranking by all prompts with those by random subsets of 8, 16, 32, ... of them: a row for each size.

    It needs nothing but `report.prompt_stats`. Raises ConfigError where there are none, and for 8 prompts or fewer.
    """
    if report.prompt_stats is None:
        raise ConfigError("no subsets: these scores hold no statistics of single prompts (compat='official')")
    stats = report.prompt_stats[:, :, report.prompt_stats[1].any(0)]
    prompts = stats.shape[2]
    if prompts <= SHORTEST:
        raise ConfigError(f"{prompts} prompts: too few for subsets of {SHORTEST}; score more of them")
    names, mean_TM = averages(types_of(report.scores.values()))
    generator = torch.Generator().manual_seed(seed)

    def types(kept_RP: torch.Tensor) -> list[dict[str, float]]:
        sums_RM, counts_RM = (kept_RP @ part.T for part in stats)
        return [dict(zip(names, row, strict=True)) for row in (sums_RM / counts_RM @ mean_TM.T).tolist()]

    (whole,) = types(torch.ones(1, prompts, dtype=torch.float64))
    rows = []
    for size in doubled_below(prompts):
        order_RP = torch.rand(repeats, prompts, generator=generator).argsort(1)
        kept_RP = torch.zeros(repeats, prompts, dtype=torch.float64).scatter_(1, order_RP[:, :size], 1.0)
        rows.append(agreement("subset", f"{size} prompts", whole, types(kept_RP), k))
    return rows


def doubled_below(limit: int) -> list[int]:
    """Return 8, 16, 32, ... below `limit`."""
    return [SHORTEST << i for i in range(limit.bit_length()) if SHORTEST << i < limit]
