"""What the report says of each file of a run folder: sections of plain sentences, pictures and tables."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..lora.placement import Placement
from ..placing.rules import nfn_rule
from ..scoring.report import NFNReport
from ..scoring.stopping import Decision
from ..support import files
from . import pictures
from .pictures import Picture

UNKNOWN = "-"
DIFFERS = "≠ "  # begins a cell that disagrees; its row stands out
UNSTABLE = 0.95  # below this share of equal picks a row of the stability table is marked
PARTS = ("weights_mib", "adapters_mib", "activations_mib", "logits_mib")
KNOWN = (
    "What is known of such placements (Hayou, Ghosh and Yu, arXiv 2506.20629): in the authors' experiments the lowest NFN was "
    "about as good as adapting all MLP modules or all modules, with fewer parameters, and better than adapting query, key "
    "and value alone; not significantly better than the MLP modules."
)


@dataclass
class Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def marked(self, row: Sequence[Any]) -> bool:
        return any(str(cell).startswith(DIFFERS) for cell in row)


@dataclass
class Section:
    id: str
    title: str
    texts: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    command: str = ""


class RunFolder:
    """A run folder's files as they are shown; what is not there is None or empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        scores, placement = path / "scores.json", path / "placement.json"
        self.scores = NFNReport.load(scores) if scores.exists() else None
        self.intervals = files.read_json(scores, "plopfast score").get("intervals", {}) if self.scores else {}
        self.placement = Placement.load(placement) if placement.exists() else None
        self.config, self.stages, self.training, self.eval, self.audit, self.estimate, self.trial = (
            files.read_json(path / f"{name}.json", f"plopfast {name}") if (path / f"{name}.json").exists() else {}
            for name in ("config", "stages", "training", "eval", "audit", "estimate", "trial")
        )
        metrics = path / "metrics.jsonl"
        self.metrics = files.read_json_lines(metrics, "plopfast train") if metrics.exists() else []

    def noted(self, stage: str) -> str:
        """The command line that was noted for a stage, if any."""
        return (self.trial if stage == "trial" else self.stages.get(stage, {})).get("command", "")

    def command(self, stage: str) -> str:
        """The command line that runs a stage; the settings are the folder's."""
        return f"plopfast {stage} --out {shlex.quote(str(self.path))}"

    @property
    def rule(self) -> str:
        """The placement's rule, or that of the scores' own choice where no placement is kept."""
        return self.placement.rule if self.placement else self.decision.rule if self.decision else ""

    @property
    def types(self) -> list[str]:
        return self.placement.types if self.placement else self.decision.types if self.decision else []

    @property
    def whole_types(self) -> bool:
        """Whether all modules of the placement's types get adapters, as far as is known."""
        if not (self.scores and self.placement):
            return True
        types = self.placement.types
        named = {name for name, s in self.scores.scores.items() if s.layer is not None and s.type in types}
        return named == self.placement.modules.keys()

    @property
    def decision(self) -> Decision | None:
        """How sure the types are, where a rule chose whole types by their scores."""
        kept = self.scores.decision if self.scores else None
        if not (self.scores and self.placement):
            return kept
        name, types = self.placement.rule, self.placement.types
        rule = nfn_rule(name)
        if rule is None or not self.whole_types:
            return None
        found = None
        if kept and kept.rule == name and set(kept.types) == set(types):
            found = kept
        elif self.scores.prompt_stats is not None:
            found = self.scores.decide(len(types), self.intervals.get("confidence", 0.95), rule.highest)
        return found if found and set(found.types) == set(types) else None


def _scores(run: RunFolder) -> list[Section]:
    assert run.scores, "SECTIONS asks for the file"
    return [_choice(run, run.scores), _layers(run, run.scores)]


def _choice(run: RunFolder, scores: NFNReport) -> Section:
    placement, chosen, known = run.placement, run.types, run.intervals
    rows = [
        (name, nfn, *known.get("types", {}).get(name, (None, None)), name in chosen)
        for name, nfn in scores.types.items()
    ]
    why = known.get("why", "" if known else "these scores were made before intervals were kept")
    what = f"{100 * known['confidence']:g}% interval over prompts" if "types" in known else "no interval"
    spoken = ", ".join(
        f"{name} {nfn:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})") + (" chosen" if yes else "")
        for name, nfn, low, high, yes in rows
    )
    note = "Squares are chosen, circles are not. " + ("Bars: " + what + "." if not why else "No intervals are known.")
    texts = [f"No interval is possible: {why}."] if why else []
    if placement:
        ranks, count = range_of([rank for rank, _ in placement.modules.values()]), len(placement.modules)
        texts.insert(0, f"Rule {run.rule!r}: {count} modules, rank {ranks}, {placement.parameters:,} parameters.")
    else:
        would = f"; squares are what the rule {run.rule!r} chooses" if run.rule else ""
        texts.insert(0, f"No placement is kept here{would}.")
    if decision := run.decision:
        texts.append(
            f"The choice is {decision.note}."
            if decision.note.startswith(("decided", "not decided"))
            else f"On the choice: {decision.note}."
        )
        texts += [
            f"Near-ties at {100 * decision.confidence:g}% confidence: these prompts do not tell {ties_of(decision, 99)}."
        ] * bool(decision.near_ties)
    elif nfn_rule(run.rule):
        texts.append("How sure the choice is, these scores do not tell.")
    if placement:
        texts += [note for note in placement.notes if not run.decision or run.decision.note not in note]
    texts.append(
        "NFN compares a module's response to its real inputs with its response to random inputs of the same length; 1 is a "
        "random input."
    )
    if not run.trial:
        texts.append(
            f"Whether this placement trains better than another on this data, only a trial shows: {run.command('trial')}."
        )
    layers: dict[str, int] = {}
    for score in scores.scores.values():
        layers[score.type] = layers.get(score.type, 0) + 1
    table = [
        (name, f"{nfn:.4f}", _n(low, ".4f"), _n(high, ".4f"), layers[name], "yes" if yes else "no")
        for name, nfn, low, high, yes in rows
    ]
    return Section(
        "choice", "Which modules, and how sure",
        texts,
        [Picture("nfn_by_type", f"NFN of each module type, lowest first, {what}: {spoken}.", note,
                 ("type", "nfn", "low", "high", "chosen"), rows, pictures.by_type(rows))],
        [Table("NFN by module type", ("module type", "NFN", "low", "high", "modules", "chosen"), table)],
        run.noted("score"),
    )  # fmt: skip


def _layers(run: RunFolder, scores: NFNReport) -> Section:
    z, outliers = scores.z_scores(), set(scores.outliers())
    order = list(scores.types)
    rows = sorted(
        (
            (name, s.type, s.layer, s.nfn, z[name], name in outliers)
            for name, s in scores.scores.items()
            if s.layer is not None
        ),
        key=lambda row: (order.index(row[1]), row[2]),
    )
    low, high = min(rows, key=lambda row: row[3]), max(rows, key=lambda row: row[3])
    odd = {type_: [str(row[2]) for row in rows if row[1] == type_ and row[5]] for type_ in order}
    spoken = "; ".join(f"{type_} in layer {', '.join(found)}" for type_, found in odd.items() if found) or "none"
    alt = (
        f"Heat map of NFN, {len({row[2] for row in rows})} layers across and {len(order)} module types down, from {low[3]:.2f} "
        f"({low[1]}, layer {low[2]}) to {high[3]:.2f} ({high[1]}, layer {high[2]}). Outliers: {spoken}."
    )
    return Section(
        "layers", "Layer by layer",
        [f"Outliers, more than 3.5 robust standard deviations off their type's median: {spoken}."],
        [Picture("nfn_by_layer", alt, "Lighter is higher.", ("module", "type", "layer", "nfn", "z", "outlier"), rows,
                 pictures.heat_map(rows))],
        command=run.noted("score"),
    )  # fmt: skip


def _audit(run: RunFolder) -> list[Section]:
    audit, types = run.audit, list(run.audit["types"])

    def picked(row: dict[str, Any]) -> str:
        same = set(row["pick"]) == set(audit["pick"]) or row.get("what") == "random weights"  # whose pick is chance
        return ("" if same else DIFFERS) + ", ".join(row["pick"])

    def ranked(caption: str, rows: list[dict[str, Any]]) -> list[Table]:
        made = [(r["what"], picked(r), f"{r['tau']:.2f}", *(f"{r['types'][t]:.3f}" for t in types)) for r in rows]
        return [Table(f"{caption} (≠: another pick)", ("scored", "picks", "tau", *types), made)] if rows else []

    def stability(row: dict[str, Any]) -> tuple[Any, ...]:
        mark = DIFFERS if row["same_pick"] < UNSTABLE else ""
        return (
            row["what"],
            row["repeats"],
            f"{row['tau']:.2f}",
            f"{row['tau_low']:.2f}",
            f"{mark}{row['same_pick']:.0%}",
        )

    criteria = [
        (r["name"], picked(r), r["chooses"], f"{r['tau']:.2f}", f"{r['seconds']:.2f}", f"{r['cost']:.1f} x",
         f"{r['extra_mib']:.0f}", r["needs"], r["source"])
        for r in audit["criteria"]
    ]  # fmt: skip
    tables = [
        Table("Criteria side by side (≠: another pick than NFN's)",
              ("criterion", "picks", "chooses the", "tau", "seconds", "cost of NFN", "extra MiB", "needs", "source"), criteria),
        *ranked("Controls; with random weights, all should be near 1 and the pick is chance", audit["controls"]),
        *([Table(f"Stability (≠: fewer than {UNSTABLE:.0%} pick the same)",
                 ("scored", "repeats", "mean tau", "lowest tau", "same pick"), [stability(r) for r in audit["stability"]])]
          if audit["stability"] else []),
        *ranked("Other tokens", audit["tokens"]),
    ]  # fmt: skip
    texts = [
        audit["verdict"],
        f"Everything is compared with the NFN of {audit['prompts']} prompts, which picks {listed(audit['pick'])}. Tau is Kendall's: "
        "1 for the same order of the module types, -1 for the opposite one. Subsets are of these prompts, and other samples can "
        "share some with them, so that part of their agreement is built in.",
        *(f"Left out: {row['kind']}, {row['what']}: {row['why']}." for row in audit.get("missing", [])),
    ]
    return [Section("audit", "Can the scores be trusted?", texts, tables=tables, command=run.noted("audit"))]


def _estimate(run: RunFolder) -> list[Section]:
    found = run.estimate
    rows = [(c["name"], c["total_mib"], *(c[key] for key in PARTS)) for c in found["choices"]]
    spoken = ", ".join(f"{c['name']} {c['total_mib']:,.0f} MiB" for c in found["choices"])
    table = [
        (c["name"], f"{c['parameters']:,}", f"{c['total_mib']:,.0f}", f"{c['memory_of_full']:.0%}", f"{c['tflops_per_step']:.3g}",
         f"{c['flops_of_full']:.0%}", *(f"{c[key]:,.1f}" for key in PARTS), ", ".join(c["types"]) or "all weights")
        for c in found["choices"]
    ]  # fmt: skip
    text = (
        f"Estimated before training, for {found['batch_tokens']} tokens a step in {found['dtype']} on {found['device']}. The parts need not "
        "be in memory at one time, so that they can sum to more than the peak."
    )
    note = "Estimates of the peak, not measurements; hatched: full fine-tuning."
    return [Section(
        "estimate", "What training would take", [text],
        [Picture("memory", f"Estimated training memory of each placement: {spoken}.", note, ("placement", "total_mib", *PARTS), rows,
                 pictures.memory(rows))],
        [Table("Memory and FLOPs of training, against full fine-tuning",
               ("placement", "parameters", "MiB", "of full", "TFLOPs a step", "of full",
                *(f"{key.removesuffix('_mib')} MiB" for key in PARTS), "module types"), table)],
        run.noted("estimate"),
    )]  # fmt: skip


def _training(run: RunFolder) -> list[Section]:
    steps: dict[int, dict[str, Any]] = {}
    for metric in run.metrics:
        steps.setdefault(metric["step"], {}).update(metric)
    rows = [(step, steps[step].get("loss"), steps[step].get("valid_loss")) for step in sorted(steps)]
    lines = {
        name: [row[at] for row in rows if row[at] is not None] for at, name in ((1, "training"), (2, "validation"))
    }
    spoken = "; ".join(f"{name} from {line[0]:.3f} to {line[-1]:.3f}" for name, line in lines.items() if line)
    if not spoken:
        return []
    picture = Picture("training", f"Loss over {rows[-1][0]} training steps: {spoken}.", "Nats per label token.",
                      ("step", "loss", "valid_loss"), rows, pictures.curve(rows))  # fmt: skip
    return [Section("training", "Training", pictures=[picture], command=run.noted("train"))]


def _eval(run: RunFolder) -> list[Section]:
    base, tuned = run.eval["base"], run.eval["tuned"]
    rows = [(who, m["accuracy"], m["loss"], m["examples"]) for who, m in run.eval.items()]
    alt = (
        f"Bars: accuracy went from {base['accuracy']:.3f} to {tuned['accuracy']:.3f}, loss from {base['loss']:.3f} to "
        f"{tuned['loss']:.3f}."
    )
    note = f"{base['examples']} held-out rows; accuracy: {base['metric']}."
    picture = Picture(
        "before_after", alt, note, ("model", "accuracy", "loss", "rows"), rows, pictures.before_after(rows)
    )
    table = Table("Before and after", ("model", "accuracy", "loss", "rows"), [(w, f"{a:.4f}", f"{x:.4f}", n) for w, a, x, n in rows])  # fmt: skip
    return [Section("eval", "Before and after", [], [picture], [table], run.noted("eval"))]


def _trial(run: RunFolder) -> list[Section]:
    trial, level = run.trial, f"{100 * run.trial['confidence']:g}%"
    arms, reference = trial["arms"], trial["reference"]
    rows = [
        (arm["name"], v["difference"], v["low"], v["high"], v["p_corrected"], v["verdict"])
        for arm in arms
        if (v := arm["versus"])
    ]
    spoken = "; ".join(f"{name} {d:+.3f} ({low:+.3f} to {high:+.3f}), {word}" for name, d, low, high, _, word in rows)
    table = [
        (arm["name"], f"{arm['accuracy']:.3f} ({arm['accuracy_low']:.3f} to {arm['accuracy_high']:.3f})", f"{arm['loss']:.3f}",
         points_of(arm["versus"]) if arm["versus"] else UNKNOWN, _n(arm["versus"] and arm["versus"]["p_corrected"], ".3f"),
         arm["versus"]["verdict"] if arm["versus"] else "reference", f"{arm['parameters']:,}",
         range_of([r for r in (arm["rank_low"], arm["rank_high"]) if r is not None]), f"{arm['lr']:g}", f"{arm['seconds']:.0f}",
         f"{arm['peak_mib']:.0f}", ", ".join(arm["types"]) or "all weights")
        for arm in arms
    ]  # fmt: skip
    texts = [
        f"{len(arms)} placements, {len(trial['seeds'])} seeds each, judged on {trial['test_rows']} test rows after selection on the "
        f'validation rows. Test: {trial["test"]}. "No difference shown" does not mean that there is none: the interval says how '
        "large one could be."
    ]
    picture = Picture(
        "trial", f"Difference in accuracy to {reference}, with {level} intervals: {spoken}.",
        f"Right of the dotted line: better than {reference}. Filled squares: a difference was shown. Bars: {level} intervals.",
        ("placement", "difference", "low", "high", "p_corrected", "verdict"), rows,
        pictures.forest(rows, [row[5] for row in rows], [row[5] in ("better", "worse") for row in rows], f"accuracy minus that of {reference}"),
    )  # fmt: skip
    head = ("placement", f"accuracy ({level})", "loss", f"points to {reference}", "p, corrected", "verdict", "parameters", "rank",
            "learning rate", "seconds", "peak MiB", "module types")  # fmt: skip
    command = run.noted("trial")
    return [
        Section("trial", "Trial", texts, [picture] * bool(rows), [Table("Trial", head, table)], command),
        *_forgetting(run, command),
    ]


def _forgetting(run: RunFolder, command: str) -> list[Section]:
    base = run.trial["base"].get("general_loss")
    if base is None:
        return []
    rows = []
    for arm in run.trial["arms"]:
        seeds = [r["general_loss"] - base for r in arm["runs"]]
        rows.append((arm["name"], arm["forgetting"], min(seeds), max(seeds), arm["general_loss"]))
    spoken = ", ".join(f"{name} {value:+.3f}" for name, value, *_ in rows)
    general = run.trial["general"]
    text = f"Loss on {general['tokens']:,} tokens of general text outside the task; the base model has {base:.3f}. Above 0: worse than before training."
    picture = Picture(
        "forgetting", f"Change of the loss on general text by training: {spoken}.", "Mean over the seeds; bars: lowest to highest seed.",
        ("placement", "forgetting", "lowest_seed", "highest_seed", "general_loss"), rows,
        pictures.forest(rows, [f"{row[1]:+.3f}" for row in rows], [True] * len(rows), "loss on general text minus the base model's"),
    )  # fmt: skip
    return [Section("forgetting", "Forgetting", [text], [picture], command=command)]


def cost(run: RunFolder) -> Section:
    tokens = {
        "score": run.scores and run.scores.tokens,
        "train": run.training.get("tokens"),
        "audit": run.audit.get("scored_tokens"),
    }
    tokens["eval"] = sum(m["tokens"] for m in run.eval.values()) if run.eval else None
    rows = [
        (name, f"{s['seconds']:.1f}", _n(tokens.get(name), ","), f"{s['peak_mib']:.0f}", s["command"])
        for name, s in run.stages.items()
    ]
    if run.trial and "trial" not in run.stages:
        peak = max(arm["peak_mib"] for arm in run.trial["arms"])
        rows.append(("trial", f"{run.trial['seconds']:.1f}", UNKNOWN, f"{peak:.0f}", run.noted("trial")))
    table = Table("Measured time and memory", ("stage", "seconds", "tokens", "peak MiB", "command"), rows)
    return Section(
        "cost",
        "What it took",
        [] if rows else ["Nothing was noted (stages.json is missing)."],
        tables=[table] * bool(rows),
    )


def made(run: RunFolder, missing: list[tuple[str, str]]) -> Section:
    facts = _facts(run.config)
    facts += [(f"trial, {what}", value) for what, value in _facts(run.trial) if (what, value) not in facts]
    settings = run.config.get("settings", {})
    seeds = [f"trial, {', '.join(map(str, run.trial['seeds']))}"] if run.trial else []
    facts += [
        ("seeds", "; ".join([str(settings.get("seed", UNKNOWN)), *seeds])),
        ("settings", ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None) or UNKNOWN),
        ("this page", f"plopfast report --overwrite --out {shlex.quote(str(run.path))}"),
    ]
    tables = [Table("Data, versions and settings", ("what", "value"), facts)]
    if missing:
        tables.append(Table("Not on this page yet", ("what", "command that makes it"), missing))
    return Section("made", "How this was made, and what is known", [KNOWN], tables=tables)


def _facts(source: dict[str, Any]) -> list[tuple[str, str]]:
    data = source.get("data", {}) | ({"general text": source["general"]} if "general" in source else {})
    facts = [(f"data: {split}", f"{d['file']}, sha256 {d['sha256']}") for split, d in data.items()]
    if "versions" in source:
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in source["versions"].items())))
    if "machine" in source:
        facts.append(("machine", source["machine"]))
    return facts


def ties_of(decision: Decision, limit: int = 3) -> str:
    pairs = [f"{chosen} from {other}" for chosen, other in decision.near_ties]
    return listed(pairs[:limit]) + (f" (and {len(pairs) - limit} more pairs)" if len(pairs) > limit else "")


def end_of(rule: str) -> str:
    entry = nfn_rule(rule)
    return "highest" if entry and entry.highest else "lowest"


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "all weights"


def points_of(versus: dict[str, Any]) -> str:
    difference, low, high = (100 * versus[key] for key in ("difference", "low", "high"))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def range_of(values: Sequence[int]) -> str:
    return (
        UNKNOWN if not values else str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"
    )


def _n(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


SECTIONS: tuple[tuple[Callable[[RunFolder], list[Section]], str, str, str], ...] = (
    (_scores, "scores.json", "NFN by module type and layer", "score"),
    (lambda run: [], "placement.json", "which modules get adapters, and their rank", "place"),
    (_trial, "trial.json", "a trial of several placements, and forgetting", "trial"),
    (_eval, "eval.json", "the tuned model against the base model", "eval"),
    (_audit, "audit.json", "stability, controls and other criteria", "audit"),
    (_estimate, "estimate.json", "memory and FLOPs against full fine-tuning", "estimate"),
    (_training, "metrics.jsonl", "the training curve", "train"),
)
