"""The sections of the report: what it says of each file of a run folder, in sentences, pictures and tables."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..data.describe import lengths_table, marked
from ..placing.rules import nfn_rule
from ..scoring.report import NFNReport
from ..support.tables import UNKNOWN, Column, Table
from . import pictures
from .folder import RunFolder
from .pictures import Picture
from .tables import PARTS, audit_tables, estimate_table, trial_table
from .words import interval_of, listed, range_of, ties_of

KNOWN = (
    "What the authors found (Hayou, Ghosh and Yu, arXiv 2506.20629): adapters where NFN is lowest did about as well as "
    "adapters on all MLP modules or on all modules, with fewer parameters. They did better than adapters on query, key and "
    "value alone, but not significantly better than adapters on the MLP modules."
)


@dataclass
class Section:
    """A section of the page. `command` is the command line that made its file."""

    id: str
    title: str
    texts: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    command: str = ""


def scores(run: RunFolder) -> list[Section]:
    """scores.json: which types, how sure, and layer by layer."""
    assert run.scores, "SOURCES names the file"
    return [_choice(run, run.scores), _layers(run, run.scores)]


def _choice(run: RunFolder, report: NFNReport) -> Section:
    bounds = run.intervals.types if run.intervals else {}
    rows = [(name, nfn, *bounds.get(name, (None, None)), name in run.types) for name, nfn in report.types.items()]
    what = f"{100 * run.intervals.confidence:g}% intervals over prompts" if run.intervals else ""
    spoken = ", ".join(
        f"{name} {nfn:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})") + (" chosen" if yes else "")
        for name, nfn, low, high, yes in rows
    )
    picture = Picture(
        "nfn_by_type", f"NFN of each module type, lowest first, {what or 'without intervals'}: {spoken}.",
        f"Squares are chosen, circles are not. {f'Bars: {what}' if what else 'No intervals are known'}.",
        ("type", "nfn", "low", "high", "chosen"), rows, pictures.by_type(rows),
    )  # fmt: skip
    return Section(
        "choice", "Which modules, and how sure", _about_the_choice(run), [picture],
        [report.types_table(run.intervals, run.types)],
    )  # fmt: skip


def _about_the_choice(run: RunFolder) -> list[str]:
    """The sentences on the placement, how sure it is, and what NFN means."""
    placement, decision = run.placement, run.decision
    if placement:
        ranks, count = range_of([rank for rank, _ in placement.modules.values()]), len(placement.modules)
        texts = [f"The rule {run.rule!r} chose {count} modules: rank {ranks}, {placement.parameters:,} parameters."]
    else:
        would = f" Squares are what the rule {run.rule!r} chooses." if run.rule else ""
        texts = [f"No placement is kept here.{would}"]
    if run.no_intervals:
        texts.append(f"No interval is possible: {run.no_intervals}.")
    if decision:
        settled = decision.note.startswith(("decided", "not decided"))
        texts.append(f"The choice is {decision.note}." if settled else f"On the choice: {decision.note}.")
        if decision.near_ties:
            level = f"{100 * decision.confidence:g}% confidence"
            texts.append(f"Near-ties: at {level}, these prompts do not tell {ties_of(decision, 99)}.")
    elif nfn_rule(run.rule):
        texts.append("The scores do not say how sure the choice is.")
    if placement:
        texts += [note for note in placement.notes if not decision or decision.note not in note]
    for note in run.scores.notes if run.scores else ():
        texts.append(f"Not scored, and {note}." if note.startswith("left out") else f"{note[0].upper()}{note[1:]}.")
    texts.append(
        "NFN compares a module's response to its real inputs with its response to random inputs of the same length. It is 1 "
        "for a random input."
    )
    if not run.trial:
        texts.append(
            f"Only a trial shows whether this placement trains better than others on this data: {run.command('trial')}."
        )
    return texts


def _layers(run: RunFolder, report: NFNReport) -> Section:
    z, outliers = report.z_scores(), set(report.outliers())
    order = list(report.types)
    layered = [(name, s) for name, s in report.scores.items() if s.layer is not None]
    rows = [(name, s.type, s.layer, s.nfn, z[name], name in outliers) for name, s in layered]
    rows.sort(key=lambda row: (order.index(row[1]), row[2]))
    low, high = min(rows, key=lambda row: row[3]), max(rows, key=lambda row: row[3])
    odd = {type_: [str(row[2]) for row in rows if row[1] == type_ and row[5]] for type_ in order}
    spoken = "; ".join(f"{type_} in layer {', '.join(found)}" for type_, found in odd.items() if found) or "none"
    alt = (
        f"Heat map of NFN, {len({row[2] for row in rows})} layers across and {len(order)} module types down, from {low[3]:.2f} "
        f"({low[1]}, layer {low[2]}) to {high[3]:.2f} ({high[1]}, layer {high[2]}). Outliers: {spoken}."
    )
    head = ("module", "type", "layer", "nfn", "z", "outlier")
    return Section(
        "layers", "Layer by layer",
        [f"Outliers: {spoken}. They are more than 3.5 robust standard deviations from their type's median."],
        [Picture("nfn_by_layer", alt, "Lighter is higher.", head, rows, pictures.heat_map(rows))],
    )  # fmt: skip


def audit(run: RunFolder) -> list[Section]:
    """audit.json: whether the scores can be trusted."""
    found = run.audit
    texts = [
        found["verdict"],
        f"NFN of {found['prompts']} prompts picks {listed(found['pick'])}. Everything is compared with that.",
        *(f"Skipped: {row['kind']}, {row['what']}: {row['why']}." for row in found.get("missing", [])),
    ]
    return [Section("audit", "Can the scores be trusted?", texts, tables=audit_tables(found))]


def estimate(run: RunFolder) -> list[Section]:
    """estimate.json: memory and FLOPs of a training step."""
    found = run.estimate
    rows = [(c["name"], c["total_mib"], *(c[key] for key in PARTS)) for c in found["choices"]]
    spoken = ", ".join(f"{c['name']} {c['total_mib']:,.0f} MiB" for c in found["choices"])
    text = f"Estimated before training, for batches of {found['batch_tokens']} tokens in {found['dtype']} on {found['device']}."
    picture = Picture(
        "memory", f"Estimated training memory of each placement: {spoken}.",
        "Estimated peaks, not measurements. Hatched: full fine-tuning.",
        ("placement", "total_mib", *PARTS), rows, pictures.memory(rows),
    )  # fmt: skip
    return [Section("estimate", "What training would take", [text], [picture], [estimate_table(found)])]


def training(run: RunFolder) -> list[Section]:
    """metrics.jsonl: the loss over the steps. Empty where no loss was logged."""
    steps: dict[int, dict[str, Any]] = {}
    for metric in run.metrics:
        steps.setdefault(metric["step"], {}).update(metric)
    rows = [(step, steps[step].get("loss"), steps[step].get("valid_loss")) for step in sorted(steps)]
    losses = ("training", [row[1] for row in rows]), ("validation", [row[2] for row in rows])
    lines = {name: [loss for loss in line if loss is not None] for name, line in losses}
    spoken = "; ".join(f"{name} from {line[0]:.3f} to {line[-1]:.3f}" for name, line in lines.items() if line)
    if not spoken:
        return []
    picture = Picture("training", f"Loss over {rows[-1][0]} training steps: {spoken}.", "Nats per label token.",
                      ("step", "loss", "valid_loss"), rows, pictures.curve(rows))  # fmt: skip
    told = run.training  # of an older run, it holds neither of these
    texts = [f"Validation: {told['validation']}."] if told.get("validation") else []
    texts += [
        f"No gradient ever reached {count} of the trained {type_}." for type_, count in told.get("unmoved", {}).items()
    ]
    return [Section("training", "Training", texts, [picture])]


def evaluation(run: RunFolder) -> list[Section]:
    """eval.json: the tuned model against the base model."""
    measured = {who: run.eval[who] for who in ("base", "tuned")}
    base, tuned = measured.values()
    bounds = ("accuracy_low", "accuracy_high")
    rows = [(who, m["accuracy"], *map(m.get, bounds), m["loss"], m["examples"]) for who, m in measured.items()]
    first, last = (
        f"{m['accuracy']:.3f}{f' ({said})' if (said := interval_of(m, '.3f')) else ''}" for m in measured.values()
    )
    alt = f"Bars: accuracy went from {first} to {last}, loss from {base['loss']:.3f} to {tuned['loss']:.3f}."
    known = "accuracy_low" in base
    note = f"{base['examples']} {run.judged_by} rows. Accuracy: {base['metric']}{', with 95% intervals' * known}."
    head = ("model", "accuracy", *bounds, "loss", "rows")
    picture = Picture("before_after", alt, note, head, rows, pictures.before_after(rows))
    columns = [
        Column("model"), Column("accuracy", ".4f"), Column("95% interval"), Column("loss", ".4f"),
        Column(f"{run.judged_by} rows", "d"),
    ]  # fmt: skip
    cells = [
        (who, m["accuracy"], interval_of(m, ".4f") or UNKNOWN, m["loss"], m["examples"]) for who, m in measured.items()
    ]
    texts = [
        "There are no test rows: these are the validation rows, which also chose the training step that was kept. So they "
        "flatter the tuned model."
    ]
    table = Table("Before and after training", columns, cells)
    return [Section("eval", "Before and after", texts * (run.judged_by == "validation"), [picture], [table])]


def trial(run: RunFolder) -> list[Section]:
    """trial.json: the placements compared, and what they forgot."""
    found, level = run.trial, f"{100 * run.trial['confidence']:g}%"
    arms, reference = found["arms"], found["reference"]
    head = ("difference", "low", "high", "p_corrected", "verdict")
    rows = [(arm["name"], *(arm["versus"][key] for key in head)) for arm in arms if arm["versus"]]
    spoken = "; ".join(f"{name} {d:+.3f} ({low:+.3f} to {high:+.3f}), {word}" for name, d, low, high, _, word in rows)
    texts = [
        f"{len(arms)} placements were trained with {len(found['seeds'])} seeds each, chosen by validation rows, and tested on "
        f'{found["test_rows"]} test rows. "No difference shown" does not mean that there is none: the interval says how large '
        "one could be."
    ]
    picture = Picture(
        "trial", f"Difference in accuracy to {reference}, with {level} intervals: {spoken}.",
        f"Right of the dotted line: better than {reference}. Filled squares: a difference was shown. Bars: {level} intervals.",
        ("placement", *head), rows,
        pictures.forest(rows, [row[5] for row in rows], [row[5] in ("better", "worse") for row in rows], f"accuracy minus that of {reference}"),
    )  # fmt: skip
    return [
        Section("trial", "Placements compared", texts, [picture] * bool(rows), [trial_table(found)]),
        *_forgetting(run),
    ]


def _forgetting(run: RunFolder) -> list[Section]:
    base = run.trial["base"].get("general_loss")
    if base is None:
        return []
    rows = []
    for arm in run.trial["arms"]:
        seeds = [r["general_loss"] - base for r in arm["runs"]]
        rows.append((arm["name"], arm["forgetting"], min(seeds), max(seeds), arm["general_loss"]))
    spoken = ", ".join(f"{name} {value:+.3f}" for name, value, *_ in rows)
    text = (
        f"Above 0, a model does worse than before training on general text outside the task. The base model's loss is "
        f"{base:.3f}, on {run.trial['general']['tokens']:,} tokens."
    )
    picture = Picture(
        "forgetting", f"Change of the loss on general text by training: {spoken}.", "Mean over the seeds. Bars: lowest to highest seed.",
        ("placement", "forgetting", "lowest_seed", "highest_seed", "general_loss"), rows,
        pictures.forest(rows, [f"{row[1]:+.3f}" for row in rows], [True] * len(rows), "loss on general text minus the base model's"),
    )  # fmt: skip
    return [Section("forgetting", "Forgetting", [text], [picture])]


def data(run: RunFolder) -> list[Section]:
    """data.json: the rows, how long they are, how much of them is learned, and what was left out."""
    found = run.data["splits"]
    rows = [(s["split"], first, count) for s in found for first, count in s["histogram"]]
    spoken = "; ".join(
        f"{s['split']} {s['shortest']} to {s['longest']}, half of them up to {s['percentiles']['50%']}" for s in found
    )
    picture = Picture(
        "row_lengths", f"Rows by their length in tokens: {spoken}.", "Each bar counts the rows of some lengths.",
        ("split", "tokens_from", "rows"), rows, pictures.lengths(rows),
    )  # fmt: skip
    texts = [f"{s['split']}: {note}." for s in found for note in s["notes"]]
    texts += [f"{line}." for line in run.data["overlap"]]
    texts.append(
        f"The first row, {found[0]['where']}, with what is learned in double brackets: {marked(found[0]['row'])}"
    )
    return [Section("data", "What was learned from", texts, [picture], [lengths_table(found)])]


def cost(run: RunFolder) -> Section:
    """history.jsonl: measured time and memory."""
    tokens = {
        "score": run.scores and run.scores.tokens,
        "train": run.training.get("tokens"),
        "audit": run.audit.get("scored_tokens"),
        "eval": sum(run.eval[who]["tokens"] for who in ("base", "tuned")) if run.eval else None,
    }
    rows = [(name, s["seconds"], tokens.get(name), s["peak_mib"], s["command"]) for name, s in run.stages.items()]
    if run.trial and "trial" not in run.stages:
        peak = max(arm["peak_mib"] for arm in run.trial["arms"])
        rows.append(("trial", run.trial["seconds"], None, peak, run.noted("trial")))
    columns = [Column("stage"), Column("seconds", ".1f"), Column("tokens", ",d"), Column("peak MiB", ".0f")]
    table = Table("Measured time and memory", [*columns, Column("command")], rows)
    missing = [] if rows else ["history.jsonl is missing: no time was noted."]
    return Section("cost", "Time and memory used", missing, tables=[table] * bool(rows))


def made(run: RunFolder, missing: list[tuple[str, str]]) -> Section:
    """config.json: data, versions and settings; and `missing`, what would add to the page with its command."""
    facts = _facts(run.config)
    facts += [(f"trial, {what}", value) for what, value in _facts(run.trial) if (what, value) not in facts]
    settings = run.config.get("settings", {})
    seeds = [f"trial, {', '.join(map(str, run.trial['seeds']))}"] if run.trial else []
    facts += [
        ("seeds", "; ".join([str(settings.get("seed", UNKNOWN)), *seeds])),
        ("settings", ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None) or UNKNOWN),
        ("this page", run.command("report --overwrite")),
    ]
    tables = [Table("Data, versions and settings", [Column("what"), Column("value")], facts)]
    if missing:
        tables.append(Table("Not on this page yet", [Column("what"), Column("command that makes it")], missing))
    return Section("made", "How this was made, and what is known", [KNOWN], tables=tables)


def _facts(source: dict[str, Any]) -> list[tuple[str, str]]:
    data = source.get("data", {}) | ({"general text": source["general"]} if "general" in source else {})
    facts = [
        (f"data: {split}", f"{d['file']}, sha256 {d['sha256']}")
        for split, of in data.items()
        for d in (of if isinstance(of, list) else [of])  # a split may have several files
    ]
    if "versions" in source:
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in source["versions"].items())))
    if "machine" in source:
        facts.append(("machine", source["machine"]))
    return facts


@dataclass(frozen=True)
class Source:
    """A file that makes sections: how, what it adds to the page, and the stage that writes it."""

    file: str
    sections: Callable[[RunFolder], list[Section]]
    adds: str
    stage: str


SOURCES = (
    Source("scores.json", scores, "NFN by module type and layer", "score"),
    Source("placement.json", lambda run: [], "which modules get adapters, and their rank", "place"),
    Source("trial.json", trial, "a trial of several placements, and forgetting", "trial"),
    Source("eval.json", evaluation, "the tuned model compared with the base model", "eval"),
    Source("audit.json", audit, "stability, controls and other criteria", "audit"),
    Source("estimate.json", estimate, "memory and FLOPs compared with full fine-tuning", "estimate"),
    Source("data.json", data, "the rows, their lengths and what is learned of them", "data"),
    Source("metrics.jsonl", training, "the training curve", "train"),
)
