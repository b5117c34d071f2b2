"""Where the adapters go: a rule applied to NFN scores gives modules with their rank and alpha.

PLoP (arXiv 2506.20629) adapts the k module types with the lowest mean NFN; the other rules are the baselines that its
comparisons use.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from ..lora.placement import Placement
from ..scoring.report import ModuleScore, NFNReport
from ..support.errors import PlacementError
from .budget import PARAMETER_BYTES, _full_rank, _shared_out, _size
from .rules import BY_NFN, _by_type


def place(
    report: NFNReport,
    rule: str | Sequence[str] = "plop",
    *,
    k: int = 3,
    rank: int = 16,
    alpha: float = 32,
    seed: int = 0,
    budget: int | str | None = None,
    ranks: str = "equal",
    granularity: str = "type",
    cap: int | None = None,
) -> Placement:
    """The modules that `rule` picks from the scored ones, each with its rank, and all with the same alpha.

    Rules: "plop" (the k types of lowest NFN), "plop-inverse" (highest), "attn" (query, key, value), "mlp", "all",
    "random" (k types, seeded), or a list of module types and module names. Parameters are rank * (n_in + n_out), summed.

    `budget` sets the ranks instead of `rank`: parameters (an int, or "2.5M"), bytes of the float32 tensors ("10MB", "8MiB";
    an adapter file's header comes on top, some 100 bytes a tensor), or "match:all:r8", the parameters of another rule at a
    rank. It is never exceeded, and what it leaves is less than one rank of any chosen module that could take one more.
    `ranks` shares it out, one rank at a time to the module with the most weight for each rank it would then have
    (D'Hondt's apportionment): "equal" weights, so that ranks differ by one at most but for modules that are full or too
    large for the rest, or "proportional" to 1 / NFN.

    `granularity` "module" (experimental; the paper chooses types) takes the modules of lowest NFN one by one at `rank`
    while the budget lasts, at most `cap` of a type, and shares out the rest; `k` is not used then.

    Where a budget moves the rank, alpha and the learning rate stay as they are. For a random A, B = 0 and Adam, the best
    learning rate goes with 1 / sqrt(scaling * rank) (Chen, Villar and Hayou, arXiv 2602.06204, for large widths): it does not
    depend on the rank with the scaling alpha / rank, which Schulman et al. 2025 ("LoRA Without Regret") measured to be so
    within a factor of 2 from rank 4 to 512, and falls with its fourth root with rsLoRA's alpha / sqrt(rank). `notes` says
    so where ranks move.

    Raises PlacementError for unknown rules and names (with the nearest), an impossible k, a rank that does not fit, and a
    budget that cannot be read, is below the smallest adapter or above the largest.
    """
    scored = {name: score for name, score in report.scores.items() if score.layer is not None}
    if ranks not in ("equal", "proportional"):
        raise PlacementError(f"ranks {ranks!r}: expected equal or proportional")
    if granularity not in ("type", "module"):
        raise PlacementError(f"granularity {granularity!r}: expected type or module")
    if granularity == "type" and cap is not None:
        raise PlacementError(f"cap {cap}: limits the modules of a type, which needs granularity 'module'")
    allowed = None if budget is None else _parameters(report, budget, k, alpha, seed)
    if granularity == "type":
        chosen, modules, margin, notes = _by_type(report, scored, rule, k, seed)
    else:
        modules = _by_module(scored, rule, rank, allowed, cap)
        chosen = [type_ for type_ in report.types if any(scored[name].type == type_ for name in modules)]
        margin, notes = None, ["chosen module by module, which is experimental: the paper chooses types"]
    if allowed is None:
        for name in modules:
            n_in, n_out = scored[name].n_in, scored[name].n_out
            if not 1 <= rank <= min(n_in, n_out):
                raise PlacementError(
                    f"{name}: rank {rank} does not fit its {n_out} x {n_in} weight: 1 to {min(n_in, n_out)}"
                )
        given = dict.fromkeys(modules, rank)
    else:
        given = _shared_out(allowed, {name: scored[name] for name in modules}, ranks == "proportional")
        low, high = min(given.values()), max(given.values())
        if (low, high) != (rank, rank):
            span = f"rank {low}" if low == high else f"ranks {low} to {high}"
            notes.append(
                f"{span} instead of {rank}: keep alpha {alpha:g} and the learning rate, whose best value hardly depends on "
                "the rank where the scaling is alpha / rank (with --rslora it goes with rank^-1/4; arXiv 2602.06204)"
            )
    parameters = sum(r * _size(scored[name]) for name, r in given.items())
    if allowed is not None:
        notes.append(f"budget {allowed:,} parameters, {allowed - parameters:,} of them left")
    name_of_rule = rule if isinstance(rule, str) else "explicit"
    return Placement(
        {name: (r, alpha) for name, r in given.items()}, chosen, name_of_rule, parameters, margin, report.model, notes
    )


def _by_module(
    scored: dict[str, ModuleScore], rule: str | Sequence[str], rank: int, budget: int | None, cap: int | None
) -> list[str]:
    """The modules of lowest (or highest) NFN that the budget pays for at `rank`, in the model's order."""
    if budget is None or rule not in BY_NFN:
        raise PlacementError("granularity 'module' needs a budget, and the rule plop or plop-inverse")
    if rank < 1 or (cap is not None and cap < 1):
        raise PlacementError(f"rank {rank}, cap {cap}: expected 1 or more")
    order = sorted(scored, key=lambda name: scored[name].nfn, reverse=rule == "plop-inverse")
    taken: list[str] = []
    left = budget
    for name in order:
        if cap is not None and sum(scored[other].type == scored[name].type for other in taken) >= cap:
            continue
        left -= min(rank, _full_rank(scored[name])) * _size(scored[name])
        if left < 0:
            break
        taken.append(name)
    if not taken:
        cost = min(rank, _full_rank(scored[order[0]])) * _size(scored[order[0]])
        raise PlacementError(
            f"budget {budget:,} parameters: below the smallest adapter, the first module {order[0]} at rank {rank}, which "
            f"takes {cost:,}: raise it, or lower the rank"
        )
    return [name for name in scored if name in taken]


def _parameters(report: NFNReport, budget: int | str, k: int, alpha: float, seed: int) -> int:
    """The parameters that a budget allows."""
    if isinstance(budget, int) and not isinstance(budget, bool):
        return budget
    text = str(budget).strip()
    if match := re.fullmatch(r"match:(?P<rule>[^:]+):r(?P<rank>\d+)", text):
        return place(report, match["rule"], k=k, rank=int(match["rank"]), alpha=alpha, seed=seed).parameters
    if match := re.fullmatch(r"(?P<number>\d+(\.\d+)?) *(?P<unit>|[kKMG]|[kKMG]i?B|B)", text):
        base, power = 1024 if "i" in match["unit"] else 1000, "BKMG".index((match["unit"].upper() or "B")[0])
        allowed = Fraction(match["number"]) * base**power  # as 67.1 * 10**6 falls short of 67,100,000
        return int(allowed / (PARAMETER_BYTES if "B" in match["unit"] else 1))
    raise PlacementError(
        f"budget {budget!r}: expected parameters (2396160, 2.5M), bytes (10MB, 8MiB) or match:RULE:rRANK (match:all:r8)"
    )
