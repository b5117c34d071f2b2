"""The trial: do placements of equal size differ once they are trained?

Every arm adapts other modules with as many parameters (`full` trains all weights, and is said to be unmatched). Each has
its own learning-rate sweep at the first seed, chosen by validation loss alone, and trains the other seeds at that rate.
The model sees the test rows when all training is over, once for each arm's seeds and the base; differences are tested as
paired.py says. Forgetting is the rise of the loss on general text that has nothing to do with the task.

    OUT/trial/ARM/lr-LR-seed-SEED/{metrics.jsonl, checkpoints/ while running, adapter/, result.json, test.json}
"""

import dataclasses
import math
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..data.rows import DEMO
from ..lora.layer import unload
from ..placing.place import place
from ..placing.rules import FULL, arm_names
from ..report.tables import trial_table
from ..run.folder import EVA, Run
from ..run.stages import run_score
from ..scoring import eva
from ..scoring.report import NFNReport
from ..support import files
from ..support.errors import ConfigError, FileError, PlacementError, nearest
from .arms import MADE_BY, Arm, Training, Work, check_inputs, general_text, look
from .paired import accuracies, compare

FULL_LR = 0.1  # of an adapter's rate, where all weights learn (Schulman et al. 2025, "LoRA Without Regret")
MATCHED = 0.01  # relative; the widest gap between arms' parameters
MEASURED = ("accuracy", "loss", "general_loss")


def run_trial(run: Run) -> str:
    """Trains and compares the arms of `run.config`, writes trial.json, and returns its table. With `run.resume`, finished
    trainings and evaluations are left out, and an interrupted training goes on from its checkpoint.

    Raises ConfigError for arms, rates and seeds that cannot be, data without test rows of its own, and arms that cannot be
    matched; TrainingError where an arm trains at none of its rates; and whatever the stages it consists of raise.
    """
    config, folder = run.config, run.folder / "trial"
    names, lrs, seeds = listed_arms(config.arms), listed_rates(config.lrs), listed_seeds(config.seeds)
    if config.full:
        raise ConfigError(
            "full: a trial trains all weights in an arm of its own: --arms plop,all,full, and another --out"
        )
    if run.resume and run.file("trial").exists():
        run.say("trial: already done")
        return str(trial_table(files.read_json(run.file("trial"), MADE_BY)))
    seen = {files.sha256(path) for split, path in run.paths.items() if split != "test"}  # a copy is no file of its own
    if run.rows("test") is run.rows("valid") or files.sha256(run.paths["test"]) in seen:
        raise ConfigError("a trial trains and chooses on the other rows: give --test FILE rows of its own")
    if folder.exists() and not (run.resume or run.overwrite or run.file("trial").exists()):
        raise FileError(f"{folder}: an unfinished trial; pass --resume to go on, or --overwrite to start anew")
    report = NFNReport.load(run.file("score")) if run.file("score").exists() else None
    if report:
        _check_scored_alike(run, report)
    run.begin("trial")
    if run.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    for split in (*DEMO, "unlabeled"):  # a row that cannot be used should stop the trial now, not after the training
        run.examples(split)
    report = report or run_score(run)
    budget, arms = matched(run, report, names, lrs)
    vectors = _vectors(run, arms)
    general, told = general_text(run, folder)
    check_inputs(run, arms, told, folder)

    work = Work(run, "training", len(arms) * (len(lrs) + len(seeds) - 1))
    training = Training(run, seeds, vectors, work)
    trained = [training.arm(arm, folder / arm.name) for arm in arms]

    # all training is over: the one look at the test rows
    work = Work(run, "evaluation", 1 + len(arms) * len(seeds))
    base = look(run, None, folder / "base", general, work)
    tests = [
        [look(run, arm, path, general, work) for path in at] for arm, (_, at, _) in zip(arms, trained, strict=True)
    ]
    unload(run.model)
    right = torch.tensor([[test["right"] for test in of] for of in tests], dtype=torch.float64)
    confidence = config.confidence or 0.95
    described = [
        _described(run, arm, losses, results, of, base)
        for arm, (losses, _, results), of in zip(arms, trained, tests, strict=True)
    ]
    versus = [None, *map(dataclasses.asdict, compare(right, confidence, config.seed))]
    for arm, against, (mean, low, high) in zip(
        described, versus, accuracies(right, confidence, config.seed), strict=True
    ):
        arm |= {"accuracy": mean, "accuracy_low": low, "accuracy_high": high, "versus": against}
    kept = files.read_json(run.folder / "config.json", MADE_BY)
    seconds = sum(arm["seconds"] for arm in described) + sum(test["seconds"] for of in [[base], *tests] for test in of)
    value = {
        "plopfast": "trial", "model": run.model.name_or_path, "command": " ".join(["plopfast", *sys.argv[1:]]),
        **{key: kept[key] for key in ("machine", "versions", "data")}, "budget": budget, "reference": arms[0].name,
        "seeds": seeds, "lrs": lrs, "metric": base["metric"], "test_rows": right.shape[2],
        "test": f"paired bootstrap over rows, Student's t over seeds, Holm over {len(arms) - 1} comparisons",
        "confidence": confidence, "general": told, "base": {key: base[key] for key in MEASURED},
        "seconds": round(seconds, 1), "arms": described,
    }  # fmt: skip
    files.write_json(run.file("trial"), value)
    return str(trial_table(value))


def _check_scored_alike(run: Run, report: NFNReport) -> None:
    """Raises ConfigError where the folder's scores are of another model or other tokens, or made otherwise, than the
    settings say."""
    if report.model != run.model.name_or_path:
        raise ConfigError(
            f"{run.file('score')} holds the scores of {report.model}, the trial's model is {run.model.name_or_path}: choose "
            "another --out"
        )
    plain = {"score_tokens": "all", "skip_first": False, "baseline": "closed-form", "compat": None}
    for name, default in plain.items():
        kept, asked = report.settings.get(name.removeprefix("score_"), default), getattr(run.config, name)
        if kept != asked:
            raise ConfigError(
                f"{run.file('score')} was made with {name} {kept}, the trial's is {asked}: give that one, or choose another "
                "--out"
            )


def _described(
    run: Run, arm: Arm, losses: dict[float, float | None], results: list[dict[str, Any]], tests: list[dict], base: dict
) -> dict[str, Any]:
    """An arm in trial.json, but for what rests on the other arms."""
    ranks = [rank for rank, _ in arm.placement.modules.values()] if arm.placement else []
    runs = [r | {key: t[key] for key in MEASURED} for r, t in zip(results, tests, strict=False)]
    mean = {key: math.fsum(r[key] for r in runs) / len(runs) for key in MEASURED}
    return {
        "name": arm.name, "types": arm.placement.types if arm.placement else [],
        "parameters": arm.placement.parameters if arm.placement else sum(p.numel() for p in run.model.parameters()),
        "rank_low": min(ranks, default=None), "rank_high": max(ranks, default=None), "lr": runs[0]["lr"],
        "sweep": {f"{lr:g}": loss for lr, loss in losses.items()}, "runs": runs, **mean,
        "forgetting": mean["general_loss"] - base["general_loss"],
        "seconds": round(sum(r["seconds"] for r in results), 2), "peak_mib": max(r["peak_mib"] for r in results),
    }  # fmt: skip


def listed_arms(text: str) -> list[str]:
    """The names in `--arms`. Raises ConfigError for unknown ones (with the nearest), doubles and fewer than two."""
    names, known = _listed("arms", text), arm_names()
    for name in names:
        if name not in known:
            raise ConfigError(f"arms: expected some of {', '.join(known)}, got {name!r}{nearest(name, known)}")
    if len(names) < 2:
        raise ConfigError(f"arms: expected two or more to compare, got {text!r}")
    return names


def listed_rates(text: str) -> list[float]:
    """The learning rates in `--lrs`. Raises ConfigError for what is no number above 0, doubles and none."""
    return _numbers("lrs", text, _rounded, lambda lr: 0 < lr < math.inf, "numbers above 0 such as 5e-4,1e-3")


def listed_seeds(text: str) -> list[int]:
    """The seeds in `--seeds`. Raises ConfigError for what is no whole number from 0, doubles and fewer than three."""
    seeds = _numbers("seeds", text, int, lambda seed: 0 <= seed < 2**63, "whole numbers from 0 such as 0,1,2")
    if len(seeds) < 3:
        raise ConfigError(f"seeds: fewer than three say nothing of how seeds differ, got {text!r}; give 0,1,2 or more")
    return seeds


def _rounded(lr: float | str) -> float:
    return float(f"{float(lr):g}")  # as the folders are named


def _numbers(option: str, text: str, kind: Callable, fits: Callable[[Any], bool], expected: str) -> list[Any]:
    values: list[Any] = []
    for part in _listed(option, text):
        try:
            value = kind(part)
        except ValueError:
            value = None
        if value is None or not fits(value) or value in values:
            twice = " twice" if value in values else ""
            raise ConfigError(f"{option}: expected {expected}, got {part!r}{twice}")
        values.append(value)
    return values


def _listed(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    for number, part in enumerate(parts):
        if not part or part in parts[:number]:
            raise ConfigError(
                f"{option}: expected names or numbers with commas, got {part!r} {'twice ' if part else ''}in {text!r}"
            )
    return parts


def matched(run: Run, report: NFNReport, names: list[str], lrs: list[float]) -> tuple[int, list[Arm]]:
    """The budget in parameters, which is what plop takes of `--budget` or at `--rank`, and an arm for each name. Raises
    ConfigError naming an arm whose parameters are not within 1 % of it."""
    config = run.config
    how: dict[str, Any] = {
        key: getattr(config, key) for key in ("k", "rank", "alpha", "seed", "ranks", "granularity")
    } | {"cap": config.cap or None}
    budget = place(report, "plop", budget=config.budget, **how).parameters
    remedy = "choose another --budget or --rank, or leave the arm out of --arms"
    arms = []
    for name in names:
        if name == FULL:
            arms.append(Arm(name, None, [_rounded(lr * FULL_LR) for lr in lrs]))
            run.say(f"{name}: all weights, not matched; learning rates are {FULL_LR:g} of the adapters'")
            continue
        try:
            placement = place(report, name, budget=budget, **how)
        except PlacementError as error:
            raise ConfigError(f"arm {name!r} cannot be matched to {budget:,} parameters: {error}; {remedy}") from error
        if not abs(placement.parameters / budget - 1) <= MATCHED:
            raise ConfigError(
                f"arm {name!r} cannot be matched: {placement.parameters:,} parameters are "
                f"{placement.parameters / budget - 1:+.1%} off {budget:,}, more than {MATCHED:.0%}; {remedy}"
            )
        same = [arm.name for arm in arms if arm.placement and arm.placement.modules == placement.modules]
        arms.append(Arm(name, placement, lrs))
        run.say(str(placement))
        if same:
            run.say(
                f"{name} is the same placement as {same[0]}, and will show no difference from it: leave one of them out"
            )
    return budget, arms


def _vectors(run: Run, arms: list[Arm]) -> dict[str, torch.Tensor] | None:
    if run.config.init != "eva":
        return None
    vectors = eva.load(run.folder / EVA)[0]
    for arm in arms:
        for name, (rank, _) in (arm.placement.modules if arm.placement else {}).items():
            if len(vectors.get(name, ())) < rank:
                most = max(rank for other in arms if other.placement for rank, _ in other.placement.modules.values())
                raise ConfigError(
                    f"arm {arm.name!r}: {name} has rank {rank}, for which {EVA} holds too few vectors; first: "
                    f"plopfast score --init eva --rank {most} --overwrite --out {run.folder}"
                )
    return vectors
