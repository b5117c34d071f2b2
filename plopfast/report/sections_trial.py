"""Section 6: placements compared, and what they forgot."""

from ..support.tables import Table
from .figures import Bar, Chart, Csv, Figure, Fold, Section, Side, Tables
from .folder import RunFolder
from .recommend import findings
from .scales import linear
from .tables import trial_table
from .words import digits, listed, number, rich, several, signed, span

NONE = "no difference shown"


def trial(run: RunFolder) -> Section:
    """trial.json: the placements compared, and what they forgot."""
    section = Section(id="trial", title="Placements compared", command=run.noted("trial"))
    found = run.trial
    if not found:
        section.lacks = (
            "Whether another placement trains better is not known: only a trial shows it.",
            run.command("trial"),
        )
        return section
    level, arms, reference = f"{100 * found['confidence']:g}%", found["arms"], found["reference"]
    section.answer = _answer(run)
    section.caveats = [
        f"{len(arms)} placements were trained with {len(found['seeds'])} seeds each, chosen by validation rows, and tested on "
        f"{found['test_rows']} test rows.",
        '"No difference shown" does not mean that there is none: the interval says how large one could be.',
    ]
    head = ("difference", "low", "high", "p_corrected", "verdict")
    rows = [(arm["name"], *(arm["versus"][key] for key in head)) for arm in arms if arm["versus"]]
    figures: list[Figure] = []
    if rows:
        spoken = "; ".join(
            f"{name} {d:+.3f} ({low:+.3f} to {high:+.3f}), {word}" for name, d, low, high, _, word in rows
        )
        first = next((arm for arm in arms if not arm["versus"]), arms[0])
        bars = [
            Bar(
                name=first["name"],
                small=_types(first["types"]),
                text=f"{100 * first['accuracy']:.1f}%",
                more="reference",
                on=True,
                dots=[(0.0, True)],
            )
        ]
        for name, d, low, high, _, verdict in rows:
            arm = next(arm for arm in arms if arm["name"] == name)
            bars.append(Bar(name=name, small=_types(arm["types"]), text=signed(100 * d), more=span(100 * low, 100 * high),
                            dots=[(100 * d, verdict != NONE)], span=(100 * low, 100 * high)))  # fmt: skip
        figures.append(Chart(
            title=_title(rows), sub=f"Accuracy minus that of {reference}, in points", alt=f"Difference in accuracy to {reference}, with {level} intervals: {spoken}.",
            note=f"{level} intervals. Filled: a difference was shown. Test: {found['test']}.", rows=bars,
            scale=linear([0.0, *(100 * value for row in rows for value in row[1:4])], most=4, signed=True), reference=(0.0, "0"), look="trial", height=46,
            csv=Csv("trial", ("placement", *head), rows),
        ))  # fmt: skip
    figures += _forgetting(run)
    section.body = [Side(figures)] if len(figures) == 2 else [*figures]
    table = trial_table(found)
    section.body.append(
        Fold(
            "All numbers of the trial",
            [Tables(title=table.caption, note=table.note, table=Table("", table.columns, table.rows))],
        )
    )
    return section


def _answer(run: RunFolder) -> list[str]:
    said = findings(run.trial)
    texts = [rich("In the trial, <b>{}</b>.", said)] if said else ["A single placement was tried."]
    open_ = [arm["versus"] for arm in run.trial["arms"] if (arm["versus"] or {}).get("verdict") == NONE]
    if open_:
        high, low = max(100 * v["high"] for v in open_), min(100 * v["low"] for v in open_)
        texts.append(
            f"Where no difference was shown, another placement could still be {max(high, 0):.1f} points better or {max(-low, 0):.1f} worse."
        )
    return texts


def _title(rows: list[tuple]) -> str:
    zero = [low <= 0 <= high for _, _, low, high, *_ in rows]
    if all(zero):
        return f"All {number(len(zero))} intervals contain zero" if len(zero) > 1 else "The interval contains zero"
    shown = [(name, verdict) for name, *_, verdict in rows if verdict != NONE]
    if shown:
        names = [name for name, _ in shown]
        words = {verdict for _, verdict in shown}
        return f"{listed(names)} did {words.pop()}" if len(words) == 1 else f"{listed(names)} differ"
    return "Differences in accuracy"


def _types(types: list[str]) -> str:
    names = [name.removesuffix("_proj") for name in types]
    return ", ".join(names[:4]) + ("" if len(names) <= 4 else f" and {len(names) - 4} more") if names else "all weights"


def _forgetting(run: RunFolder) -> list[Figure]:
    base = run.trial["base"].get("general_loss")
    if base is None:
        return []
    rows = []
    for arm in run.trial["arms"]:
        seeds = [r["general_loss"] - base for r in arm["runs"]]
        rows.append((arm["name"], arm["forgetting"], min(seeds), max(seeds), arm["general_loss"]))
    spoken = ", ".join(f"{name} {value:+.3f}" for name, value, *_ in rows)
    lrs = {arm["name"]: arm["lr"] for arm in run.trial["arms"]}
    worst = all(low > 0 for _, _, low, *_ in rows)
    bars = [
        Bar(
            name=name,
            small=f"learning rate {lrs[name]:g}",
            text=signed(value, ".2f"),
            more=span(low, high, ".2f"),
            on=not at,
            bar=value,
            span=(low, high),
        )
        for at, (name, value, low, high, _) in enumerate(rows)
    ]
    apart = (
        " Each placement has its own learning rate, so this does not tell what placement itself does."
        if len({*lrs.values()}) > 1
        else ""
    )
    return [Chart(
        title="All placements forgot general text" if worst and len(rows) > 1 else "Forgetting",
        sub=f"Change of the loss on general text; base {digits(base)}", alt=f"Change of the loss on general text by training: {spoken}.",
        note=f"Above 0, a model does worse than before training on general text outside the task. The base model's loss is {base:.3f}, on "
        f"{several(run.trial['general']['tokens'], 'token')}. Mean of the seeds; lines: lowest to highest seed.{apart}",
        rows=bars, scale=linear([value for row in rows for value in row[1:4]], zero=True, most=4, signed=True), axis="nats per token", reference=(0.0, "0"), look="trial", height=46,
        csv=Csv("forgetting", ("placement", "forgetting", "lowest_seed", "highest_seed", "general_loss"), rows),
    )]  # fmt: skip
