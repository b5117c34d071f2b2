"""What the report knows of a run beyond single fields: rows seen, steps clipped, how answers changed."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..placing.rules import nfn_rule
from .caveats import EndedEarly, OtherPick, ended_early, other_picks
from .folder import RunFolder
from .words import name_of

MOST_CLASSES = 32  # of a choice task, as evaluation takes them
DECIDED = (0.0, 1.0)


def model_of(run: RunFolder) -> str:
    """Return the model's name as it was given; nothing where no file tells it."""
    found = (run.scores.model if run.scores else "") or run.config.get("model") or ""
    return found or next((str(part["model"]) for part in (run.estimate, run.trial, run.audit) if part.get("model")), "")


def short_model(run: RunFolder) -> str:
    """Return the last part of the model's name: the page names no folders."""
    return name_of(model_of(run)) or "the model"


def steps_of(run: RunFolder) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, one for each step, in order; of a step that was logged twice, what is newer."""
    found: dict[int, dict[str, Any]] = {}
    for record in run.metrics:
        kept = dict(record)
        if "valid_loss" in kept and "loss" not in kept:  # its seconds are the validation's
            kept.pop("seconds", None)
        found.setdefault(kept["step"], {}).update(kept)
    return [found[step] for step in sorted(found)]


def split_of(run: RunFolder, name: str) -> dict[str, Any]:
    """Return the facts of a split in data.json; empty where there are none."""
    return next((split for split in run.data.get("splits", []) if split["split"] == name), {})


def rows_seen(run: RunFolder) -> tuple[float | None, bool]:
    """Return how many training rows the steps took, and whether that is counted (otherwise it is estimated by tokens)."""
    if "rows_seen" in run.training:
        return run.training["rows_seen"], True
    train, tokens = split_of(run, "train"), run.training.get("tokens")
    if not tokens or not train.get("rows"):
        return None, False
    return tokens * train["rows"] / train["tokens"], False


def clipped(run: RunFolder) -> int | None:
    """Return how many steps had their gradient clipped; None where nothing was clipped or nobody knows."""
    if "clipped" in run.training:
        return run.training["clipped"]
    limit = run.config.get("settings", {}).get("clip")
    norms = [step["grad_norm"] for step in run.metrics if step.get("grad_norm") is not None]
    return sum(norm > limit for norm in norms) if limit and norms else None


def how_it_ended(run: RunFolder) -> EndedEarly:
    """Say what speaks against the training's end (`caveats.ended_early`)."""
    told = run.training
    looks = sum(record.get("valid_loss") is not None for record in run.metrics)
    stopped = told.get("stopped", "max_steps")
    return ended_early(
        told.get("steps", 0), clipped=clipped(run), best_step=told.get("best_step") if stopped == "max_steps" else None,
        looks=looks, rows_seen=rows_seen(run)[0], rows=split_of(run, "train").get("rows", 0),
    )  # fmt: skip


def by_type(run: RunFolder) -> dict[str, dict[str, float]]:
    """Return type -> module -> NFN, lowest type first; modules without a layer are left out."""
    if not run.scores:
        return {}
    found: dict[str, dict[str, float]] = {type_: {} for type_ in run.scores.types}
    for name, score in run.scores.scores.items():
        if score.layer is not None:
            found[score.type][name] = score.nfn
    return found


def picks_that_differ(run: RunFolder) -> list[OtherPick]:
    """Return the summaries of the layers that pick other types than the mean (`caveats.other_picks`)."""
    rule = nfn_rule(run.rule)
    if not run.scores or rule is None or not run.whole_types:
        return []
    return other_picks(by_type(run), set(run.scores.outliers()), run.types, rule.highest)


@dataclass(frozen=True)
class Changes:
    """How many rows were right before and after, only after, only before, and never."""

    both: int
    gained: int
    lost: int
    neither: int


def changes(run: RunFolder) -> Changes | None:
    """Count the rows by whether they were right before and after; None where a row is neither right nor wrong."""
    found: Counter[tuple[float, float]] = Counter(
        (row["before"]["right"], row["after"]["right"]) for row in run.eval_rows
    )
    if not found or any(right not in DECIDED for pair in found for right in pair):
        return None
    return Changes(*(found[pair] for pair in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0))))


def answers(run: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Return expected answer -> its rows, for a choice task; most rows first. Empty for other tasks."""
    if run.eval.get("tuned", {}).get("metric") != "choice":
        return {}
    rows = [row for row in run.eval_rows if row["expected"] is not None and row["after"].get("answered") is not None]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["expected"].strip(), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))) if len(found) <= MOST_CLASSES else {}


def guess(run: RunFolder) -> float | None:
    """Return the share that guessing would get right on a choice task; None for other tasks."""
    names = {*answers(run)} | {row["after"]["answered"].strip() for rows in answers(run).values() for row in rows}
    return 1 / len(names) if len(names) > 1 else None


def confused(run: RunFolder, when: str = "after") -> Counter[tuple[str, str]]:
    """Count the wrong answers of a choice task by (expected, answered)."""
    found: Counter[tuple[str, str]] = Counter()
    for expected, rows in answers(run).items():
        for row in rows:
            answered = row[when].get("answered")
            if answered is not None and answered.strip() != expected:
                found[expected, answered.strip()] += 1
    return found


def most_wrong(run: RunFolder, count: int = 5) -> list[dict[str, Any]]:
    """Return the rows that are wrong after training and whose right answer had the lowest chance, lowest first."""
    wrong = [
        row
        for row in run.eval_rows
        if row["after"]["right"] == 0
        and row["after"].get("chance") is not None
        and math.isfinite(row["after"]["chance"])
    ]
    return sorted(wrong, key=lambda row: row["after"]["chance"])[:count]


def data_paths(run: RunFolder) -> list[str]:
    """Return the paths of all files that the run folder's files name, as they stand in sentences."""
    found = [split["where"].rpartition(":")[0] or split["where"] for split in run.data.get("splits", [])]
    for source in (run.config, run.trial):
        for of in source.get("data", {}).values():
            found += [one["file"] for one in (of if isinstance(of, list) else [of])]
    return [path for path in found if path]


def accuracy_verdict(evaluation: Mapping[str, Any]) -> str:
    """Return "up", "down" or "none" as the gain's interval says it, else "unknown".

    Older files have no paired interval. Then intervals of both that lie apart show a difference, too, and nothing else does.
    """
    base, tuned, gain = evaluation["base"], evaluation["tuned"], evaluation.get("gain")
    if gain:
        return "up" if gain["low"] > 0 else "down" if gain["high"] < 0 else "none"
    if "accuracy_low" in base and "accuracy_high" in base and "accuracy_low" in tuned and "accuracy_high" in tuned:
        if tuned["accuracy_low"] > base["accuracy_high"]:
            return "up"
        if tuned["accuracy_high"] < base["accuracy_low"]:
            return "down"
    return "unknown"
