"""What a search tried, and its best settings."""

from typing import Any

from ..support.tables import UNKNOWN, Column, Table
from .figures import Csv, Plot, Section, Tables
from .folder import RunFolder
from .scales import counted, finite, fitting
from .words import digits, duration, listed, number, rich, several

SHOWN_TRIALS = 12
CALLED = {"complete": "trained to the end", "stopped early": "stopped early", "killed": "killed"}


def search(run: RunFolder) -> Section:
    """search.json: what a search tried, and its best settings."""
    section = Section(id="search", title="Settings searched", command=run.noted("search"))
    found = run.search
    if not found:
        section.lacks = ("No settings were searched.", run.command("search"))
        return section
    trials = found["trials"]
    ended = sorted(
        (t for t in trials if t["state"] == "complete" and t["valid_loss"] is not None), key=lambda t: t["valid_loss"]
    )
    best = next((trial for trial in trials if trial["number"] == found["best"]), None)
    states = {state: sum(trial["state"] == state for trial in trials) for state in CALLED}
    told = (
        listed([f"{number(count)} {CALLED[state]}" for state, count in states.items() if count]) if trials else "none"
    )
    section.answer = [f"{several(len(trials), 'combination')}: {told}."]
    if best:
        section.answer.insert(
            0,
            rich("<b>Trial {}</b> had the lowest validation loss, {}.", best["number"], digits(best["valid_loss"], 4)),
        )
        if (first := next((t for t in ended if t["number"] == 0), None)) and first is not best:
            section.answer.append(f"The run’s own settings, trial 0, had {digits(first['valid_loss'], 4)}.")
        section.caveats = [
            rich(
                "Train and evaluate the best: <code>plopfast run --config search.json --out NEW</code>, with search.json of this folder."
            ),
            "The best of many trials is flattered by its choice: judge it on test rows.",
        ]
    section.body = [figure for figure in (_best(best), _losses(trials, ended, best), _trials(trials, ended)) if figure]
    return section


def _setting(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _best(best: dict[str, Any] | None) -> Tables | None:
    if not best:
        return None
    rows = [(name, _setting(value)) for name, value in best["params"].items()]
    return Tables(
        title=f"The best settings: trial {best['number']}", table=Table("", [Column("setting"), Column("value")], rows)
    )


def _losses(trials: list[dict[str, Any]], ended: list[dict[str, Any]], best: dict[str, Any] | None) -> Plot | None:
    dots = [(float(trial["number"]), trial["valid_loss"]) for trial in trials if finite([trial["valid_loss"]])]
    if len(dots) < 2:
        return None
    lowest, line = float("inf"), []
    for trial in sorted(ended, key=lambda trial: trial["number"]):
        lowest = min(lowest, trial["valid_loss"])
        line.append((float(trial["number"]), lowest))
    last = max(x for x, _ in dots)
    marks = [(float(best["number"]), best["valid_loss"], digits(best["valid_loss"]))] if best else []
    return Plot(
        title="Validation loss of the trials", sub="Each dot is a trial; one that was stopped early at its last look", x=counted(int(last)), y=fitting([y for _, y in dots]),
        dots=dots, line=line, marks=marks, key=[("dot", "a trial"), ("line", "the best so far"), ("mark", "the best")], height=200, axis="trial",
        alt=f"Validation loss of {len(dots)} trials, the lowest {min(y for _, y in dots):.4f}.",
        csv=Csv("search", ("trial", "valid_loss", "state"), [(t["number"], t["valid_loss"], t["state"]) for t in trials]),
    )  # fmt: skip


def _trials(trials: list[dict[str, Any]], ended: list[dict[str, Any]]) -> Tables | None:
    if not trials:
        return None
    names = list(dict.fromkeys(name for trial in trials for name in trial["params"]))
    order = ended + [trial for trial in trials if trial not in ended]
    rows = [
        (str(t["number"]), *(_setting(t["params"].get(name, UNKNOWN)) for name in names), t["valid_loss"],
         UNKNOWN if t.get("seconds") is None else duration(t["seconds"]), t.get("why") or t["state"])
        for t in order[:SHOWN_TRIALS]
    ]  # fmt: skip
    columns = [
        Column("trial"),
        *(Column(name) for name in names),
        Column("validation loss", ".4f"),
        Column("time"),
        Column("state"),
    ]
    more = len(order) - len(rows)
    return Tables(
        title="Trials, best first",
        table=Table("", columns, rows),
        note=f"{more} more are in search.json." if more > 0 else "",
    )
