"""What a run says at its end: what was chosen and how sure, what it brought, where it lies, and what to do next."""

import shlex

from ..lora.placement import Placement
from ..report import kinds
from ..scoring.report import NFNReport
from ..support.tables import Column, Table
from .evaluating import ROWS, eval_lines, sample_lines
from .run import Run


def summary(run: Run) -> str:
    """The result of a run in a few lines, from the files of its folder."""
    rows = [("adapters", "all weights trained")] if run.config.full else _placed(run)
    tested = kinds.read(run.file("eval"), "plopfast eval")
    stages = {name: stage for name, stage in run.at.ledger.done().items() if name not in ("run", "report")}
    rows += [*eval_lines(tested), *sample_lines(tested)]
    rows.append(("seconds", ", ".join(f"{name} {stage['seconds']:.1f}" for name, stage in stages.items())))
    return str(Table("", [Column(""), Column("")], [*rows, *_written(run), *_next(run)]))


def _placed(run: Run) -> list[tuple[str, str]]:
    scores, placement = NFNReport.load(run.file("score")), Placement.load(run.file("place"))
    chosen = ", ".join(f"{t} {scores.types[t]:.3f}" for t in placement.types if t in scores.types)
    rows = [("adapters", f"{chosen} (NFN; {placement.rule}), {placement.parameters:,} parameters")]
    if scores.decision and {*scores.decision.types} == {*placement.types}:
        rows.append(("how sure", scores.decision.note))
    return rows


def _written(run: Run) -> list[tuple[str, str]]:
    folder = run.folder
    result = run.file("train").name
    names = ["adapter/ (for PEFT)" if result == "adapter" else f"{result}/", ROWS, "scores.json", "metrics.jsonl"]
    if run.file("report").exists():
        names.insert(0, "report.html (open it in a browser)")
    return [("written", f"{folder}: {', '.join(names)} and more")]


def _next(run: Run) -> list[tuple[str, str]]:
    out = shlex.quote(str(run.folder))
    commands = [(f"plopfast generate --out {out} --prompt TEXT", "ask it")]
    if not run.config.full:
        commands += [
            (f"plopfast trial --out {out}", "would another placement do better?"),
            (f"plopfast place --out {out} --print-peft", "this placement for PEFT, TRL, Axolotl and Unsloth"),
        ]
    width = max(len(command) for command, _ in commands)
    return [("next" if not i else "", f"{command:<{width}}  {what}") for i, (command, what) in enumerate(commands)]
