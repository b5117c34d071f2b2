"""The trial: do placements of equal size differ once they are trained?

Every arm adapts other modules with as many parameters (`full` trains all weights, and is reported as unmatched). Each arm
has its own sweep of learning rates at the first seed. The rate with the lowest validation loss is chosen, and the other
seeds are trained at that rate. The model sees the test rows when all training is over, once for each seed of each arm and
once for the base; paired.py says how differences are tested. Forgetting is the rise of the loss on general text, which has
nothing to do with the task.

    OUT/trial/ARM/lr-LR-seed-SEED/{metrics.jsonl, checkpoints/ while running, adapter/, result.json, test.json}
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.rows import DEMO
from ..lora.injection import unload
from ..lora.placement import Placement, full_rank
from ..models.linears import number_of_weights
from ..models.loading import name_of
from ..placing.by_settings import placed, unscored
from ..placing.rules import EACH_LAYER_THIRD, EACH_TYPE, FULL, STRONGEST
from ..report import kinds
from ..report.tables import trial_table
from ..run.folder import CONFIG, EVA
from ..run.general import GeneralText, general_text, why_not_held_out
from ..run.run import Run
from ..run.stages import run_score
from ..scoring import eva
from ..scoring.report import NFNReport
from ..support import files, machine
from ..support.config import PlaceSettings
from ..support.errors import ConfigError, PlacementError, shown
from ..support.inputs import differences
from ..support.progress import Work
from .arm_names import rules_of_arms
from .arms import MADE_BY, Arm, Trained, Training, check_inputs, look, trainings
from .by_criterion import Criteria, criteria_for, type_scores, wanted_of
from .criteria import strongest
from .paired import accuracies, compare
from .sweep import rounded

FULL_LR = 0.1  # of an adapter's rate, where all weights learn (Schulman et al. 2025, "LoRA Without Regret")
MATCHED = 0.01  # relative; the widest gap between arms' parameters
MEASURED = ("accuracy", "loss", "general_loss")
GENERAL_TOKENS = 4096


@dataclass(frozen=True)
class Matched:
    """What is trained: the parameters of plop's placement, the arms with as many, the rules whose placement is another arm's
    (rule -> arm), and the criteria's scores of the module types."""

    budget: int
    arms: list[Arm]
    same: dict[str, str]
    criteria: dict[str, Any]


def run_trial(run: Run) -> str:
    """Trains and compares the arms of `run.config`, writes trial.json, and returns its table.

    With `run.resume`, finished trainings and evaluations are left out, and an interrupted training goes on from its
    checkpoint. Raises ConfigError for impossible arms, rates and seeds, for data without test rows of its own, and for
    arms that cannot be matched; TrainingError where an arm trains at none of its rates; and whatever its stages raise.
    """
    config, folder = run.config, run.folder / "trial"
    listed, lrs, seeds = listed_arms(config.arms), listed_rates(config.lrs), listed_seeds(config.seeds)
    if config.full:
        raise ConfigError(
            "full: a trial trains all weights in an arm of its own: --arms plop,all,full, and another --out"
        )
    if config.finalists == 1:
        raise ConfigError("finalists 1: expected two or more, as one placement has nothing to be compared with")
    if run.resume and run.at.is_done("trial"):
        run.say("trial: already done")
        return str(trial_table(kinds.read(run.file("trial"), MADE_BY)))
    run.ready("trial")
    if run.hashes("test"):  # else reading says which file is not there
        _check_test_rows(run)
    run.ready("trial", *DEMO, "unlabeled")
    _check_test_rows(run)
    general = general_text(run, GENERAL_TOKENS)
    if why := why_not_held_out(run, general):
        raise ConfigError(why)
    report = NFNReport.load(run.file("score")) if run.file("score").exists() else None
    names = rules_of_arms(listed, report or unscored(run.shapes()))
    matched = None
    if report:
        _check_scored_alike(run, report)
        if not wanted_of(names.values()):  # criteria are kept in the folder, which is the stage's
            matched = _matched(run, report, names, lrs, folder)
            _vectors(run, matched.arms)
    with run.stage("trial"):
        matched = matched or _matched(run, report or run_score(run), names, lrs, folder)
        value = _trial(run, matched, general, lrs, seeds, folder)
        files.write_json(run.file("trial"), value)
    return str(trial_table(value))


def _trial(
    run: Run,
    matched: Matched,
    general: GeneralText,
    lrs: list[float],
    seeds: list[int],
    folder: Path,
) -> dict[str, Any]:
    """Trains and tests every arm in `folder`, and returns what trial.json holds."""
    arms, vectors = matched.arms, _vectors(run, matched.arms)
    check_inputs(run, arms, general, folder)
    finalists = run.config.finalists or len(arms)
    with Work("trainings", trainings(len(arms), len(lrs), len(seeds), finalists), run.progress) as work:
        trained = Training(run, seeds, finalists, vectors, work).all(arms, folder)
    # the one look at the test rows, now that all training is over
    with Work("tests", 1 + sum(len(one.folders) for one in trained), run.progress) as work:
        base = look(run, None, folder / "base", general.rows, work)
        tests = [[look(run, one.arm, path, general.rows, work) for path in one.folders] for one in trained]
    unload(run.model)
    kept = files.read_json(run.folder / CONFIG, MADE_BY)
    return {
        "plopfast": "trial", "model": run.model.name_or_path, "command": machine.command(),
        **{key: kept[key] for key in ("machine", "versions", "data")}, "budget": matched.budget, "reference": arms[0].name,
        "seeds": seeds, "lrs": lrs, "general": general.facts, "criteria": matched.criteria, "same": matched.same,
        **_compared(run, trained, base, tests, len(seeds)),
    }  # fmt: skip


def _compared(
    run: Run, trained: list[Trained], base: dict[str, Any], tests: list[list[dict[str, Any]]], seeds: int
) -> dict[str, Any]:
    """What trial.json holds of the results: `base` and `tests` are what `look` returned of the base and each arm's seeds.

    Arms that did not get all `seeds` are apart, in "dropped", and not compared: what they lack is not theirs by chance.
    """
    confidence, seed = run.config.confidence or 0.95, run.config.seed
    right = torch.tensor([[test["right"] for test in of] for of in tests if len(of) == seeds], dtype=torch.float64)
    described = [_described(run, one, of, base) for one, of in zip(trained, tests, strict=True)]
    arms = [arm for arm in described if len(arm["runs"]) == seeds]
    versus = [None, *map(dataclasses.asdict, compare(right, confidence, seed))]
    for arm, against, (mean, low, high) in zip(arms, versus, accuracies(right, confidence, seed), strict=True):
        arm |= {"accuracy": mean, "accuracy_low": low, "accuracy_high": high, "versus": against}
    seconds = sum(arm["seconds"] for arm in described) + sum(test["seconds"] for of in [[base], *tests] for test in of)
    return {
        "metric": base["metric"], "test_rows": right.shape[2],
        "test": f"paired bootstrap over rows, Student's t over seeds, Holm over {len(arms) - 1} comparisons",
        "confidence": confidence, "base": {key: base[key] for key in MEASURED}, "seconds": round(seconds, 1),
        "arms": arms, "dropped": [arm for arm in described if len(arm["runs"]) < seeds],
    }  # fmt: skip


def _check_test_rows(run: Run) -> None:
    """Raises ConfigError unless the test rows are held out. A copy of another file is not."""
    hashes = {split: {one["sha256"] for one in run.hashes(split)} for split in DEMO}
    if not hashes["test"] or hashes["test"] & (hashes["train"] | hashes["valid"]):
        raise ConfigError("a trial trains and chooses on the other rows: give --test FILE rows of its own")


def _check_scored_alike(run: Run, report: NFNReport) -> None:
    """Raises ConfigError where the folder's scores were made of another model, of other tokens or in another way."""
    plain = {"score_tokens": "all", "skip_first": False, "baseline": "closed-form", "compat": None}
    kept = {name: report.settings.get(name.removeprefix("score_"), usual) for name, usual in plain.items()}
    asked = {name: getattr(run.config, name) for name in plain}
    if changed := differences(kept | {"model": report.model}, asked | {"model": name_of(run.config.model)}):
        raise ConfigError(
            f"{run.file('score')} was made with other settings: {'; '.join(changed)}. Give the ones that were, or choose "
            "another --out"
        )


def _described(run: Run, trained: Trained, tests: list[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """An arm in trial.json, without what depends on the other arms."""
    placement, results = trained.arm.placement, [*trained.results, *trained.others]
    ranks = [rank for rank, _ in placement.modules.values()] if placement else []
    runs = [r | {key: t[key] for key in MEASURED} for r, t in zip(trained.results, tests, strict=True)]
    mean = {key: math.fsum(r[key] for r in runs) / len(runs) for key in MEASURED}
    return {
        "name": trained.arm.name, "types": placement.types if placement else [],
        "parameters": placement.parameters if placement else number_of_weights(run.model),
        "rank_low": min(ranks, default=None), "rank_high": max(ranks, default=None), "lr": trained.lr,
        "sweep": {f"{lr:g}": loss for lr, loss in trained.losses.items()}, "runs": runs, **mean,
        "forgetting": mean["general_loss"] - base["general_loss"],
        "seconds": round(sum(r["seconds"] for r in results), 2), "peak_mib": max(r["peak_mib"] for r in results),
    }  # fmt: skip


def listed_arms(text: str) -> list[str]:
    """The names in `--arms`, see arm_names.py. Raises ConfigError for doubles and fewer than two arms."""
    names = _listed("arms", text)
    if len(names) < 2 and names[0] not in (EACH_TYPE, EACH_LAYER_THIRD):
        raise ConfigError(f"arms: expected two or more to compare, got {text!r}")
    return names


def listed_rates(text: str) -> list[float]:
    """The learning rates in `--lrs`. Raises ConfigError unless all are numbers above 0 and different."""
    return _numbers("lrs", text, rounded, lambda lr: 0 < lr < math.inf, "numbers above 0 such as 5e-4,1e-3")


def listed_seeds(text: str) -> list[int]:
    """The seeds in `--seeds`. Raises ConfigError unless there are three or more whole numbers from 0, all different."""
    seeds = _numbers("seeds", text, int, lambda seed: 0 <= seed < 2**63, "whole numbers from 0 such as 0,1,2")
    if len(seeds) < 3:
        raise ConfigError(
            f"seeds: fewer than three cannot show how much seeds differ, got {text!r}; give 0,1,2 or more"
        )
    return seeds


def _numbers(option: str, text: str, kind: Callable, fits: Callable[[Any], bool], expected: str) -> list[Any]:
    values: list[Any] = []
    for part in _listed(option, text):
        try:
            value = kind(part)
        except ValueError:
            value = None
        if value is None or not fits(value) or value in values:
            twice = " twice" if value in values else ""
            raise ConfigError(f"{option}: expected {expected}, got {shown(part)}{twice}")
        values.append(value)
    return values


def _listed(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    for number, part in enumerate(parts):
        if not part or part in parts[:number]:
            got = f"{part!r} {'twice ' if part else ''}in {text!r}"
            raise ConfigError(f"{option}: expected names or numbers with commas, got {got}")
    return parts


def _matched(run: Run, report: NFNReport, names: dict[str, str], lrs: list[float], folder: Path) -> Matched:
    """Places every arm with as many parameters as plop takes of `--budget` or at `--rank`.

    Equal placements are one arm. Raises ConfigError naming an arm whose parameters are not within 1 % of that.
    """
    settings = dataclasses.replace(run.config.placing, rule="plop")
    budget = placed(report, settings).parameters
    settings = dataclasses.replace(settings, budget=str(budget))
    criteria = criteria_for(run, report, names.values(), folder)
    arms: list[Arm] = []
    same: dict[str, str] = {}
    for name, rule in names.items():
        if name == FULL:
            arms.append(Arm(name, None, [rounded(lr * FULL_LR) for lr in lrs]))
            run.say(f"{name}: all weights, not matched; learning rates are {FULL_LR:g} of the adapters'")
            continue
        if rule == STRONGEST:
            placement = _strongest(run, report, settings, budget, criteria)
        else:
            placement = _matched_one(report, name, dataclasses.replace(settings, rule=rule), budget, criteria)
        if twin := next((a.name for a in arms if a.placement and a.placement.modules == placement.modules), None):
            same[name] = twin
            run.say(f"{name} is the same placement as {twin}, which is trained once")
            continue
        arms.append(Arm(name, placement, lrs))
        run.say(f"{name}: {placement}")
    if len(arms) < 2:
        raise ConfigError(f"arms: all of them are one placement, {arms[0].name}: name others to compare")
    return Matched(budget, arms, same, type_scores(report, criteria))


def _strongest(run: Run, report: NFNReport, settings: PlaceSettings, budget: int, criteria: Criteria) -> Placement:
    """The one module at the budget, or at full rank where that is less: a placement is none the worse for being small."""
    module = strongest(report, criteria["gradient-energy"])
    rank = full_rank(report.scores[module].n_in, report.scores[module].n_out)
    most = placed(report, dataclasses.replace(settings, rule=module, budget="", rank=rank))
    if most.parameters > budget:
        return _matched_one(report, STRONGEST, dataclasses.replace(settings, rule=module), budget, criteria)
    run.say(f"{STRONGEST}: {module} at full rank, {most.parameters:,} parameters, fewer than the other arms have")
    return most


def _matched_one(report: NFNReport, name: str, settings: PlaceSettings, budget: int, criteria: Criteria) -> Placement:
    remedy = "choose another --budget or --rank, or leave the arm out of --arms"
    try:
        placement = placed(report, settings, criteria)
    except PlacementError as error:
        raise ConfigError(f"arm {name!r} cannot be matched to {budget:,} parameters: {error}; {remedy}") from error
    if not abs(placement.parameters / budget - 1) <= MATCHED:
        raise ConfigError(
            f"arm {name!r} cannot be matched: {placement.parameters:,} parameters are "
            f"{placement.parameters / budget - 1:+.1%} off {budget:,}, more than {MATCHED:.0%}; {remedy}"
        )
    return placement


def _vectors(run: Run, arms: list[Arm]) -> dict[str, torch.Tensor] | None:
    """EVA's vectors, if the adapters begin with them. Raises ConfigError where they are too few for an arm."""
    if run.config.init != "eva":
        return None
    vectors = eva.load(run.folder / EVA)[0]
    wanted = [(arm.name, *item) for arm in arms if arm.placement for item in arm.placement.modules.items()]
    for arm, module, (rank, _) in wanted:
        if len(vectors.get(module, ())) < rank:
            most = max(rank for _, _, (rank, _) in wanted)
            raise ConfigError(
                f"arm {arm!r}: {module} has rank {rank}, for which {EVA} holds too few vectors; first: plopfast score "
                f"--init eva --rank {most} --overwrite --out {run.folder}"
            )
    return vectors
