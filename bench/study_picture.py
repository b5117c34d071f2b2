"""The picture of the study in one look: what each placement costs, and how each module type alone did against its NFN.

    python bench/study_picture.py STUDY.json PICTURE.png

STUDY.json is what plopfast study writes. Left: mean regret of each placement over pairs of a model and a task, with intervals.
Right: of each trial, the loss of each type trained alone above the best one's, in the order of its NFN.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from plopfast.support import files

OURS, OTHERS = "#c2410c", "#475569"
MARKS = "osD^vP"


def costs(axes: Any, study: dict[str, Any]) -> None:
    """Regret of each placement that is in all pairs, lowest on top; those of single types and of single modules are in study.json."""
    pairs = max(row["pairs"] for row in study["regret"])
    rows = [row for row in study["regret"] if row["pairs"] == pairs and row["name"] != "strongest-module"]
    rows = [row for row in rows if not row["name"].endswith("_proj") or "+" in row["name"]]
    for place, row in enumerate(reversed(rows)):
        color = OURS if row["name"] == "plop" else OTHERS
        low, high = (row[key] if row[key] is not None else row["mean"] for key in ("low", "high"))
        axes.plot([low, high], [place, place], color=color, linewidth=2)
        axes.plot(row["mean"], place, "o", color=color)
    axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    for label in axes.get_yticklabels():
        label.set_color(OURS if label.get_text() == "plop" else "black")
    axes.axvline(0, color="#94a3b8", linewidth=1, zorder=0)
    axes.set_xlabel(
        f"test loss above the best placement's, nats a token\n(mean and {100 * study['confidence']:g} % interval)"
    )
    axes.set_title("What each placement costs", loc="left")


def orders(axes: Any, study: dict[str, Any]) -> None:
    """Loss of each type alone by its place in the order of NFN."""
    trials = [trial for trial in study["trials"] if not trial["control"] and "plop" in trial["tau"]]
    for number, model in enumerate(dict.fromkeys(trial["model"] for trial in trials)):
        of = [trial for trial in trials if trial["model"] == model]
        tau = fmean(trial["tau"]["plop"]["test"] for trial in of)
        for count, trial in enumerate(of):
            ranked = [arm for type_ in trial["nfn_order"] for arm in trial["arms"] if arm["name"] == type_]
            best = min(arm["loss"] for arm in ranked)
            label = f"{model}: tau {tau:+.2f}" if not count else None
            axes.plot(range(1, len(ranked) + 1), [arm["loss"] - best for arm in ranked], MARKS[number % len(MARKS)] + "-",
                      color=(OURS, OTHERS)[number % 2], alpha=0.55, linewidth=1, label=label)  # fmt: skip
    axes.set_yscale("symlog", linthresh=0.05)
    axes.set_xlabel("module types, each trained alone: lowest NFN first")
    axes.set_ylabel("test loss above the best type's")
    axes.set_title("Does NFN order them?", loc="left")
    axes.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    study = files.read_json(given.study, "plopfast study")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    costs(left, study)
    orders(right, study)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(given.picture, dpi=130)


if __name__ == "__main__":
    main()
