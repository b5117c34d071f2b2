"""The report: one self-contained HTML page, and its pictures as PNG and CSV, from the files of a run folder alone.

Each section is there if its file is; the page names the commands that make those that are missing. The page claims no more
than the files hold: it says so where the prompts do not settle the choice, or where a trial shows no difference.
"""

import base64
from pathlib import Path
from typing import Any

from ..placing.rules import RULES, nfn_rule
from ..support import files
from ..support.errors import ConfigError, FileError
from ..support.ledger import Ledger
from ..support.tables import DIFFERS

try:
    import jinja2
    import matplotlib  # noqa: F401  # of pictures.py
except ImportError as error:
    raise ConfigError(f"the report needs matplotlib and jinja2 ({error}): pip install 'plopfast[report]'") from error

from .folder import RunFolder
from .reinforcement import reinforcement
from .sections import SOURCES, Section, Source, cost, made
from .words import interval_of, listed, points_of, range_of, ties_of

LEARNED = Source("grpo.json", reinforcement, "what completions earned", "grpo")  # not missed where there is none
TEMPLATE = Path(__file__).with_name("page.html.j2")
PICTURES = "report"  # the folder of PNG and CSV files


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder, and its pictures as PNG and CSV into the folder `report` there.

    Returns the page's path. Raises FileError where the folder holds nothing to show, and for a file that is damaged or
    lacks what its section shows.
    """
    run = RunFolder(Path(folder))
    present = [source for source in (*SOURCES, LEARNED) if (run.path / source.file).exists()]
    missing = [(source.adds, run.command(source.stage)) for source in SOURCES if source not in present]
    if not present:
        raise FileError(
            f"{run.path / 'scores.json'}: no such file, nor another to report; it is written by plopfast score"
        )
    sections = [section for source in present for section in _sections_of(source, run)]
    sections += [cost(run), made(run, missing)]
    page = _rendered(
        model=(run.scores.model if run.scores else "") or run.config.get("model") or "the model",
        lead=_lead(run), figures=_figures(run), sections=sections,
    )  # fmt: skip
    ledger = Ledger(run.path)
    ledger.claim_once({"report.html": ()})
    with ledger.replacing(PICTURES) as scratch:
        scratch.mkdir()
        for picture in (picture for section in sections for picture in section.pictures):
            picture.save(scratch)
    target = run.path / "report.html"
    files.write_text(target, page)
    return target


def _sections_of(source: Source, run: RunFolder) -> list[Section]:
    try:
        sections = source.sections(run)
        for section in sections:
            section.command = run.noted(source.stage)
        return sections
    except (KeyError, TypeError) as error:
        raise FileError(
            f"{run.path / source.file}: not what plopfast {source.stage} writes ({type(error).__name__}: {error}); make it "
            f"anew with plopfast {source.stage} --overwrite"
        ) from error


def _rendered(**values: Any) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    environment.tests["differing"] = lambda cells: any(cell.startswith(DIFFERS) for cell in cells)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)


def _lead(run: RunFolder) -> str:
    """Return the sentences that open the page: which placement to use, and how sure that is."""
    if recommended := _shown_by_trial(run):
        return recommended
    said = _findings(run.trial)
    if run.types:
        tried = f"In the trial, {said}." if said else "No trial has compared them with other placements yet."
        return f"Put {_adapters(run)}{listed(run.types)}. {_how_sure(run)} {tried}"
    if said:
        return f"In the trial, {said}."
    return run.audit.get("verdict") or "The files of this folder do not tell which modules should get adapters."


def _shown_by_trial(run: RunFolder) -> str:
    """Recommend a placement that the trial showed to be better than the folder's or the trial's first one, if any."""
    trial = run.trial
    matched = [arm for arm in _arms(trial, "better") if arm["types"]]  # `full` trains all weights: it is no placement
    if matched:
        best = max(matched, key=lambda arm: arm["versus"]["difference"])
        use, found, by = best, f"it did better than {trial['reference']}, by", best["versus"]
    else:
        ours = [arm for arm in _arms(trial, "worse") if arm["name"] == run.rule]
        if not (ours and trial["arms"][0]["types"]):
            return ""
        use, found = trial["arms"][0], f"{run.rule}, which this folder holds, differed from it by"
        by = ours[0]["versus"]
    return (
        f"Use the placement {use['name']} ({listed(use['types'])}). In the trial {found} {points_of(by)} points of accuracy, at "
        f"{100 * trial['confidence']:g}% confidence."
    )


def _findings(trial: dict[str, Any]) -> str:
    """Say how the trial's first placement did against the others; nothing without a trial."""
    better, equal, worse = (
        [arm["name"] for arm in _arms(trial, verdict)] for verdict in ("better", "no difference shown", "worse")
    )
    found = [f"did worse than {listed(better)}, which trains all weights"] if better else []
    found += [f"did better than {listed(worse)}"] if worse else []
    found += [f"showed no difference from {listed(equal)}"] if equal else []
    return f"{trial['reference']} {' and '.join(found)}" if found else ""


def _arms(trial: dict[str, Any], verdict: str) -> list[dict[str, Any]]:
    return [arm for arm in trial.get("arms", []) if (arm.get("versus") or {}).get("verdict") == verdict]


def _adapters(run: RunFolder) -> str:
    if not run.placement:
        return "adapters on "
    ranks = range_of([rank for rank, _ in run.placement.modules.values()])
    single = "" if run.whole_types else f"{len(run.placement.modules)} single modules of "
    return (f"adapters of rank {ranks} on " if " " in ranks else f"rank-{ranks} adapters on ") + single


def _how_sure(run: RunFolder) -> str:
    """Say in a sentence why these types were chosen, and how sure that is."""
    decision, rule = run.decision, nfn_rule(run.rule)
    if rule is None:
        ranks_by = RULES[run.rule].ranks_by if run.rule in RULES else ""
        return f"The rule {run.rule!r} chose them {f'by {ranks_by}' if ranks_by else 'without the scores'}."
    least = f"They have the {'highest' if rule.highest else 'lowest'} NFN"
    if run.scores and len(run.types) == len(run.scores.types):
        return "These are all the module types there are."
    if decision is None:
        return f"{least}, but the scores do not say how sure this is."
    level = f"{100 * decision.confidence:g}%"
    if decision.decided:
        return (
            f"Their scores are {'higher' if rule.highest else 'lower'} than every other module type's, and {decision.prompts} prompts were enough to be {level} "
            "sure."
        )
    if decision.near_ties:
        return f"{least}, but this is not settled: at {level} confidence, {decision.prompts} prompts do not tell {ties_of(decision)}."
    return f"{least}, but nothing is settled: {decision.note}."


def _figures(run: RunFolder) -> list[tuple[str, str]]:
    """Return the few numbers below the opening sentences, each with its title."""
    found = []
    if run.eval:
        base, tuned = run.eval["base"], run.eval["tuned"]
        bounds = interval_of(tuned, ".1%")
        after = f"{tuned['accuracy']:.1%}{f' ({bounds})' if bounds else ''}"
        found.append((f"Accuracy on {base['examples']} {run.judged_by} rows", f"{base['accuracy']:.1%} → {after}"))
    if "mean_before" in run.grpo:
        before, after = run.grpo["mean_before"], run.grpo["mean_after"]
        found.append((f"Reward of {run.grpo['test_prompts']} test prompts", f"{before:.3f} → {after:.3f}"))
    if run.placement:
        found.append(("Trained parameters", f"{run.placement.parameters:,}"))
    if run.scores:
        found.append(("Prompts scored", f"{run.scores.prompts} in {run.scores.seconds:.1f} s"))
    for row in run.estimate.get("choices", []):
        if row["name"] == run.rule:
            found.append(("Memory, compared with full fine-tuning", f"{row['memory_of_full']:.0%} (estimated)"))
    if "train" in run.stages:
        found.append(("Training time", f"{run.stages['train']['seconds']:.0f} s"))
    return found
