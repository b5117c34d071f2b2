"""The trial: do placements of equal size differ once they are trained?

Every arm adapts other modules with as many parameters (`full` trains all weights, and is said to be unmatched). Each has
its own learning-rate sweep at the first seed, chosen by validation loss alone, and trains the other seeds at that rate.
The model sees the test rows when all training is over, once for each arm's seeds and the base; differences are tested as
paired.py says. Forgetting is the rise of the loss on general text that has nothing to do with the task.

    OUT/trial/ARM/lr-LR-seed-SEED/{metrics.jsonl, checkpoints/ while running, adapter/, result.json, test.json}
"""

import contextlib
import copy
import dataclasses
import difflib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from . import eva, files, machine
from .checkpoint import checkpoints, load_adapter, save_adapter
from .data import DEMO, Example, read_text
from .errors import ConfigError, FileError, PlacementError, TrainingError
from .evaluate import choices_of, evaluate, evaluate_rows
from .lora import inject, unload
from .models import context_length
from .nfn import NFNReport
from .paired import accuracies, compare
from .pipeline import EVA, Run, run_score
from .placement import RULES, Placement, place
from .train import CHECKPOINTS, Trainer

FULL = "full"
FULL_LR = 0.1  # of an adapter's rate, where all weights learn (Schulman et al. 2025, "LoRA Without Regret")
MATCHED = 0.01  # relative; the widest gap between arms' parameters
GENERAL_TOKENS, GENERAL_ROW, GENERAL_CHARACTERS = 8192, 256, 100_000
WEIGHTS = "model.safetensors"
MADE_BY = "plopfast trial"


@dataclass(frozen=True)
class Arm:
    """`placement` is None where all weights are trained; `lrs` are the peak learning rates it tries."""

    name: str
    placement: Placement | None
    lrs: list[float]


def run_trial(run: Run) -> str:
    """Trains and compares the arms of `run.config`, writes trial.json, and returns its table. With `run.resume`, finished
    trainings and evaluations are left out, and an interrupted training goes on from its checkpoint.

    Raises ConfigError for arms, rates and seeds that cannot be, data without test rows of its own, and arms that cannot be
    matched; TrainingError where an arm trains at none of its rates; and whatever the stages it consists of raise.
    """
    config, folder = run.config, run.folder / "trial"
    names, lrs, seeds = listed_arms(config.arms), listed_rates(config.lrs), listed_seeds(config.seeds)
    if config.full:
        raise ConfigError("a trial trains all weights in an arm of its own: --arms plop,all,full instead of --full")
    if run.resume and run.file("trial").exists():
        run.say("trial: already done")
        return table(files.read_json(run.file("trial"), MADE_BY))
    if run.rows("test") is run.rows("valid") or run.paths["test"] == run.paths.get("valid"):
        raise ConfigError("a trial chooses learning rates on the validation rows: give --test FILE rows of its own")
    if not (run.resume or run.overwrite) and folder.exists():
        raise FileError(f"{folder}: an unfinished trial; pass --resume to go on, or --overwrite to start anew")
    run.begin("trial")
    if run.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    for split in (*DEMO, "unlabeled"):  # a row that cannot be used should stop the trial now, not after the training
        run.examples(split)
    general, told = general_text(run, folder)
    report = NFNReport.load(run.file("score")) if run.file("score").exists() else run_score(run)
    budget, arms = matched(run, report, names, lrs)
    vectors = _vectors(run, arms)

    say = _counter(run, len(arms) * (len(lrs) + len(seeds) - 1), "training")
    sweeps: dict[str, dict[float, dict[str, Any]]] = {}
    chosen: dict[str, list[Path]] = {}
    for arm in arms:
        at = [folder / arm.name / f"lr-{lr:g}-seed-{seeds[0]}" for lr in arm.lrs]
        results = [_train(run, arm, lr, seeds[0], path, vectors, say) for lr, path in zip(arm.lrs, at, strict=True)]
        sweeps[arm.name] = dict(zip(arm.lrs, results, strict=True))
        tried = {lr: r["valid_loss"] for lr, r in sweeps[arm.name].items() if r["valid_loss"] is not None}
        if not tried:
            raise TrainingError(f"arm {arm.name!r} trains at none of its rates; lower --lrs: {results[0]['error']}")
        best = min(tried, key=lambda lr: tried[lr])
        chosen[arm.name] = [folder / arm.name / f"lr-{best:g}-seed-{seed}" for seed in seeds]
        for path in set(at) - set(chosen[arm.name]):
            (path / WEIGHTS).unlink(missing_ok=True)
        for seed, path in zip(seeds[1:], chosen[arm.name][1:], strict=True):
            if _train(run, arm, best, seed, path, vectors, say)["valid_loss"] is None:
                raise TrainingError(f"arm {arm.name!r} does not train with seed {seed}; lower --lrs: {path}/result.json")

    unload(run.model)  # all training is over: the one look at the test rows
    say = _counter(run, 1 + len(arms) * len(seeds), "evaluation")
    base = _test(run, None, folder / "base", general, say)
    tests = {arm.name: [_test(run, arm, path, general, say) for path in chosen[arm.name]] for arm in arms}
    right = torch.tensor([[test["right"] for test in tests[arm.name]] for arm in arms], dtype=torch.float64)
    confidence = config.confidence or 0.95
    versus = [None, *map(dataclasses.asdict, compare(right, confidence, config.seed))]
    intervals = accuracies(right, confidence, config.seed)
    described = []
    for arm, against, (accuracy, low, high) in zip(arms, versus, intervals, strict=True):
        results = [files.read_json(path / "result.json", MADE_BY) for path in chosen[arm.name]]
        keep = ("accuracy", "loss", "general_loss")
        runs = [r | {k: t[k] for k in keep} for r, t in zip(results, tests[arm.name], strict=True)]
        mean = {key: math.fsum(r[key] for r in runs) / len(runs) for key in keep}
        every = [*sweeps[arm.name].values(), *results[1:]]
        described.append({
            "name": arm.name, **_size(run, arm), "lr": runs[0]["lr"],
            "sweep": {f"{lr:g}": result["valid_loss"] for lr, result in sweeps[arm.name].items()}, "runs": runs,
            **mean, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high,
            "forgetting": mean["general_loss"] - base["general_loss"],
            "seconds": round(sum(r["seconds"] for r in every), 1), "peak_mib": max(r["peak_mib"] for r in every),
            "versus": against,
        })  # fmt: skip
    kept = files.read_json(run.folder / "config.json", MADE_BY)
    evaluated = sum(test["seconds"] for test in (base, *(t for of in tests.values() for t in of)))
    value = {
        "plopfast": "trial", "model": run.model.name_or_path, "command": " ".join(["plopfast", *sys.argv[1:]]),
        **{key: kept[key] for key in ("machine", "versions", "data")}, "budget": budget, "reference": arms[0].name,
        "seeds": seeds, "lrs": lrs, "metric": base["metric"], "test_rows": right.shape[2],
        "test": f"paired bootstrap over rows, Student's t over seeds, Holm over {len(arms) - 1} comparisons",
        "confidence": confidence, "general": told,
        "base": {key: base[key] for key in ("accuracy", "loss", "general_loss")},
        "seconds": round(sum(arm["seconds"] for arm in described) + evaluated, 1), "arms": described,
    }  # fmt: skip
    files.write_json(run.file("trial"), value)
    return table(value)


def listed_arms(text: str) -> list[str]:
    """The names in `--arms`. Raises ConfigError for unknown ones (with the nearest), doubles and fewer than two."""
    names, known = _listed("arms", text), (*RULES, FULL)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"arms: expected some of {', '.join(known)}, got {name!r}{hint}")
    if len(names) < 2:
        raise ConfigError(f"arms: expected two or more to compare, got {text!r}")
    return names


def listed_rates(text: str) -> list[float]:
    """The learning rates in `--lrs`. Raises ConfigError for what is no number above 0, doubles and none."""
    return _numbers("lrs", text, float, lambda lr: 0 < lr < math.inf, "numbers above 0 such as 5e-4,1e-3")


def listed_seeds(text: str) -> list[int]:
    """The seeds in `--seeds`. Raises ConfigError for what is no whole number from 0, doubles and fewer than three."""
    seeds = _numbers("seeds", text, int, lambda seed: 0 <= seed < 2**63, "whole numbers from 0 such as 0,1,2")
    if len(seeds) < 3:
        raise ConfigError(f"seeds: fewer than three say nothing of how seeds differ, got {text!r}; give 0,1,2 or more")
    return seeds


def _numbers(option: str, text: str, kind: Callable, fits: Callable[[Any], bool], expected: str) -> list[Any]:
    values = []
    for part in _listed(option, text):
        with contextlib.suppress(ValueError):
            values.append(kind(part))
        if not values or not fits(values[-1]) or len(values) < len(values[:-1]):
            raise ConfigError(f"{option}: expected {expected}, got {part!r}")
    return values


def _listed(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return parts


def matched(run: Run, report: NFNReport, names: list[str], lrs: list[float]) -> tuple[int, list[Arm]]:
    """The budget in parameters, which is what plop takes of `--budget` or at `--rank`, and an arm for each name. Raises
    ConfigError naming an arm whose parameters are not within 1 % of it."""
    config = run.config
    how: dict[str, Any] = {
        key: getattr(config, key) for key in ("k", "rank", "alpha", "seed", "ranks", "granularity", "cap")
    }
    budget = place(report, "plop", budget=config.budget, **how).parameters
    remedy = "choose another --budget or --rank, or leave the arm out of --arms"
    arms = []
    for name in names:
        if name == FULL:
            arms.append(Arm(name, None, [lr * FULL_LR for lr in lrs]))
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
        arms.append(Arm(name, placement, lrs))
        run.say(str(placement))
    return budget, arms


def _vectors(run: Run, arms: list[Arm]) -> dict[str, torch.Tensor] | None:
    if run.config.init != "eva":
        return None
    vectors = eva.load(run.folder / EVA)[0]
    for arm in arms:
        for name, (rank, _) in (arm.placement.modules if arm.placement else {}).items():
            if len(vectors.get(name, ())) < rank:
                raise ConfigError(
                    f"arm {arm.name!r}: {name} has rank {rank}, for which {EVA} holds too few vectors; first: "
                    f"plopfast score --init eva --rank {rank} --overwrite --out {run.folder}"
                )
    return vectors


def _size(run: Run, arm: Arm) -> dict[str, Any]:
    if arm.placement is None:
        every = sum(p.numel() for p in run.model.parameters())
        return {"types": [], "parameters": every, "rank_low": None, "rank_high": None, "matched": False}
    ranks = [rank for rank, _ in arm.placement.modules.values()]
    size = {"types": arm.placement.types, "parameters": arm.placement.parameters}
    return size | {"rank_low": min(ranks), "rank_high": max(ranks), "matched": True}


def _counter(run: Run, total: int, what: str) -> Callable[[str, float], None]:
    """say(text, seconds): announces a piece of work before it begins (seconds 0) with which of how many it is and the time
    left, and learns afterwards how long it took (0 again, where it was done already)."""
    done, spent = [0], [0.0, 0]

    def say(text: str, seconds: float = -1.0) -> None:
        if seconds < 0:
            left = spent[0] / spent[1] * (total - done[0]) / 60 if spent[1] else None
            run.say(f"{what} {done[0] + 1} of {total}: {text}" + ("" if left is None else f", about {left:.0f} min left"))
        else:
            done[0] += 1
            spent[0], spent[1] = spent[0] + seconds, spent[1] + (seconds > 0)

    return say


def _train(run, arm, lr, seed, path, vectors, say):
    pass
