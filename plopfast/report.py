"""One self-contained HTML page, and its pictures as PNG and CSV, from the files of a run folder alone.

Each section is there if its file is; the page names the commands that make those missing. What it says is what the files
hold: a choice that the prompts do not settle, or placements between which a trial shows no difference, are called so.
"""

import base64
from pathlib import Path
from typing import Any

from . import files
from .errors import ConfigError, FileError
from .sections import SECTIONS, RunFolder, choice, cost, end_of, layers, listed, made, points_of, ties_of

try:
    import jinja2
except ImportError as error:
    raise ConfigError(f"the report needs matplotlib and jinja2 ({error}): pip install 'plopfast[report]'") from error

TEMPLATE = Path(__file__).with_name("report.html.j2")
PICTURES = "report"  # the folder of PNG and CSV files


def write_report(folder: str | Path) -> Path:
    """Writes report.html into a run folder, and its pictures as PNG and CSV into the folder `report` there.

    Raises FileError where scores.json or placement.json is missing (naming the command that makes it), and for a file that
    is damaged or lacks what its section shows.
    """
    run = RunFolder(Path(folder))
    sections, missing = [choice(run), layers(run)], []
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
        sections += [section for section in found if section]
    sections += [cost(run), made(run, missing)]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        model=run.scores.model or run.config.get("model") or "the model",
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
    placement, decision, trial = run.placement, run.decision, run.trial
    better, equal, worse = (_arms(trial, verdict) for verdict in ("better", "no difference shown", "worse"))
    if better:
        best = max(better, key=lambda arm: arm["versus"]["difference"])
        return (
            f"Use the placement {best['name']} ({listed(best['types'])}): in the trial it did better than {trial['reference']} "
            f"by {points_of(best['versus'])} points of accuracy, at {trial['confidence']:.0%} confidence."
        )
    where = "" if run.whole_types else f"{len(placement.modules)} single modules of "
    said = f"Put the adapters on {where}{listed(placement.types)}: "
    if placement.rule not in ("plop", "plop-inverse"):
        said += f"so says the rule {placement.rule!r}, which does not ask for the scores"
    elif decision is None:
        said += f"they have the {end_of(placement.rule)} NFN, but how sure this is, the scores do not tell"
    elif decision.decided:
        others = f"{decision.prompts} prompts tell them from every other module type"
        said += f"at {decision.confidence:.0%} confidence, {others} by their {end_of(placement.rule)} NFN"
        if len(placement.types) == len(run.scores.types):
            said = said.partition(": ")[0] + ", which are all the module types there are"
    elif decision.near_ties:
        said += (
            f"they have the {end_of(placement.rule)} NFN, but the choice is not settled: at {decision.confidence:.0%} confidence, "
            f"{decision.prompts} prompts do not tell {ties_of(decision)}"
        )
    else:
        said += f"they have the {end_of(placement.rule)} NFN, but nothing is settled: {decision.note}"
    found = [f"did better than {listed([arm['name'] for arm in worse])}"] if worse else []
    found += [f"showed no difference from {listed([arm['name'] for arm in equal])}"] if equal else []
    if found:
        said += f"; in the trial, {trial['reference']} {' and '.join(found)}"
    if not trial:
        said += "; whether they train better than other placements has not been tried"
    return said + "."


def _figures(run: RunFolder) -> list[tuple[str, str]]:
    """The few numbers below the recommendation."""
    found = [("Trainable parameters", f"{run.placement.parameters:,}")]
    if run.eval:
        base, tuned = run.eval["base"], run.eval["tuned"]
        found.insert(
            0, (f"Accuracy on {base['examples']} test rows", f"{base['accuracy']:.1%} → {tuned['accuracy']:.1%}")
        )
    found.append(("Prompts scored", f"{run.scores.prompts} in {run.scores.seconds:.1f} s"))
    for row in run.estimate.get("choices", []):
        if row["name"] == run.placement.rule:
            found.append(("Training memory, of full fine-tuning's", f"{row['memory_of_full']:.0%} (estimated)"))
    if "train" in run.stages:
        found.append(("Training time", f"{run.stages['train']['seconds']:.0f} s"))
    return found


def _arms(trial: dict[str, Any], verdict: str) -> list[dict[str, Any]]:
    return [arm for arm in trial.get("arms", []) if (arm.get("versus") or {}).get("verdict") == verdict]
