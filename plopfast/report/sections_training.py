"""Section 2: whether the training learned, and whether it ended too early."""

from typing import Any

from .caveats import EndedEarly
from .facts import clipped, how_it_ended, rows_seen, split_of, steps_of
from .figures import Csv, Notes, Plot, Section, Side
from .folder import RunFolder
from .scales import SMOOTHED, binned, counted, finite, fitting, linear, smoothed
from .words import digits, number, rich, several, share

MOST_LEARNED = 0.9  # of the fall of the loss
HEAD = ("step", "loss", "valid_loss", "smoothed", "lr", "grad_norm", "tokens_per_s")


def training(run: RunFolder) -> Section:
    """metrics.jsonl and training.json: loss, learning rate, gradient norm and speed."""
    section = Section(id="training", title="Training", command=run.noted("train"))
    steps = steps_of(run)
    losses = [step.get("loss") for step in steps]
    if not finite(losses) and not finite(step.get("valid_loss") for step in steps):
        section.lacks = ("No training loss is kept here.", run.command("train"))
        return section
    means = smoothed(losses)
    rows = [
        (step["step"], step.get("loss"), step.get("valid_loss"), mean if step.get("loss") is not None else None,
         step.get("lr"), step.get("grad_norm"), _speed(step))
        for step, mean in zip(steps, means, strict=True)
    ]  # fmt: skip
    section.answer = _answer(run, rows)
    section.warnings = warnings_of(how_it_ended(run), run)
    section.caveats = _caveats(run)
    section.body = [_loss(run, rows)]
    small = [figure for figure in (_rate(rows), _norm(run, rows), _pace(rows)) if figure]
    if small:
        padding = run.training.get("padding")
        note = ["Horizontal axes: step."] + ([f"{share(padding)} of the positions held no token."] if padding else [])
        section.body += [Side(small), Notes([" ".join(note)])]
    return section


def _speed(step: dict[str, Any]) -> float | None:
    tokens, seconds = step.get("tokens"), step.get("seconds")
    return tokens / seconds if tokens and seconds else None


def _pairs(rows: list[tuple], column: int) -> list[tuple[float, float]]:
    return [(row[0], row[column]) for row in rows if row[column] is not None and finite([row[column]])]


def _loss(run: RunFolder, rows: list[tuple]) -> Plot:
    trained, valid, means = _pairs(rows, 1), _pairs(rows, 2), _pairs(rows, 3)
    dots, size = binned(trained)
    y = fitting([value for _, value in (*trained, *valid)])
    line, _ = binned(means)
    marks = [(x, loss, digits(loss) if _labelled(at, len(valid)) else "") for at, (x, loss) in enumerate(valid)]
    spoken = "; ".join(
        f"{name} from {found[0][1]:.3f} to {found[-1][1]:.3f}"
        for name, found in (("training", trained), ("validation", valid))
        if found
    )
    key = [("dot", "one step" if size == 1 else f"mean of {size} steps")] * bool(trained) + [
        ("line", f"mean of {SMOOTHED} steps")
    ] * bool(means)
    rows_judged = run.training.get("validation") or ""
    first = rows_judged.split(" ")[0]
    key += [("mark", f"validation, {first} rows" if first.isdigit() else "validation")] * bool(valid)
    return Plot(
        title=_title(rows, means, valid), sub=f"Nats per learned token{', log scale' if y.log else ''}", alt=f"Loss over {rows[-1][0]} training steps: {spoken}.",
        x=counted(rows[-1][0], 10), y=y, dots=dots, line=line, marks=marks, key=key, height=240, axis="step",
        csv=Csv("training", HEAD, rows),
    )  # fmt: skip


def _labelled(at: int, count: int) -> bool:
    """Whether a validation loss has its number beside it: the first, the last, and some between."""
    every = -(-count // 6)
    return at == count - 1 or (at % every == 0 and count - 1 - at >= every / 2)


def _title(rows: list[tuple], means: list[tuple[float, float]], valid: list[tuple[float, float]]) -> str:
    steps = f"in {several(rows[-1][0], 'step')}"
    if len(means) > 1:
        first, last = next(row[1] for row in rows if row[1] is not None), means[-1][1]
        verb = "fell" if last < first else "rose" if last > first else "stayed"
        return (
            f"Loss {verb} from {digits(first)} to about {digits(last, 2)} {steps}"
            if verb != "stayed"
            else f"Loss stayed at {digits(last)} {steps}"
        )
    return "Loss" if not valid else f"Validation loss {digits(valid[-1][1])}"


def _small(title: str, sub: str, rows: list[tuple], column: int, says: str) -> Plot | None:
    pairs = _pairs(rows, column)
    if not pairs:
        return None
    line, size = binned(pairs)
    y = linear([value for _, value in pairs], zero=True, most=3)
    alt = f"{says}: first {digits(pairs[0][1])}, last {digits(pairs[-1][1])}, from {digits(min(v for _, v in pairs))} to {digits(max(v for _, v in pairs))}."
    sub += f", mean of {size} steps" if size > 1 else ""
    return Plot(title=title, sub=sub, alt=alt, x=counted(rows[-1][0], 3), y=y, line=line, height=110)


def _rate(rows: list[tuple]) -> Plot | None:
    top = max(finite(row[4] for row in rows), default=0)
    power = 0
    while 0 < top * 10**power < 0.5 and power < 12:
        power += 1
    scaled = [(*row[:4], row[4] * 10**power if row[4] is not None else None) for row in rows]
    sub = f"× {10.0**-power:.{power}f}" if 0 < power < 5 else f"× 1e-{power}" if power else "by step"
    found = _small("Learning rate", sub, scaled, 4, f"Learning rate, {sub}")
    return found


def _norm(run: RunFolder, rows: list[tuple]) -> Plot | None:
    count = clipped(run)
    of = sum(row[5] is not None for row in rows)
    sub = "before clipping" + (
        f"; {count} of {run.training.get('steps', of)} steps clipped" if count is not None else ""
    )
    return _small("Gradient norm", sub, rows, 5, "Gradient norm")


def _pace(rows: list[tuple]) -> Plot | None:
    return _small("Speed", "tokens per second", rows, 6, "Tokens per second")


def _answer(run: RunFolder, rows: list[tuple]) -> list[str]:
    said, means, valid, told = [], _pairs(rows, 3), _pairs(rows, 2), run.training
    if (early := learned_by(means)) is not None and early < means[-1][0] / 2:
        said.append(rich("Most was learned in the <b>first {}</b>.", several(int(early), "step")))
    if valid:
        best = min(valid, key=lambda pair: pair[1])
        if len(valid) == 1:
            said.append(f"Validation loss was {digits(best[1])} at step {valid[0][0]:,}, the only look.")
        else:
            said.append(
                f"Validation loss went from {digits(valid[0][1])} at step {valid[0][0]:,} to {digits(valid[-1][1])} at step {valid[-1][0]:,}."
            )
            if best[0] != valid[-1][0]:
                said.append(
                    f"The adapter is that of step {told.get('best_step', best[0]):,}, where it was lowest ({digits(best[1])})."
                )
    if told.get("stopped", "").startswith("early"):
        said.append("Training stopped by itself, as the validation loss no longer improved.")
    elif told.get("stopped") == "max_steps":
        said.append("Training stopped at its step limit.")
    return said or ["The training loss is kept, and nothing else."]


def learned_by(means: list[tuple[float, float]]) -> float | None:
    """Return the step by which nine tenths of the fall of the smoothed loss were done; None where it did not fall."""
    if len(means) < 3:
        return None
    first, lowest = means[0][1], min(value for _, value in means)
    if not lowest < first:
        return None
    limit = first - MOST_LEARNED * (first - lowest)
    return next(step for step, value in means if value <= limit * (1 + 1e-9))


def warnings_of(ended: EndedEarly, run: RunFolder) -> list[str]:
    """Put what speaks against a training's end into sentences, each with what it means."""
    said = []
    if ended.seen is not None:
        rows, counted = rows_seen(run)
        about = "" if counted else "about "
        of = split_of(run, "train")["rows"]
        said.append(
            rich(
                "<b>Rows left unseen.</b> The steps took {}{} of {} training rows ({}).",
                about,
                f"{rows:,.0f}",
                f"{of:,}",
                share(ended.seen),
            )
        )
    if ended.last_best:
        said.append(
            rich("<b>The last step was the best.</b> The validation loss was still falling: more steps may help.")
        )
    if ended.clipped is not None:
        said.append(
            rich(
                "<b>Nearly all steps were clipped</b> ({}). The clipping, not the learning rate, set how far they went.",
                share(ended.clipped),
            )
        )
    return said


def _caveats(run: RunFolder) -> list[str]:
    said, told = [], run.training
    if told.get("validation"):
        said.append(f"Validation: {told['validation']}.")
    for type_, count in told.get("unmoved", {}).items():
        said.append(f"No gradient ever reached {count} of the trained {type_}.")
    ended, steps = how_it_ended(run), told.get("steps", 0)
    if (ended.seen or ended.last_best) and steps:
        once = round(steps / ended.seen) if ended.seen else 2 * steps
        what = "one pass over the rows" if ended.seen else f"{number(2)} times as many"
        said.append(rich("To go further: <code>--max-steps {}</code> ({}).", once, what))
    return said
