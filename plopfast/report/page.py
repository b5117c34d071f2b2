"""One self-contained HTML page, and its pictures as PNG and CSV, from the files of a run folder alone.

Each section is there if its file is; the page names the commands that make those missing. What it says is what the files
hold: a choice that the prompts do not settle, or placements between which a trial shows no difference, are called so.
"""

import base64
from pathlib import Path
from typing import Any

from ..placing.rules import RULES, nfn_rule
from ..support import files
from ..support.errors import ConfigError, FileError
from .sections import SECTIONS, RunFolder, cost, end_of, listed, made, points_of, range_of, ties_of

try:
    import jinja2
except ImportError as error:
    raise ConfigError(f"the report needs matplotlib and jinja2 ({error}): pip install 'plopfast[report]'") from error

TEMPLATE = Path(__file__).with_name("page.html.j2")
PICTURES = "report"  # the folder of PNG and CSV files


def write_report(folder: str | Path) -> Path:
    """Writes report.html into a run folder, and its pictures as PNG and CSV into the folder `report` there.

    Raises FileError where the folder holds nothing that it shows, and for a file that is damaged or lacks what its section
    shows.
    """
    run = RunFolder(Path(folder))
    sections, missing = [], []
    for make, name, what, stage in SECTIONS:
        if not (run.path / name).exists():
            missing.append((what, run.command(stage)))
            continue
        try:
            found = make(run)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(
                f"{run.path / name}: not what plopfast {stage} writes ({type(error).__name__}: {error}); make it anew with "
                f"plopfast {stage} --overwrite"
            ) from error
        sections += found
    if len(missing) == len(SECTIONS):
        raise FileError(
            f"{run.path / 'scores.json'}: no such file, nor another to report; it is written by plopfast score"
        )
    sections += [cost(run), made(run, missing)]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        model=(run.scores.model if run.scores else "") or run.config.get("model") or "the model",
        lead=_recommendation(run), figures=_figures(run), sections=sections,
    )  # fmt: skip
    with files.replacing(run.path / PICTURES) as scratch:
        scratch.mkdir()
        for picture in (picture for section in sections for picture in section.pictures):
            picture.save(scratch)
    target = run.path / "report.html"
    files.write_text(target, page)
    return target


def _recommendation(run: RunFolder) -> str:
    """The sentence that the page begins with."""
    trial = run.trial
    better, equal, worse = (_arms(trial, verdict) for verdict in ("better", "no difference shown", "worse"))
    matched = [arm for arm in better if arm["types"]]  # `full` trains all weights, which is no placement
    if matched:
        best = max(matched, key=lambda arm: arm["versus"]["difference"])
        return (
            f"Use the placement {best['name']} ({listed(best['types'])}): in the trial it did better than {trial['reference']} "
            f"by {points_of(best['versus'])} points of accuracy, at {100 * trial['confidence']:g}% confidence."
        )
    for arm in worse:
        first = trial["arms"][0]
        if arm["name"] == run.rule and first["types"]:
            return (
                f"Use the placement {first['name']} ({listed(first['types'])}): in the trial {arm['name']}, which this folder "
                f"holds, lay {points_of(arm['versus'])} points of accuracy from it, at {100 * trial['confidence']:g}% confidence."
            )
    found = [f"did worse than {listed([arm['name'] for arm in better])}, which trains all weights"] if better else []
    found += [f"did better than {listed([arm['name'] for arm in worse])}"] if worse else []
    found += [f"showed no difference from {listed([arm['name'] for arm in equal])}"] if equal else []
    if found:
        tried = f"; in the trial, {trial['reference']} {' and '.join(found)}"
    else:
        tried = "; whether they train better than other placements has not been tried"
    if run.types:
        return f"Put {_adapters(run)}{listed(run.types)}{_how_sure(run)}{tried}."
    if found:
        return f"In the trial, {tried.partition(', ')[2]}."
    return run.audit.get("verdict") or "Which modules should get adapters, the files of this folder do not tell."


def _adapters(run: RunFolder) -> str:
    if not run.placement:
        return "adapters on "
    ranks = range_of([rank for rank, _ in run.placement.modules.values()])
    single = "" if run.whole_types else f"{len(run.placement.modules)} single modules of "
    return (f"adapters of rank {ranks} on " if " " in ranks else f"rank-{ranks} adapters on ") + single


def _how_sure(run: RunFolder) -> str:
    decision, least = run.decision, f"they have the {end_of(run.rule)} NFN"
    if not nfn_rule(run.rule):
        ranks_by = RULES[run.rule].ranks_by if run.rule in RULES else ""
        how = f"ranks by {ranks_by}" if ranks_by else "does not ask for the scores"
        return f": so says the rule {run.rule!r}, which {how}"
    if run.scores and len(run.types) == len(run.scores.types):
        return ", which are all the module types there are"
    if decision is None:
        return f": {least}, but how sure this is, the scores do not tell"
    if decision.decided:
        others = f"{decision.prompts} prompts tell them from every other module type"
        return f": at {100 * decision.confidence:g}% confidence, {others} by their {end_of(run.rule)} NFN"
    if decision.near_ties:
        return (
            f": {least}, but the choice is not settled: at {100 * decision.confidence:g}% confidence, {decision.prompts} prompts do "
            f"not tell {ties_of(decision)}"
        )
    return f": {least}, but nothing is settled: {decision.note}"


def _figures(run: RunFolder) -> list[tuple[str, str]]:
    """The few numbers below the recommendation."""
    found = []
    if run.eval:
        base, tuned = run.eval["base"], run.eval["tuned"]
        found.append((f"Accuracy on {base['examples']} test rows", f"{base['accuracy']:.1%} → {tuned['accuracy']:.1%}"))
    if run.placement:
        found.append(("Trainable parameters", f"{run.placement.parameters:,}"))
    if run.scores:
        found.append(("Prompts scored", f"{run.scores.prompts} in {run.scores.seconds:.1f} s"))
    for row in run.estimate.get("choices", []):
        if row["name"] == run.rule:
            found.append(("Training memory, of full fine-tuning's", f"{row['memory_of_full']:.0%} (estimated)"))
    if "train" in run.stages:
        found.append(("Training time", f"{run.stages['train']['seconds']:.0f} s"))
    return found


def _arms(trial: dict[str, Any], verdict: str) -> list[dict[str, Any]]:
    return [arm for arm in trial.get("arms", []) if (arm.get("versus") or {}).get("verdict") == verdict]
