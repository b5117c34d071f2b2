"""The head of the page: the result in a sentence, how sure it is, four facts, and what to know before relying on it."""

from dataclasses import dataclass, field
from typing import Any

from .facts import accuracy_verdict, changes, guess, how_it_ended, picks_that_differ, rows_seen, short_model, split_of
from .figures import Bar, Chart
from .folder import RunFolder
from .recommend import recommendation, shown_by_trial
from .scales import linear
from .sections_cost import full_choice, on_gpu, own_choice
from .sections_grpo import rewards_chart
from .sections_results import kept_warning, one_seed
from .sections_where import pick_warning
from .words import bold, digits, duration, large, listed, mib, number, range_of, rich, several, share, signed, ties_of

MOST_CAVEATS = 6
RIGHT = {"choice": "answered right", "exact-match": "answered right", "token": "predicted right"}


@dataclass
class Head:
    """What opens the page. `facts`: (term, number, words)."""

    title: str
    model: str
    kick: list[str]
    lede: list[str]
    hero: Chart | None
    caveats: list[str] = field(default_factory=list)
    facts: list[tuple[str, str, str]] = field(default_factory=list)


def head_of(run: RunFolder) -> Head:
    """Return what opens the page of this folder."""
    day = min((str(stage["time"])[:10] for stage in run.stages.values() if stage.get("time")), default="")
    kick = ["Fine-tuning report" if run.training or run.eval or run.grpo else "Placement report", short_model(run), day]
    return Head(
        title=headline(run), model=short_model(run), kick=[text for text in kick if text], lede=_lede(run),
        hero=_hero(run) or rewards_chart(run), caveats=caveats(run), facts=facts(run),
    )  # fmt: skip


def headline(run: RunFolder) -> str:
    """Return the result in plain words; without a test, what the folder holds."""
    if run.eval:
        return _of_eval(run)
    if "mean_before" in run.grpo:
        before, after = run.grpo["mean_before"], run.grpo["mean_after"]
        return f"Mean reward {after:.3f}, {'up' if after > before else 'down' if after < before else 'no change'} from {before:.3f}"
    valid = [record["valid_loss"] for record in run.metrics if record.get("valid_loss") is not None]
    if valid:
        return f"Validation loss {digits(min(valid))}; not tested yet"
    if better := shown_by_trial(run):
        return better.partition(" (")[0]
    if run.types:
        some = "" if run.whole_types else "single modules of "
        return f"Put adapters on {some}{listed(run.types) if len(run.types) <= 6 else several(len(run.types), 'module type')}"
    return f"Where to put LoRA adapters in {short_model(run)}"


def _of_eval(run: RunFolder) -> str:
    base, tuned = run.eval["base"], run.eval["tuned"]
    if not tuned["examples"]:
        return f"Loss {digits(tuned['loss'])} after training, {digits(base['loss'])} before"
    what = f"{run.judged_by} {'tokens' if tuned['metric'] == 'token' else 'rows'} {RIGHT.get(tuned['metric'], 'right')}"
    before, after = share(base["accuracy"]), share(tuned["accuracy"])
    verdict = accuracy_verdict(run.eval)
    if verdict == "none":
        return f"No improvement shown: {after} of {what}, {before} before"
    if verdict in ("up", "down"):
        if before == after:  # as they are rounded
            before, after = f"{base['accuracy']:.2%}", f"{tuned['accuracy']:.2%}"
        return f"{after} of {what}, {verdict} from {before}"
    return f"{after} of {what}, {before} before"


def _lede(run: RunFolder) -> list[str]:
    said: list[str] = []
    if not (run.eval or run.training):
        return [recommendation(run)]
    if run.placement:
        ranks = range_of([rank for rank, _ in run.placement.modules.values()])
        some = "" if run.whole_types else f"{len(run.placement.modules)} single modules of "
        types = bold(run.types) if len(run.types) <= 8 else several(len(run.types), "module type")
        said.append(rich("{} was tuned with rank-{} adapters on {}{}.", short_model(run), ranks, some, types))
    elif run.config.get("settings", {}).get("full"):
        said.append(f"All weights of {short_model(run)} were trained.")
    times = []
    if "score" in run.stages and run.placement:
        times.append(f"choosing where they go took {duration(run.stages['score']['seconds'])}")
    if "train" in run.stages:
        times.append(f"training {'took ' * (not times)}{duration(run.stages['train']['seconds'])}")
    if times:
        said.append(f"{', '.join(times)[:1].upper()}{', '.join(times)[1:]}.")
    if better := shown_by_trial(run):
        said.append(better)
    return said or [recommendation(run)]


def _hero(run: RunFolder) -> Chart | None:
    if not run.eval or not run.eval["tuned"]["examples"]:
        return None
    rows, bars = run.eval["tuned"]["examples"], []
    for name, who in (("Before", "base"), ("After", "tuned")):
        measured, on = run.eval[who], who == "tuned"
        low, high = measured.get("accuracy_low"), measured.get("accuracy_high")
        ends = None if low is None or high is None else (100 * low, 100 * high)
        bars.append(Bar(
            name=name, text=f"{measured['accuracy']:.1%}", more=f"{ends[0]:.1f}% to {ends[1]:.1f}%" if ends else "", on=on,
            dots=[(100 * measured["accuracy"], on)], span=ends,
        ))  # fmt: skip
    note = f"Share of {several(rows, f'{run.judged_by} row')} {'right' if run.eval['tuned']['metric'] != 'token' else 'whose tokens were predicted right'}."
    if bars[0].span:
        note += f" Bands: 95% intervals{'' if run.eval['tuned']['metric'] == 'token' else ' (Wilson)'}."
    if gain := run.eval.get("gain"):
        difference, low, high = (100 * gain[key] for key in ("difference", "low", "high"))
        note += f" Gain: {signed(difference)} points ({signed(low)} to {signed(high)}, paired by row)."
    by_chance = guess(run)
    spoken = "; ".join(f"{bar.name.lower()} {bar.text}{f' ({bar.more})' if bar.more else ''}" for bar in bars)
    return Chart(
        title="", rows=bars, scale=linear([0, 100], zero=True, most=4, unit="%"), look="hero", height=58, note=note, alt=f"Accuracy: {spoken}.",
        reference=(100 * by_chance, "guess") if by_chance else None,
    )  # fmt: skip


def caveats(run: RunFolder) -> list[str]:
    """Return what a reader should know before relying on the page, what weighs most first."""
    said: list[str] = [*kept_warning(run)]
    if run.eval and run.judged_by == "validation":
        said.append(
            rich(
                "<b>No test rows.</b> The validation rows also chose the step that was kept, so they flatter the result."
            )
        )
    if run.data.get("overlap"):
        said.append(rich('<b>Splits overlap.</b> Some rows or prompts are in <a href="#data">several splits</a>.'))
    said += _of_general_text(run)
    if picks_that_differ(run):
        said.append(pick_warning(run, brief=True))
    said += _of_training(run)
    if (decision := run.decision) and decision.near_ties:
        said.append(rich("<b>Near-ties.</b> The prompts do not tell {}.", ties_of(decision, 2)))
    found = changes(run)
    if found and found.lost:
        said.append(
            rich(
                "<b>{} got worse.</b> {} right before and wrong after.",
                several(found.lost, "row"),
                "It was" if found.lost == 1 else "They were",
            )
        )
    said += _of_trial(run)
    if run.eval and run.eval["tuned"]["metric"] == "choice" and not run.eval.get("samples"):
        said.append(
            rich(
                "<b>Right means</b> that the right answer was the likeliest of those that occur. Free text was not judged."
            )
        )
    if run.eval or run.training:  # of every run, so it is never among those that are left to the sections
        said.insert(min(len(said), MOST_CAVEATS - 1), one_seed(run))
    more = len(said) - MOST_CAVEATS
    return said[:MOST_CAVEATS] + (
        [f"{number(more).capitalize()} more {'is' if more == 1 else 'are'} said in the sections below."]
        if more > 0
        else []
    )


def _of_training(run: RunFolder) -> list[str]:
    """What speaks against the training's end, in one sentence: its section says what it means."""
    ended, said = how_it_ended(run), []
    if ended.seen is not None:
        said.append(f"the steps saw {share(ended.seen)} of the training rows")
    if ended.last_best:
        said.append("the last step was the best")
    if ended.clipped is not None:
        said.append(f"{share(ended.clipped)} of the steps were clipped")
    if not said:
        return []
    text = listed(said)
    return [
        rich(
            '<b>Training may have ended too early.</b> {}: <a href="#training">what that means</a>.',
            text[:1].upper() + text[1:],
        )
    ]


def _of_general_text(run: RunFolder) -> list[str]:
    general = run.eval.get("general")
    if not general:
        return [rich("<b>Forgetting</b> was not measured in this run.")] if run.eval and not run.trial else []
    change = general["after"] - general["before"]
    if change <= 0.05:
        return []
    return [
        rich(
            '<b>Forgetting.</b> The loss on general text <a href="#results">rose by {}</a> nats per token, from {} to {}.',
            f"{change:.2f}",
            digits(general["before"]),
            digits(general["after"]),
        )
    ]


def _of_trial(run: RunFolder) -> list[str]:
    if not run.scores and not run.placement:
        return []
    if not run.trial:
        return [
            rich('<b>No better placement is known</b>, as no trial has compared them: <a href="#trial">how to</a>.')
        ]
    verdicts = {(arm["versus"] or {}).get("verdict", "") for arm in run.trial["arms"]} - {""}
    if verdicts == {"no difference shown"}:
        return [
            rich(
                '<b>No better placement is known.</b> A trial of {} <a href="#trial">showed no difference</a>.',
                number(len(run.trial["arms"])),
            )
        ]
    return []


def facts(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return the few numbers below the headline: (term, number, words)."""
    found: list[tuple[str, str, str]] = []
    ours, full = own_choice(run), full_choice(run)
    if run.placement:
        of = (
            f"{share(run.placement.parameters / full['parameters'])} of the model’s {large(full['parameters'])}: "
            if full.get("parameters")
            else ""
        )
        ranks = range_of([rank for rank, _ in run.placement.modules.values()])
        count = f"{run.placement.parameters:,}; " if run.placement.parameters >= 1e6 else ""
        found.append(
            (
                "Trained parameters",
                large(run.placement.parameters),
                f"{count}{of}rank-{ranks} LoRA adapters on {several(len(run.placement.modules), 'module')}",
            )
        )
    found += _of_data(run)
    if "train" in run.stages:
        total = sum(stage["seconds"] for stage in run.stages.values())
        found.append(
            (
                "Training time",
                duration(run.stages["train"]["seconds"]),
                f"{duration(total)} for all stages{_machine(run)}",
            )
        )
    elif run.scores:
        found.append(("Prompts scored", f"{run.scores.prompts:,}", f"in {run.scores.seconds:.1f} s"))
    if "train" in run.stages and not (on_gpu(run) and ours):
        of = (
            f"; estimated: {share(ours['memory_of_full'])} of full fine-tuning"
            if ours and full and ours is not full
            else ""
        )
        found.append(
            ("Memory at the peak", mib(run.stages["train"]["peak_mib"]), f"{'of the CPU, ' * on_gpu(run)}measured{of}")
        )
    elif ours:
        found.append(
            ("Memory", mib(ours["total_mib"]), f"estimated, {share(ours['memory_of_full'])} of full fine-tuning")
        )
    return found[:4]


def _of_data(run: RunFolder) -> list[tuple[str, str, str]]:
    train, (seen, counted) = split_of(run, "train"), rows_seen(run)
    if not train:
        return []
    others = [f"{split['rows']:,} {split['split']}" for split in run.data["splits"] if split["split"] != "train"]
    rest = f"{train['rows']:,} training rows" + (f", {' and '.join(others)}" if others else "")
    if not seen:
        return [("Data", several(train["rows"], "row"), rest)]
    passes = seen / train["rows"]
    steps = several(run.training.get("steps", 0), "step")
    how = (
        f"{share(passes)} of {train['rows']:,} training rows"
        if passes < 0.995
        else f"{passes:.1f} passes over {train['rows']:,} training rows"
    )
    beside = f"; {' and '.join(others)} rows beside them" if others else ""
    return [("Rows seen", f"{'' if counted else '≈ '}{seen:,.0f}", f"{how}, in {steps}{beside}")]


def _machine(run: RunFolder) -> str:
    machine: Any = run.config.get("machine") or ""
    cores = next((part.strip() for part in str(machine).split(",") if "core" in part), "")
    gpu = str(run.config.get("device") or "").startswith("cuda")
    return f", on {'a GPU' if gpu else cores + (' of a CPU' if cores else 'a CPU')}"
