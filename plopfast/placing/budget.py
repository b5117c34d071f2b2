"""Budgets: how many parameters one allows, and the ranks it gives to modules."""

import heapq
import re
from collections.abc import Callable

from ..lora.placement import full_rank
from ..scoring.report import ModuleScore
from ..support.errors import PlacementError, shown
from ..support.sizes import size_of

PARAMETER_BYTES = 4  # adapters are float32


def parameters_at(rank: int, score: ModuleScore) -> int:
    """Returns the parameters of an adapter of this rank on a module."""
    return rank * (score.n_in + score.n_out) * score.experts


def allowed_parameters(budget: int | str, match: Callable[[str, int], int]) -> int:
    """Returns the parameters that a budget allows: 2396160, "2.5M", "10MB", "8MiB" or "match:all:r8".

    `match(rule, rank)` returns the parameters of another rule at a rank. Raises PlacementError for any other text.
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        return budget
    text = str(budget).strip()
    if found := re.fullmatch(r"match:(?P<rule>[^:]+):r(?P<rank>\d{1,9})", text):
        return match(found["rule"], int(found["rank"]))
    if size := size_of(text):
        amount, in_bytes = size
        return int(amount / (PARAMETER_BYTES if in_bytes else 1))
    raise PlacementError(
        f"budget {shown(budget)}: expected parameters (2396160, 2.5M), bytes (10MB, 8MiB) or match:RULE:rRANK (match:all:r8)"
    )


def share_out(budget: int, modules: dict[str, ModuleScore], proportional: bool) -> dict[str, int]:
    """Returns the ranks that a budget of parameters gives to modules, at least 1 to each.

    Ranks are given one by one, each to the module with the most weight for every rank that it would then have (D'Hondt's
    apportionment). All weights are 1, or 1 / NFN if `proportional`; equal claims go to the lower NFN. Raises
    PlacementError for a budget below rank 1 or above full rank on these modules.
    """
    most = {name: full_rank(score.n_in, score.n_out) for name, score in modules.items()}
    size = {name: parameters_at(1, score) for name, score in modules.items()}
    left = budget - sum(size.values())
    if left < 0:
        raise PlacementError(
            f"budget {budget:,} parameters: below the smallest adapter on these {len(modules)} modules, which takes "
            f"{budget - left:,} at rank 1: raise it, or choose fewer modules"
        )
    if budget > (full := sum(most[name] * size[name] for name in modules)):
        raise PlacementError(
            f"budget {budget:,} parameters: above the {full:,} that full ranks of these {len(modules)} modules take: "
            "lower it, or choose more modules"
        )
    order = sorted(modules, key=lambda name: modules[name].nfn)
    # 1 / weight: an NFN of 0 has no weight
    price = {name: score.nfn if proportional else 1.0 for name, score in modules.items()}
    given = dict.fromkeys(modules, 1)
    queue = [(2 * price[name], place, name) for place, name in enumerate(order)]
    heapq.heapify(queue)
    while queue:
        _, place, name = heapq.heappop(queue)
        if size[name] <= left and given[name] < most[name]:  # otherwise it never will again, as `left` only falls
            given[name] += 1
            left -= size[name]
            heapq.heappush(queue, ((given[name] + 1) * price[name], place, name))
    return given
