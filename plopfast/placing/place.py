"""Where the adapters go: a rule applied to NFN scores gives modules, each with its rank and alpha.

PLoP (arXiv 2506.20629) adapts the k module types of lowest mean NFN. The other rules are the baselines that it is compared
with, and other criteria; rules.py holds the table of them.
"""

from collections.abc import Sequence

from ..lora.placement import Placement, check_rank, full_rank
from ..scoring.report import ModuleScore, NFNReport
from ..support.errors import PlacementError
from .budget import allowed_parameters, parameters_at, share_out
from .choose import Criteria, by_module, by_type


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
    criteria: Criteria | None = None,
) -> Placement:
    """Returns the modules that `rule` chooses from the scored ones, each with its rank, and all with the same alpha.

    `rule`: a name in `rules.RULES` ("plop": the k types of lowest NFN), or a list of module types and module names.
    `criteria`: for a rule that ranks by other scores, {rule: {module: score}}, as from `studies.criteria`:
    `place(report, "gradient-energy", criteria={"gradient-energy": gradient_energy(model, examples)})`.

    `budget` sets the ranks instead of `rank`: parameters (an int, or "2.5M"), bytes of the float32 tensors ("10MB", "8MiB";
    a file's header adds some 100 bytes a tensor), or "match:all:r8", the parameters of another rule at a rank. It is never
    exceeded. What is left would not pay for one more rank of any chosen module that is below full rank. `ranks` shares the
    budget out (`budget.share_out`): "equal", where ranks differ by at most one unless a module is full or too large for
    the rest, or "proportional" to 1 / NFN.

    `granularity` "module" is experimental, as the paper chooses types. It takes the modules of lowest NFN one by one at
    `rank` while the budget lasts, at most `cap` of a type, and shares out the rest. `k` is not used then.

    Raises PlacementError for unknown rules and names (with the nearest), an impossible k, a rank that fits no chosen
    module (where it fits some, the others get full rank, and a note says so), scores that a rule lacks, and a budget that
    cannot be read, is below the smallest adapter or above the largest.

    >>> report = pf.score(model, batches)
    >>> pf.place(report, k=2, rank=8).types == list(report.types)[:2]  # the lowest NFN
    True
    >>> pf.place(report, ["q_proj", "v_proj"]).types
    ['q_proj', 'v_proj']
    """
    _check_options(ranks, granularity, cap)
    criteria = criteria or {}

    def match(other: str, rank: int) -> int:
        return place(report, other, k=k, rank=rank, alpha=alpha, seed=seed, criteria=criteria).parameters

    allowed = None if budget is None else allowed_parameters(budget, match)
    if granularity == "type":
        choice = by_type(report, rule, k, seed, criteria)
    else:
        choice = by_module(report, rule, rank, allowed, cap)
    modules = {name: report.scores[name] for name in choice.modules}
    given = _one_rank(modules, rank) if allowed is None else share_out(allowed, modules, ranks == "proportional")
    parameters = sum(parameters_at(r, modules[name]) for name, r in given.items())
    if allowed is None:
        notes = choice.notes + _capped_notes(given, modules, rank)
    else:
        notes = choice.notes + _budget_notes(given, rank, alpha, allowed, parameters)
    with_alpha = {name: (r, alpha) for name, r in given.items()}
    named = rule if isinstance(rule, str) else "explicit"
    shapes = {name: (score.n_out, score.n_in) for name, score in modules.items()}
    experts = {name: score.experts for name, score in modules.items() if score.experts > 1}
    return Placement(with_alpha, choice.types, named, parameters, choice.margin, report.model, notes, shapes, experts)


def _check_options(ranks: str, granularity: str, cap: int | None) -> None:
    if ranks not in ("equal", "proportional"):
        raise PlacementError(f"ranks {ranks!r}: expected equal or proportional")
    if granularity not in ("type", "module"):
        raise PlacementError(f"granularity {granularity!r}: expected type or module")
    if granularity == "type" and cap is not None:
        raise PlacementError(f"cap {cap}: limits the modules of a type, which needs granularity 'module'")


def _one_rank(modules: dict[str, ModuleScore], rank: int) -> dict[str, int]:
    """The rank of each module: full rank where that is less. Raises PlacementError where the rank fits none of them."""
    full = {name: full_rank(score.n_in, score.n_out) for name, score in modules.items()}
    if full:
        name = max(full, key=lambda name: full[name])
        check_rank(rank, modules[name].n_in, modules[name].n_out, f"{name}: ")
    return {name: min(rank, full[name]) for name in modules}


def _capped_notes(given: dict[str, int], modules: dict[str, ModuleScore], rank: int) -> list[str]:
    """Which modules got full rank, as their weights take no higher one: gates with a single output, say."""
    capped: dict[tuple[str, int], int] = {}
    for name, r in given.items():
        if r < rank:
            capped[modules[name].type, r] = capped.get((modules[name].type, r), 0) + 1
    return [
        f"{type_}: rank {r} instead of {rank} in {count} modules, the smaller side of their weights"
        for (type_, r), count in capped.items()
    ]


def _budget_notes(given: dict[str, int], rank: int, alpha: float, allowed: int, parameters: int) -> list[str]:
    """What the budget did.

    Where it moves the rank, alpha and the learning rate stay. For a random A, B = 0 and Adam, the best learning rate goes
    with 1 / sqrt(scaling * rank) (Chen, Villar and Hayou, arXiv 2602.06204, for large widths). With the scaling
    alpha / rank it does not depend on the rank: Schulman et al. 2025 ("LoRA Without Regret") measured it to be the same
    within a factor of 2 from rank 4 to 512. With rsLoRA's alpha / sqrt(rank) it falls with the fourth root of the rank.
    """
    notes = []
    low, high = min(given.values()), max(given.values())
    if (low, high) != (rank, rank):
        span = f"rank {low}" if low == high else f"ranks {low} to {high}"
        notes.append(
            f"{span} instead of {rank}: keep alpha {alpha:g} and the learning rate, whose best value hardly depends on "
            "the rank where the scaling is alpha / rank (with --rslora it goes with rank^-1/4; arXiv 2602.06204)"
        )
    return [*notes, f"budget {allowed:,} parameters, {allowed - parameters:,} of them left"]
