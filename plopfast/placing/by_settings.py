"""Settings applied: the one call of `score` and the one of `place`, whoever asks (run, trial, search, suggest)."""

from collections.abc import Callable, Sequence
from typing import Any

from ..data.batches import batches_of
from ..data.example import Example
from ..lora.placement import Placement
from ..models.experts import weights_of
from ..scoring.nfn import score
from ..scoring.report import ModuleScore, NFNReport
from ..support.config import PlaceSettings, ScoreSettings
from .choose import Criteria
from .place import place
from .rules import RULES, nfn_rule, rule_of

SCORE_ROWS = 8  # rows in a batch as it is handed to score(), which batches anew


def why_every_row(settings: ScoreSettings) -> str:
    """Says why scoring cannot stop early, or nothing where it can."""
    if settings.init == "eva":
        return "EVA's vectors need them"
    return "the authors' procedure keeps no statistics of single prompts" if settings.compat else ""


def scored(model: Any, examples: Sequence[Example], settings: ScoreSettings, progress: bool = False) -> NFNReport:
    """Scores `examples`, which come in random order, until the types that the settings choose are sure.

    Every row is scored with confidence 0 and where `why_every_row` has a reason. Raises what `score` raises.
    """
    k, rule, by_nfn = settings.k, RULES.get(settings.rule), nfn_rule(settings.rule)
    if not (rule and rule.needs_k):  # then k is not checked against the number of types
        k = min(k, len({info.type for info in weights_of(model)}))
    early = settings.confidence and not why_every_row(settings)
    batches = batches_of(examples, SCORE_ROWS, tokens=settings.score_tokens, skip_first=settings.skip_first)
    report = score(
        model, batches, baseline=settings.baseline, compat=settings.compat, backend=settings.backend, seed=settings.seed,
        confidence=settings.confidence if early else None, k=k, inverse=bool(by_nfn and by_nfn.highest),
        eva_rank=settings.rank if settings.init == "eva" else None, progress=progress,
    )  # fmt: skip
    report.settings |= {"tokens": settings.score_tokens, "skip_first": settings.skip_first}
    return report


def placed(report: NFNReport, settings: PlaceSettings, criteria: Criteria | None = None) -> Placement:
    """Places adapters by scores: the settings' rule (or types and names with commas) under their budget or rank.

    Raises PlacementError where that is impossible.
    """
    return place(
        report, rule_of(settings.rule), k=settings.k, rank=settings.rank, alpha=settings.alpha, seed=settings.seed,
        budget=settings.budget or None, ranks=settings.ranks, granularity=settings.granularity, cap=settings.cap or None,
        criteria=criteria,
    )  # fmt: skip


def unscored(model: Any) -> NFNReport:
    """A report in which all modules are alike, for rules that need no scores."""
    scores = {
        i.name: ModuleScore(1.0, 0.0, 1, i.type, i.layer, i.n_in, i.n_out, getattr(i, "experts", 1))
        for i in weights_of(model)
    }
    return NFNReport(scores, 0, 0, 0.0)


def check_rule(settings: PlaceSettings, model: Callable[[], Any]) -> None:
    """Raises PlacementError for a rule that no scores of `model()` could place, so that nobody scores for it in vain.

    A rule that chooses k types by the scores can fail only on k, which scoring checks itself. It asks for no model.
    """
    rule = RULES.get(settings.rule)
    if not (rule and rule.needs_k and rule.from_report):
        placed(unscored(model()), settings)
