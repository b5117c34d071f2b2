"""Sections that only some folders have: the audit of the scores, a search, and reinforcement learning."""

from typing import Any

from ..support.tables import UNKNOWN, Column, Table
from .figures import Bar, Chart, Csv, Notes, Plot, Samples, Section, Tables
from .folder import RunFolder
from .scales import Scale, binned, finite, fitting, linear
from .tables import audit_tables
from .words import capital, digits, duration, listed, number, rich, several

REWARDS = ("step", "reward", "length", "entropy", "kl")
SHOWN_TRIALS = 12
CALLED = {"complete": "to its end", "stopped early": "stopped early", "killed": "killed"}


def audit(run: RunFolder) -> Section:
    """audit.json: whether the scores can be trusted."""
    section = Section(id="audit", title="Can the scores be trusted?", nav="Audit of the scores", command=run.noted("audit"))
    found = run.audit
    if not found:
        section.lacks = ("The scores were not audited.", run.command("audit"))
        return section
    section.answer = [found["verdict"]]
    section.caveats = [
        f"NFN of {found['prompts']} prompts picks {listed(found['pick'])}. Everything is compared with that.",
        *(f"Skipped: {row['kind']}, {row['what']}: {row['why']}." for row in found.get("missing", [])),
    ]
    section.body = [Tables(title=table.caption, table=Table("", table.columns, table.rows), note=table.note) for table in audit_tables(found)]
    return section


def search(run: RunFolder) -> Section:
    """search.json: what a search tried, and its best settings."""
    section = Section(id="search", title="Settings searched", command=run.noted("search"))
    found = run.search
    if not found:
        section.lacks = ("No settings were searched.", run.command("search"))
        return section
    trials = found["trials"]
    ended = sorted((t for t in trials if t["state"] == "complete" and t["valid_loss"] is not None), key=lambda t: t["valid_loss"])
    best = next((trial for trial in trials if trial["number"] == found["best"]), None)
    states = {state: sum(trial["state"] == state for trial in trials) for state in CALLED}
    told = listed([f"{number(count)} {CALLED[state]}" for state, count in states.items() if count]) if trials else "none"
    section.answer = [f"{several(len(trials), 'combination')}: {told}."]
    if best:
        section.answer.insert(0, rich("<b>Trial {}</b> had the lowest validation loss, {}.", best["number"], digits(best["valid_loss"], 4)))
        if (first := next((t for t in ended if t["number"] == 0), None)) and first is not best:
            section.answer.append(f"The run’s own settings, trial 0, had {digits(first['valid_loss'], 4)}.")
        section.caveats = [
            rich("Train and evaluate the best: <code>plopfast run --config search.json --out NEW</code>, with search.json of this folder."),
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
    return Tables(title=f"The best settings: trial {best['number']}", table=Table("", [Column("setting"), Column("value")], rows))


def _losses(trials: list[dict[str, Any]], ended: list[dict[str, Any]], best: dict[str, Any] | None) -> Plot | None:
    dots = [(float(trial["number"]), trial["valid_loss"]) for trial in trials if finite([trial["valid_loss"]])]
    if len(dots) < 2:
        return None
    lowest, line = float("inf"), []
    for trial in sorted(ended, key=lambda trial: trial["number"]):
        lowest = min(lowest, trial["valid_loss"])
        line.append((float(trial["number"]), lowest))
    last = max(x for x, _ in dots)
    x = linear([0, last], zero=True, most=6)
    marks = [(float(best["number"]), best["valid_loss"], digits(best["valid_loss"]))] if best else []
    return Plot(
        title="Validation loss of the trials", sub="Each dot is a trial; one that was stopped early at its last look", x=Scale(0, last, [t for t in x.ticks if t[0] <= last and t[0] == int(t[0])]), y=fitting([y for _, y in dots]),
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
    columns = [Column("trial"), *(Column(name) for name in names), Column("validation loss", ".4f"), Column("time"), Column("state")]
    more = len(order) - len(rows)
    return Tables(title="Trials, best first", table=Table("", columns, rows), note=f"{more} more are in search.json." if more > 0 else "")


def grpo(run: RunFolder) -> Section:
    """grpo.json and rewards.jsonl: the reward before and after, its course, and completions."""
    found = run.grpo
    section = Section(id="grpo", title="Reinforcement learning", command=run.noted("grpo"))
    section.answer = [f"Completions were rewarded by {found['reward']}, over {several(found['steps'], 'step')} of GRPO."]
    if "mean_before" in found:
        section.answer.append(
            f"The most likely completions of {found['test_prompts']} test prompts earned {found['mean_before']:.3f} before and "
            f"{found['mean_after']:.3f} after, on average."
        )
    else:
        section.answer.append("There were no test prompts: only the rewards of the training prompts are known.")
    section.caveats = [capital(note) for note in found["notes"]]
    rows = [tuple(record.get(name) for name in REWARDS) for record in run.rewards]
    drawn = [(row[0], row[1]) for row in rows if row[1] is not None]
    if drawn:
        last = max(rows[-1][0], 1)
        dots, size = binned(drawn)
        section.body.append(Plot(
            title=f"Reward went from {digits(drawn[0][1])} to {digits(drawn[-1][1])}", sub=f"Mean reward of the completions drawn in {'a step' if size == 1 else f'{size} steps'}",
            x=Scale(0, last, [t for t in linear([0, last], zero=True, most=8).ticks if t[0] <= last and t[0] == int(t[0])]), y=linear([y for _, y in drawn], zero=True, most=4),
            dots=dots, line=dots, height=200, axis="step", alt=f"Mean reward of each of {len(rows)} steps, from {drawn[0][1]:.3f} to {drawn[-1][1]:.3f}.",
            csv=Csv("rewards", REWARDS, rows),
        ))  # fmt: skip
    if found["samples"]:
        section.body.append(Samples(
            title="Most likely completions of test prompts", sub="Greedy, before and after",
            samples=[(s["prompt"], s["before"], s["after"], f"reward {s['reward_before']:.3g}", f"reward {s['reward_after']:.3g}") for s in found["samples"]],
        ))  # fmt: skip
    if not section.body:
        section.body.append(Notes(["No reward of a step is kept here."]))
    return section


def rewards_chart(run: RunFolder) -> Chart | None:
    """The reward before and after, for the head of the page."""
    if "mean_before" not in run.grpo:
        return None
    before, after = run.grpo["mean_before"], run.grpo["mean_after"]
    bars = [Bar(name="Before", text=f"{before:.3f}", dots=[(before, False)]), Bar(name="After", text=f"{after:.3f}", dots=[(after, True)], on=True)]
    return Chart(
        title="", rows=bars, scale=linear([before, after], zero=True, most=4), look="hero", height=58, alt=f"Mean reward: {before:.3f} before, {after:.3f} after.",
        note=f"Mean reward of the most likely completions of {several(run.grpo['test_prompts'], 'test prompt')}. No interval is known.",
    )  # fmt: skip
