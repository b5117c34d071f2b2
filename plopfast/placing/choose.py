"""Which modules a rule chooses: whole types, modules named one by one, or single modules of lowest NFN."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..lora.placement import full_rank
from ..scoring.report import ModuleScore, NFNReport
from ..support.errors import PlacementError, nearest
from .budget import parameters_at
from .rules import RULES, Rule, nfn_rule, ranked

Criteria = Mapping[str, Mapping[str, float]]  # rule -> module -> score


@dataclass(frozen=True)
class Choice:
    """The chosen types, their modules in the model's order, and `margin` and `notes` as in Placement."""

    types: list[str]
    modules: list[str]
    margin: float | None = None
    notes: list[str] = field(default_factory=list)


def in_layers(report: NFNReport) -> dict[str, ModuleScore]:
    """Returns the scored modules that can be chosen: all but the output head."""
    return {name: score for name, score in report.scores.items() if score.layer is not None}


def by_type(report: NFNReport, rule: str | Sequence[str], k: int, seed: int, criteria: Criteria) -> Choice:
    """Chooses by a rule of the table, or the types and modules that are named."""
    if not isinstance(rule, str):
        return _named(report, rule)
    if rule not in RULES:
        raise PlacementError(f"rule {rule!r}: expected {', '.join(RULES)} or a list of types{nearest(rule, [*RULES])}")
    entry, types = RULES[rule], list(report.types)
    if entry.needs_k and not 1 <= k <= len(types):
        raise PlacementError(f"k = {k}: expected 1 to {len(types)}, this model's module types ({', '.join(types)})")
    margin, notes = None, []
    if entry.by_nfn:
        order = ranked(report.types, entry.highest)
        chosen = order[:k]
        margin = abs(report.types[order[k]] - report.types[order[k - 1]]) if k < len(order) else None
        confidence = report.settings.get("confidence") or 0.95
        if decision := report.decide(k, confidence, inverse=entry.highest):
            notes.append(decision.note)
    elif entry.ranks_by:
        chosen = ranked(_type_scores(report, entry, criteria), entry.highest)[:k]
    else:
        assert entry.pick, "a rule ranks, or picks by a function"
        chosen = entry.pick(report, k, seed)
    if not chosen:
        absent = "".join(f" ({note})" for note in report.notes)
        raise PlacementError(f"rule {rule!r} knows none of the types {', '.join(types)}{absent}: name them instead")
    return Choice(chosen, [name for name, score in in_layers(report).items() if score.type in chosen], margin, notes)


def _type_scores(report: NFNReport, rule: Rule, criteria: Criteria) -> dict[str, float]:
    """Type -> mean of the scores that `place` was given for this rule."""
    scored = in_layers(report)
    if rule.name not in criteria:
        raise PlacementError(
            f"rule {rule.name!r} ranks by {rule.ranks_by}, which the NFN report does not hold ({rule.needs}): pass "
            f"place(..., criteria={{{rule.name!r}: scores}}), the scores from plopfast.studies.criteria. On the command "
            "line, plopfast audit shows the types it would choose"
        )
    given = criteria[rule.name]
    if absent := [name for name in scored if name not in given]:
        raise PlacementError(
            f"criteria[{rule.name!r}]: expected a score for each of {len(scored)} modules, got none for {absent[0]!r}; "
            "were they taken from another model?"
        )
    by_module = {name: given[name] for name in scored}
    return rule.type_scores(by_module, {name: score.type for name, score in scored.items()}, report.types)


def _named(report: NFNReport, names: Sequence[str]) -> Choice:
    scored = in_layers(report)
    known = [*report.types, *scored]
    for name in names:
        if name not in known:
            raise PlacementError(f"{name!r} is neither a module type nor a module of this model{nearest(name, known)}")
    if not names:
        raise PlacementError(f"no module named; expected some of the types {', '.join(report.types)}")
    modules = [name for name, score in scored.items() if score.type in names or name in names]
    return Choice(_types_of(report, modules), modules)


def by_module(report: NFNReport, rule: str | Sequence[str], rank: int, budget: int | None, cap: int | None) -> Choice:
    """Chooses the modules of lowest (or highest) NFN that the budget pays for at `rank`, at most `cap` of a type."""
    entry, scored = nfn_rule(rule) if isinstance(rule, str) else None, in_layers(report)
    if budget is None or entry is None:
        known = " or ".join(name for name in RULES if nfn_rule(name))
        raise PlacementError(f"granularity 'module' needs a budget, and the rule {known}")
    if rank < 1 or (cap is not None and cap < 1):
        raise PlacementError(f"rank {rank}, cap {cap}: expected 1 or more")
    cost = {name: parameters_at(min(rank, full_rank(s.n_in, s.n_out)), s) for name, s in scored.items()}
    order = ranked({name: score.nfn for name, score in scored.items()}, entry.highest)
    taken: list[str] = []
    left = budget
    for name in order:
        if cap is not None and sum(scored[other].type == scored[name].type for other in taken) >= cap:
            continue
        left -= cost[name]
        if left < 0:
            break
        taken.append(name)
    if not taken:
        raise PlacementError(
            f"budget {budget:,} parameters: below the smallest adapter, the first module {order[0]} at rank {rank}, which "
            f"takes {cost[order[0]]:,}: raise it, or lower the rank"
        )
    modules = [name for name in scored if name in taken]
    note = "chosen module by module, which is experimental: the paper chooses types"
    return Choice(_types_of(report, modules), modules, notes=[note])


def _types_of(report: NFNReport, modules: Sequence[str]) -> list[str]:
    """The modules' types, lowest NFN first."""
    kinds = {report.scores[name].type for name in modules}
    return [type_ for type_ in report.types if type_ in kinds]
