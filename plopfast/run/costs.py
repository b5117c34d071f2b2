"""What a training step would cost on this and other placements, asked between placing and training: estimate.json."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..lora.injection import unload
from ..lora.placement import Placement
from ..models.loading import shapes_source
from ..models.running import device_of
from ..placing.by_settings import placed, unscored
from ..placing.rules import FULL, RULES
from ..report.tables import estimate_table
from ..scoring.report import NFNReport
from ..support import files, ranks
from ..support.config import RunConfig
from ..support.devices import device_for, dtype_for
from ..support.errors import ConfigError, ModelError, PlacementError
from ..training.estimate import as_rows, estimate
from ..training.plan import Plan
from .fit import Fitted, fit, limit_of
from .run import Run
from .shapes import Shapes, largest

OTHERS = tuple(name for name, rule in RULES.items() if not rule.needs_k)  # what an estimate compares with


@dataclass(frozen=True)
class StepShape:
    """A micro-batch of the longest rows: `rows` of `row_tokens` tokens each, the last `label_tokens` of which are learned."""

    batch_tokens: int
    rows: int
    row_tokens: int
    label_tokens: int


def run_estimate(run: Run, rules: Sequence[str] = OTHERS) -> str:
    """Estimates a step on the run's placement, on those of other `rules` and with all weights: estimate.json. Returns its table."""
    config = run.config
    ranks.on_main(lambda: run.at.look("estimate"))
    own, report = Placement.load(run.file("place")), NFNReport.load(run.file("score"))
    if config.parallel == "fsdp" and ranks.size() > 1:
        raise ConfigError("estimate: weights spread over several processes are not modelled; estimate without fsdp")
    run.ready("estimate", "train", "unlabeled")
    with run.stage("estimate"):
        unload(run.model)
        choices, shape = _choices(run, own, report, rules), _shape(run)
        found = estimate(
            run.model, choices, config.training, rows=shape.rows, row_tokens=shape.row_tokens,
            label_tokens=shape.label_tokens, progress=run.progress,
        )  # fmt: skip
        value = {
            "plopfast": "estimate", "model": run.model.name_or_path, **dataclasses.asdict(shape),
            "accumulate": config.accumulate, "device": str(device_of(run.model)),
            "dtype": str(run.model.dtype).removeprefix("torch."), "choices": as_rows(found),
        }  # fmt: skip
        ranks.on_main(lambda: files.write_json(run.file("estimate"), value))
    chosen = fitted(run, own).lines if config.fit else []
    return "\n".join([str(estimate_table(value)), *chosen])


def fit_run(run: Run, placement: Placement | None = None) -> None:
    """With --fit: gives the run the options with which a step fits, before its model is loaded, and says what was chosen.

    `placement` is the run's own, if it has one; else the largest that it may choose counts. A resumed run keeps what it has.
    """
    if run.config.fit is None or run.is_loaded:  # then the run has chosen
        return
    if run.resume:
        run.say(f"fit {run.config.fit}: a resumed run keeps the options that it began with")
        return
    found = fitted(run, placement)
    run.config = found.config
    for line in found.lines:
        run.say(line)


def fitted(run: Run, placement: Placement | None) -> Fitted:
    """What `fit` chooses for a run's model, rows and placement."""
    config = run.config
    assert config.fit is not None
    limit_of(config.fit)  # before the rows are read
    shape = _shape(run)
    device = device_for(config.device)

    def place(model: Any, settings: RunConfig) -> Placement | None:
        if settings.full:
            return None
        if placement is None:
            return largest(unscored(model), settings)
        present = {name for name, _ in model.named_modules()}  # fewer, where few layers stand for the model
        return dataclasses.replace(placement, modules={n: at for n, at in placement.modules.items() if n in present})

    shapes = Shapes(
        shapes_source(config.model), shape.rows, shape.row_tokens, shape.label_tokens,
        device if device.type == "cpu" else torch.device("meta"), dtype_for(config.dtype, device, config.full), place,
    )  # fmt: skip
    return fit(shapes, config, config.fit)


def try_estimate(run: Run) -> None:
    """Estimates the run's placement and all weights (other rules' take 2 s each); where that is not possible, the run says why and
    goes on, as nothing else needs the estimate."""
    try:
        run.say(run_estimate(run, ()))
        run.say(f"more placements: plopfast estimate --overwrite --out {run.folder}")
    except (ConfigError, ModelError) as error:
        run.say(str(error))


def _choices(run: Run, own: Placement, report: NFNReport, rules: Sequence[str]) -> dict[str, Placement | None]:
    """The run's own placement, those of `rules` under the same rank or budget, and None for all weights."""
    settings = dataclasses.replace(run.config.placing, granularity="type", cap=None)
    choices: dict[str, Placement | None] = {own.rule: own}
    for rule in rules:
        try:
            choices.setdefault(rule, placed(report, dataclasses.replace(settings, rule=rule)))
        except PlacementError as error:
            run.say(f"no estimate for {rule}: {error}")
    return choices | {FULL: None}


def _shape(run: Run) -> StepShape:
    train, unlabeled = run.examples("train"), run.examples("unlabeled")
    plan = Plan(train, unlabeled, run.config.training)
    total, longest = sum(len(e.tokens) for e in plan.rows), max(len(e.tokens) for e in plan.rows)
    most = plan.batch_rows or plan.batch_tokens  # a row has a token at least
    rows, tokens = min(most, plan.batch_tokens // longest), longest
    if run.config.packing:
        rows, tokens = 1, min(plan.batch_tokens, most * longest)
    labels = min(tokens - 1, max(1, round(tokens * sum(e.label_tokens for e in plan.rows) / total)))
    return StepShape(plan.batch_tokens, rows, tokens, labels)
