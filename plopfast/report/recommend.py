"""Which placement the files of a run folder speak for, and how sure that is, in sentences.

They claim no more than the files hold: they say where the prompts do not settle the choice, and where a trial shows no
difference. Without a trial, they cite plopfast's own study.
"""

from typing import Any

from ..placing.rules import RULES, nfn_rule
from .folder import RunFolder
from .studied import what_the_study_found
from .words import listed, points_of, range_of, ties_of


def recommendation(run: RunFolder) -> str:
    """Return the sentences on the placement to use, and how sure that is."""
    if recommended := shown_by_trial(run):
        return recommended
    said = findings(run.trial)
    if run.types:
        tried = f"In the trial, {said}." if said else _untried(run)
        return f"Put {adapters(run)}{listed(run.types)}. {how_sure(run)} {tried}"
    if said:
        return f"In the trial, {said}."
    return run.audit.get("verdict") or "The files of this folder do not tell which modules should get adapters."


def placed(run: RunFolder) -> str:
    """Return the recommendation; of adapters that were trained already, where they are."""
    if not (run.training and run.types) or shown_by_trial(run):
        return recommendation(run)
    where = adapters(run)
    return recommendation(run).replace(
        f"Put {where}", f"{where[:1].upper()}{where[1:].replace(' on ', ' went on ', 1)}", 1
    )


def shown_by_trial(run: RunFolder) -> str:
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


def findings(trial: dict[str, Any]) -> str:
    """Say how the trial's first placement did against the others; nothing without a trial."""
    better, equal, worse = (
        [arm["name"] for arm in _arms(trial, verdict)] for verdict in ("better", "no difference shown", "worse")
    )
    found = [f"did worse than {listed(better)}, which trains all weights"] if better else []
    found += [f"did better than {listed(worse)}"] if worse else []
    found += [f"showed no difference from {listed(equal)}"] if equal else []
    return f"{trial['reference']} {' and '.join(found)}" if found else ""


def _untried(run: RunFolder) -> str:
    offer = f"No trial has compared placements on your rows yet: {run.command('trial')} does."
    return f"{what_the_study_found(run.model_type)} {offer}"


def _arms(trial: dict[str, Any], verdict: str) -> list[dict[str, Any]]:
    return [arm for arm in trial.get("arms", []) if (arm.get("versus") or {}).get("verdict") == verdict]


def adapters(run: RunFolder) -> str:
    if not run.placement:
        return "adapters on "
    ranks = range_of([rank for rank, _ in run.placement.modules.values()])
    single = "" if run.whole_types else f"{len(run.placement.modules)} single modules of "
    return (f"adapters of rank {ranks} on " if " " in ranks else f"rank-{ranks} adapters on ") + single


def how_sure(run: RunFolder) -> str:
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
