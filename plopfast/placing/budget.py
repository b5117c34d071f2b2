"""How many parameters a budget allows, and the ranks it gives to modules."""

import heapq

from ..scoring.report import ModuleScore
from ..support.errors import PlacementError

PARAMETER_BYTES = 4  # adapters are float32


def _shared_out(budget: int, modules: dict[str, ModuleScore], proportional: bool) -> dict[str, int]:
    """The ranks that a budget of parameters gives to modules, one at least to each."""
    least = sum(map(_size, modules.values()))
    most = sum(_full_rank(score) * _size(score) for score in modules.values())
    if budget < least:
        raise PlacementError(
            f"budget {budget:,} parameters: below the smallest adapter on these {len(modules)} modules, which takes {least:,} "
            "at rank 1: raise it, or choose fewer modules"
        )
    if budget > most:
        raise PlacementError(
            f"budget {budget:,} parameters: above the {most:,} that full ranks of these {len(modules)} modules take: "
            "lower it, or choose more modules"
        )
    order = sorted(modules, key=lambda name: modules[name].nfn)
    price = {name: modules[name].nfn if proportional else 1.0 for name in order}  # 1 / weight, which NFN 0 has not
    given = dict.fromkeys(modules, 1)
    left = budget - least
    queue = [(2 * price[name], place, name) for place, name in enumerate(order)]
    heapq.heapify(queue)
    while queue:
        _, place, name = heapq.heappop(queue)
        size, full = _size(modules[name]), _full_rank(modules[name])
        if size <= left and given[name] < full:  # else never again: left only falls
            given[name] += 1
            left -= size
            heapq.heappush(queue, ((given[name] + 1) * price[name], place, name))
    return given


def _size(score: ModuleScore) -> int:
    """Parameters of one rank."""
    return score.n_in + score.n_out


def _full_rank(score: ModuleScore) -> int:
    return min(score.n_in, score.n_out)
