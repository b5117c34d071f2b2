"""Settings applied: the one call of `score`, of `place`, of `inject` and of `Trainer`, whoever asks (run, trial, search)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.batches import batches_of
from ..data.example import Example
from ..lora.layer import inject, unload
from ..lora.placement import Placement
from ..models.experts import weights_of
from ..models.streaming import plain_copy
from ..placing.place import place
from ..placing.rules import RULES, nfn_rule, rule_of
from ..scoring.nfn import score
from ..scoring.report import ModuleScore, NFNReport
from ..support.config import PlaceSettings, RunConfig, ScoreSettings
from ..support.errors import ConfigError
from ..training.trainer import Trainer
from .run import SCORE_ROWS, Run


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


def placed(report: NFNReport, settings: PlaceSettings) -> Placement:
    """Places adapters by scores: the settings' rule (or types and names with commas) under their budget or rank.

    Raises PlacementError where that is impossible.
    """
    return place(
        report, rule_of(settings.rule), k=settings.k, rank=settings.rank, alpha=settings.alpha, seed=settings.seed,
        budget=settings.budget or None, ranks=settings.ranks, granularity=settings.granularity, cap=settings.cap or None,
    )  # fmt: skip


def unscored(model: Any) -> NFNReport:
    """A report in which all modules are alike, for rules that need no scores."""
    scores = {
        i.name: ModuleScore(1.0, 0.0, 1, i.type, i.layer, i.n_in, i.n_out, getattr(i, "experts", 1))
        for i in weights_of(model)
    }
    return NFNReport(scores, 0, 0, 0.0)


def check_rule(run: Run) -> None:
    """Raises PlacementError for a rule that no scores could place, so that a run stops before it scores.

    A rule that chooses k types by the scores can fail only on k, which scoring checks itself. No model is loaded for it.
    """
    settings = run.config.placing
    rule = RULES.get(settings.rule)
    if not (rule and rule.needs_k and rule.from_report):
        placed(unscored(run.model), settings)


def trainer_for(
    run: Run, placement: Placement | None, vectors: dict[str, torch.Tensor] | None, *, config: RunConfig | None = None,
    out: Path | None = None, copied: bool = False, on_valid: Callable[[int, float], None] | None = None,
) -> Trainer:  # fmt: skip
    """Makes the trainer of a run's model and rows: of adapters on the placement, or of all weights where it is None.

    `vectors` are EVA's, None for another init. `config`: instead of the run's own. `copied`: all weights are trained in a
    float32 copy of the model, which stays as it is. `out` and `on_valid` as for `Trainer`.
    """
    config, model = config or run.config, run.model
    train, valid, unlabeled = (run.examples(split) for split in ("train", "valid", "unlabeled"))
    unload(model)
    if placement is None and hasattr(model, "computes_on"):
        raise ConfigError(
            "--embedding cpu keeps a frozen embedding in CPU memory, and here all weights are trained: leave one of them out"
        )
    if placement is None:
        model = (plain_copy(model).float() if copied else model).requires_grad_(True)
    else:
        inject(
            model, placement, dropout=config.dropout, rslora=config.rslora, dora=config.dora, backend=config.backend,
            seed=config.seed, init=config.init, eva=vectors,
        )  # fmt: skip
    return Trainer(
        model, config.training, train, valid, unlabeled=unlabeled, out=out, progress=run.progress, on_valid=on_valid
    )
