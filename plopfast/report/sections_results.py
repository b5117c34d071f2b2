"""Section 3: what improved, what still goes wrong, and what was forgotten."""

from typing import Any

from ..support.tables import UNKNOWN, Column, Table
from .facts import Changes, answers, changes, confused, most_wrong
from .figures import Bar, Chart, Csv, Figure, Fold, Matrix, Notes, Samples, Section, Side, Stack, Tables
from .folder import RunFolder
from .scales import linear
from .words import (
    capital,
    digits,
    interval_of,
    listed,
    name_of,
    number,
    place_of,
    rich,
    several,
    share,
    short,
    short_end,
    signed,
)

SIDE_BY_SIDE = 10  # answers in a confusion matrix; the most frequent mistakes of others are a table
MISTAKES = 8
BIG_END = 3.0  # nats: a base model that hardly ever ends its answer
RIGHT = {
    "choice": "the right answer was the likeliest of the answers that occur",
    "exact-match": "the likeliest answer was the expected one, token by token",
    "token": "the likeliest token was the expected one",
}
SHARE_OF = {"choice": "Right answers", "exact-match": "Right answers", "token": "Tokens predicted right"}


def results(run: RunFolder) -> Section:
    """eval.json and eval_rows.jsonl: the tuned model against the base model."""
    section = Section(id="results", title="Before and after", command=run.noted("eval"))
    if not run.eval:
        section.lacks = ("The tuned model was not compared with the base.", run.command("eval"))
        return section
    section.answer = _answer(run)
    section.caveats = _caveats(run)
    section.warnings = kept_warning(run)
    side = [figure for figure in (_by_answer(run), _confusion(run)) if figure]
    section.body += [_changes(found)] if (found := changes(run)) else []
    section.body += [Side(side)] if len(side) == 2 else side
    section.body += [figure for figure in (_most_wrong(run), _samples(run)) if figure]
    forgot = [figure for figure in (_general(run), _must_keep(run)) if figure]
    section.body += [Side(forgot)] if len(forgot) == 2 else forgot
    section.body.append(_losses(run))
    return section


def _answer(run: RunFolder) -> list[str]:
    base, tuned = run.eval["base"], run.eval["tuned"]
    of, rows = SHARE_OF.get(tuned["metric"], "Accuracy"), tuned["examples"]
    if tuned["metric"] in ("choice", "exact-match"):
        before, after = (round(who["accuracy"] * who["examples"]) for who in (base, tuned))
        verb = "rose" if after > before else "fell" if after < before else "stayed"
        way = f"from {before:,} to {after:,}" if verb != "stayed" else f"at {after:,}"
        said = [rich("{} {} <b>{}</b> of {} {} rows.", of, verb, way, f"{rows:,}", run.judged_by)]
    else:
        said = [
            rich(
                "{}: <b>{} before, {} after</b>, on {} {} rows.",
                of,
                share(base["accuracy"]),
                share(tuned["accuracy"]),
                f"{rows:,}",
                run.judged_by,
            )
        ]
    said.append(f"The loss of a learned token went from {digits(base['loss'], 4)} to {digits(tuned['loss'], 4)} nats.")
    end = base.get("end_loss")
    if end is not None and end > BIG_END:
        known = None not in (base.get("answer_loss"), tuned.get("answer_loss"))
        itself = (
            f"; the answer itself cost {digits(base['answer_loss'])} before and {digits(tuned['answer_loss'])} after"
            if known
            else ""
        )
        said.append(f"The base model hardly ever ends its answer: {digits(end)} nats for the end mark{itself}.")
    return said


def _caveats(run: RunFolder) -> list[str]:
    tuned, said = run.eval["tuned"], []
    if tuned["metric"] in RIGHT:
        free = " Free text was not judged." if tuned["metric"] == "choice" else ""
        said.append(rich("<b>Right</b> means that {}.{}", RIGHT[tuned["metric"]], free))
    if run.judged_by == "validation":
        said.append(
            "There are no test rows: these are the validation rows, which also chose the training step that was kept. So they "
            "flatter the tuned model."
        )
    said.append(one_seed(run))
    return said if run.eval.get("general") else [*said, "Forgetting was not measured: no loss on general text is kept."]


def one_seed(run: RunFolder) -> str:
    """Say what no interval of a single run covers."""
    seed = run.config.get("settings", {}).get("seed")
    which = "" if seed is None else f" ({seed})"
    return rich("<b>One run, one seed{}.</b> The intervals cover the choice of rows, not luck in training.", which)


def kept_warning(run: RunFolder) -> list[str]:
    """Say how many of the answers that had to stay right were lost."""
    keep = run.eval.get("must_keep") or {}
    if not keep.get("lost"):
        return []
    return [
        rich(
            '<b class="w">{} of {} answers that had to stay right were lost.</b>',
            len(keep["lost"]),
            keep["kept"] + len(keep["lost"]),
        )
    ]


def _changes(found: Changes) -> Stack:
    total = found.both + found.gained + found.lost + found.neither
    parts = [
        ("t4", found.gained, f"{found.gained:,}"),
        ("s1", found.both, f"{found.both:,}"),
        ("s3", found.neither, f"{found.neither:,}"),
        ("t2", found.lost, f"{found.lost:,}"),
    ]
    words = ("right only after", "right before and after", "wrong before and after", "right only before: lost")
    title = (
        f"{several(found.gained, 'row')} became right, {several(found.lost, 'row')} became wrong"
        if found.gained or found.lost
        else "No row changed"
    )
    return Stack(
        title=title, sub=f"{several(total, 'row')} by how they were answered", bars=[("", "", [(shade, float(n), text) for shade, n, text in parts])],
        key=[(shade, text, f"{n:,}") for (shade, n, _), text in zip(parts, words, strict=True)], tall=True,
        alt="; ".join(f"{text}: {n:,}" for (_, n, _), text in zip(parts, words, strict=True)),
        csv=Csv("changes", ("what", "rows"), [(text, n) for (_, n, _), text in zip(parts, words, strict=True)]),
    )  # fmt: skip


def _by_answer(run: RunFolder) -> Chart | None:
    groups = answers(run)
    if len(groups) < 2:
        return None
    rows = []
    for name, judged in groups.items():
        before, after = (sum(row[when]["right"] for row in judged) / len(judged) for when in ("before", "after"))
        rows.append((name, before, after, len(judged)))
    rows.sort(key=lambda row: -row[2])
    base, tuned = run.eval["base"], run.eval["tuned"]
    everything = [("all rows", base["accuracy"], tuned["accuracy"], tuned["examples"]), *rows]
    bars = [
        Bar(name=name, text=share(after), more=f"of {count:,}", on=not at, dots=[(100 * before, False), (100 * after, True)],
            span=(100 * min(before, after), 100 * max(before, after)), joined=True)
        for at, (name, before, after, count) in enumerate(everything)
    ]  # fmt: skip
    return Chart(
        title=_title_by_answer(rows), sub="Open: before; filled: after", rows=bars, scale=linear([0, 100], zero=True, most=4, unit="%"), look="dumb", height=29,
        alt="Share right by expected answer: " + "; ".join(f"{name} from {share(b)} to {share(a)} of {n}" for name, b, a, n in everything) + ".",
        csv=Csv("by_answer", ("answer", "before", "after", "rows"), rows),
    )  # fmt: skip


def _title_by_answer(rows: list[tuple[str, float, float, int]]) -> str:
    gains = {name: after - before for name, before, after, _ in rows}
    best, worst = max(gains, key=lambda name: gains[name]), min(gains, key=lambda name: gains[name])
    if gains[worst] > 0:
        return f"Every answer gained; {best} gained most"
    lost = [name for name, gain in gains.items() if gain < 0]
    if lost and gains[best] > 0:
        return f"{capital(listed(lost)).rstrip('.') if len(lost) < 3 else f'{number(len(lost)).capitalize()} answers'} lost ground; {best} gained most"
    return "Share right by answer"


def _confusion(run: RunFolder) -> Figure | None:
    groups, found = answers(run), confused(run)
    names = sorted({*groups, *(given for _, given in found)})
    if len(names) < 2:
        return None
    pairs = found.most_common(MISTAKES)
    title = "No answer is confused with another"
    if pairs:
        (expected, given), count = pairs[0]
        back = found.get((given, expected), 0)
        title = (
            f"{expected} and {given} are confused most"
            if back and back >= count / 2
            else f"{expected} is taken for {given} most"
        )
    csv = Csv("confusion", ("expected", "answered", "rows"), [(a, b, n) for (a, b), n in found.most_common()])
    alt = (
        "Wrong answers after training, expected and answered: "
        + (", ".join(f"{a}, {b} {n}" for (a, b), n in pairs) or "none")
        + "."
    )
    if len(names) > SIDE_BY_SIDE:
        table = Table(
            "", [Column("expected"), Column("answered"), Column("rows", ",d")], [(a, b, n) for (a, b), n in pairs]
        )
        return (
            Tables(title=capital(title).rstrip("."), sub="The most frequent mistakes", alt=alt, table=table, csv=csv)
            if pairs
            else None
        )
    right = {name: sum(row["after"]["right"] == 1 for row in groups.get(name, [])) for name in names}
    counts = [[right[a] if a == b else found.get((a, b), 0) for b in names] for a in names]
    return Matrix(
        title=title[:1].upper() + title[1:], sub="After training. Rows: expected. Columns: answered", note="Diagonal: right answers. “·” is none.", alt=alt,
        names=names, counts=counts, csv=csv,
    )  # fmt: skip


def _most_wrong(run: RunFolder) -> Tables | None:
    rows = most_wrong(run)
    if not rows:
        return None
    answered = any(row["after"].get("answered") is not None for row in rows)
    columns = [Column("row"), Column("expected"), *([Column("answered")] * answered), Column("chance of the right one")]
    cells = [
        (row["prompt"].strip() or place_of(row["where"]), (row["expected"] or UNKNOWN).strip(), *([(row["after"].get("answered") or UNKNOWN).strip()] * answered),
         _chance(row["after"]["chance"]))
        for row in rows
    ]  # fmt: skip
    return Tables(
        title="The most confident mistakes", sub=f"Wrong after training, and the right answer’s chance was lowest; of {several(sum(row['after']['right'] == 0 for row in run.eval_rows), 'wrong row')}",
        table=Table("", columns, cells), wide=True,
        csv=Csv("most_wrong", ("row", "where", "expected", "answered", "chance"), [(r["row"], place_of(r["where"]), r["expected"], r["after"].get("answered"), r["after"]["chance"]) for r in rows]),
    )  # fmt: skip


def _chance(value: float) -> str:
    return f"{100 * value:.2g}%" if value >= 1e-4 else "under 0.01%"


def _samples(run: RunFolder) -> Samples | None:
    found = run.eval.get("samples") or []
    if not found:
        return None
    right = sum(sample["right_after"] for sample in found)
    return Samples(
        title=f"{number(len(found)).capitalize()} answers side by side" if len(found) > 1 else "An answer before and after",
        sub=f"Free text, greedy; {number(right) if right else 'none'} right after training",
        samples=[
            (short_end(sample["prompt"]), short(sample["before"]), short(sample["after"]), _verdict(sample, "before"), _verdict(sample, "after"))
            for sample in found
        ],
    )  # fmt: skip


def _verdict(sample: dict[str, Any], when: str) -> str:
    return "✓ right" if sample[f"right_{when}"] else f"✗ should be: {short(sample['expected'], 80)}"


def _general(run: RunFolder) -> Chart | None:
    found = run.eval.get("general")
    if not found:
        return None
    before, after = found["before"], found["after"]
    change = after - before
    title = (
        "General text got harder"
        if change > 0.005
        else "General text got easier"
        if change < -0.005
        else "General text is as it was"
    )
    bars = [
        Bar(name="before", text=digits(before, 4), bar=before),
        Bar(name="after", text=digits(after, 4), more=f"{signed(change, '.2f')} nats", bar=after, on=True),
    ]
    return Chart(
        title=title, sub=f"What was forgotten: loss on {name_of(found['file'])}, {several(found['tokens'], 'token')}", rows=bars, scale=linear([before, after], zero=True, most=4),
        axis="nats per token", look="plain", height=34, alt=f"Loss on general text: {before:.3f} before, {after:.3f} after.",
        csv=Csv("general", ("model", "loss"), [("base", before), ("tuned", after)]),
    )  # fmt: skip


def _must_keep(run: RunFolder) -> Figure | None:
    keep = run.eval.get("must_keep")
    if not keep:
        return None
    wrong = (
        f"{several(keep['wrong_before'], 'prompt')} of {keep['prompts']:,} {'was' if keep['wrong_before'] == 1 else 'were'} wrong before training already."
        if keep["wrong_before"]
        else ""
    )
    if not keep["lost"]:
        parts = [
            ("t4", float(keep["kept"]), f"{keep['kept']:,} kept"),
            ("s3", float(keep["wrong_before"]), f"{keep['wrong_before']:,}"),
        ]
        return Stack(
            title="All answers that had to stay right did" if keep["kept"] else "No answer had to stay right", sub=f"{several(keep['prompts'], 'prompt')} of {name_of(keep['file'])}", note=wrong,
            bars=[("", "", parts)], tall=True, alt=f"{keep['kept']} kept, none lost. {wrong}",
        )  # fmt: skip
    rows = [
        (short(lost["prompt"], 160), short(lost["expected"], 80), short(lost["answer"], 160))
        for lost in keep["lost"][:MISTAKES]
    ]
    more = f" {len(keep['lost']) - MISTAKES} more are in eval.json." if len(keep["lost"]) > MISTAKES else ""
    return Tables(
        title=f"{several(len(keep['lost']), 'answer')} that had to stay right {'was' if len(keep['lost']) == 1 else 'were'} lost", sub=f"{several(keep['prompts'], 'prompt')} of {name_of(keep['file'])}, {keep['kept']:,} kept",
        note=f"{wrong}{more}".strip(), table=Table("", [Column("prompt"), Column("had to stay"), Column("answers now")], rows), wide=True,
    )  # fmt: skip


def _losses(run: RunFolder) -> Fold:
    measured = {"base": run.eval["base"], "tuned": run.eval["tuned"]}
    bounds = ("accuracy_low", "accuracy_high")
    rows = [(who, m["accuracy"], *map(m.get, bounds), m["loss"], m["examples"]) for who, m in measured.items()]
    split = [name for name in ("answer_loss", "end_loss") if any(m.get(name) is not None for m in measured.values())]
    titles = {"answer_loss": "answer’s loss", "end_loss": "end mark’s loss"}
    columns = [Column("model"), Column("accuracy", ".4f"), Column("95% interval"), Column("loss", ".4f"), *(Column(titles[name], ".4f") for name in split),
               Column(f"{run.judged_by} rows", "d")]  # fmt: skip
    cells = [
        (
            who,
            m["accuracy"],
            interval_of(m, ".4f") or UNKNOWN,
            m["loss"],
            *(m.get(name) for name in split),
            m["examples"],
        )
        for who, m in measured.items()
    ]
    base, tuned = measured.values()
    known = "accuracy_low" in base
    first, last = (
        f"{m['accuracy']:.3f}{f' ({said})' if (said := interval_of(m, '.3f')) else ''}" for m in measured.values()
    )
    table = Tables(
        title="", sub=f"{base['examples']} {run.judged_by} rows. Accuracy: {base['metric']}{', with 95% intervals' * known}.",
        alt=f"Accuracy went from {first} to {last}, loss from {base['loss']:.3f} to {tuned['loss']:.3f}.", table=Table("", columns, cells),
        note="Losses are in nats per learned token.", csv=Csv("before_after", ("model", "accuracy", *bounds, "loss", "rows"), rows),
    )  # fmt: skip
    return Fold(
        "Accuracy and loss in numbers",
        [table, *([Notes(["Rows one by one are in eval_rows.jsonl."])] if run.eval_rows else [])],
    )
