"""The stage "eval": how good the model is before and after training, and what training has spoilt.

On the test rows: loss, accuracy, how each row was judged (eval_rows.jsonl) and three free answers. Beside them: the loss on
general text, which shows forgetting, and the answers of --must-keep.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.example import Example
from ..data.shown import prompt_for_people
from ..lora.injection import unload
from ..lora.layer import adapters, disabled
from ..models.generating import generate, text_of
from ..models.loading import load_model
from ..support import files, ranks
from ..support.devices import device_for, dtype_for
from ..support.errors import ModelError, PlopfastError
from ..training.evaluate import Judged, Metrics, choices_of, evaluate, in_words
from ..training.intervals import Difference, of_gain
from . import must_keep
from .adapter_folder import update_card
from .general import GeneralText, general_text, why_not_held_out
from .run import Run
from .stages import adapt, check_trained

CHOSE_THE_STEP = (
    "validation rows also chose the training step that was kept, so they flatter the tuned model: give --test FILE for a "
    "test result"
)
ROWS = "eval_rows.jsonl"
GENERAL_TOKENS = 1024  # a trial, which compares placements by it, takes 4,096
SAMPLES, SAMPLE_TOKENS = 3, (16, 128)  # free answers, and the least and most tokens of one


@dataclass
class _Asked:
    """What both models are asked."""

    examples: list[Example]
    choices: list[list[int]] | None
    general: GeneralText | None
    keep: list[must_keep.MustKeep]
    samples: list[int] = field(default_factory=list)  # numbers of examples


@dataclass
class _Found:
    """What one of the models gave."""

    metrics: Metrics
    general_loss: float | None
    kept: list[str]
    samples: list[str]


def run_eval(run: Run, adapter: Path | None = None, any_base: bool = False) -> dict[str, Any]:
    """Evaluates "base" and "tuned" on the test rows, or on the validation rows where there are no others: eval.json, and
    eval_rows.jsonl with a line for each row.

    The base is the same model with its adapters switched off, or loaded anew where all weights were trained. `adapter` is
    a folder to take instead of the run's own; `any_base` accepts one that was trained on other base weights. Returns what
    eval.json holds.
    """
    check_trained(run, "eval", adapter)
    run.ready("eval", "test")
    asked = _asked(run)
    with run.stage("eval", inputs=[adapter] if adapter else []):
        base, tuned = (_found(run, model, who, asked) for who, model in _models(run, adapter, any_base))
        value = _value(run, asked, base, tuned)
        rows = _rows(run, asked, base.metrics, tuned.metrics)

        def save() -> None:
            files.write_json_lines(run.folder / ROWS, rows)
            files.write_json(run.file("eval"), value)

        ranks.on_main(save)
        if adapter is None:
            ranks.on_main(lambda: update_card(run, value))
    return value


def check(run: Run) -> None:
    """Reads --must-keep and --general, which need the tokenizer alone: what is wrong in them stops a run before its work."""
    _read_must_keep(run)
    if run.config.general:
        general_text(run, GENERAL_TOKENS)


def _read_must_keep(run: Run) -> list[must_keep.MustKeep]:
    given = run.config.must_keep
    return must_keep.read_must_keep(given, run.tokenizer, run.context) if given else []


def _asked(run: Run) -> _Asked:
    keep = _read_must_keep(run)
    examples = run.examples("test")
    asked = _Asked(examples, choices_of(examples), _general(run), keep)
    if run.config.parallel == "fsdp":
        run.say("no sample answers: --parallel fsdp spreads the model")
    else:
        room = run.context if run.context and run.context > 0 else math.inf
        fit = [i for i, e in enumerate(examples) if e.answer and 0 < e.start < room]
        asked.samples = [fit[len(fit) * i // SAMPLES] for i in range(min(SAMPLES, len(fit)))]
    return asked


def _general(run: Run) -> GeneralText | None:
    """The general text; None, which is said, where it does not show forgetting, or there is no default."""
    try:
        general = general_text(run, GENERAL_TOKENS)
    except PlopfastError as error:
        if run.config.general:
            raise
        run.say(f"no loss on general text: {error}")
        return None
    if "train" not in run.splits:  # a test file alone
        return general
    if why := why_not_held_out(run, general):
        run.say(f"no loss on general text: {why}")
        return None
    return general


def _models(run: Run, adapter: Path | None, any_base: bool) -> Iterator[tuple[str, Any]]:
    """The model before and after training, one after the other."""
    config, device = run.config, device_for(run.config.device)
    if config.full:
        for who, name in ("base", config.model), ("tuned", run.file("train")):
            yield who, load_model(name, dtype=dtype_for(config.dtype, device, full=True), device=device)[0]
        return
    if adapter:
        unload(run.model)
    if not adapters(run.model):
        adapt(run, adapter, any_base, config.backend)
    with disabled(run.model):
        yield "base", run.model
    yield "tuned", run.model


def _found(run: Run, model: Any, who: str, asked: _Asked) -> _Found:
    bar, general_bar = (who, f"{who}, general text") if run.progress else ("", "")
    metrics = evaluate(model, asked.examples, choices=asked.choices, progress=bar)
    general = evaluate(model, asked.general.rows, progress=general_bar).loss if asked.general else None
    answers = functools.partial(generate, model, run.tokenizer)
    prompts, most = [row.prompt.tokens for row in asked.keep], must_keep.TOKENS
    kept = [answer.text for answer in answers(prompts, max_new_tokens=most, progress=run.progress)] if prompts else []
    return _Found(metrics, general, kept, _samples(run, who, asked, answers))


def _samples(run: Run, who: str, asked: _Asked, answers: Callable[..., Any]) -> list[str]:
    """Free answers to a few of the rows. A model that generates no text gives none, which is said."""
    rows = [asked.examples[i] for i in asked.samples]
    least, most = SAMPLE_TOKENS
    longest = max((len(_expected(row)) for row in rows), default=0)
    try:
        made = answers([row.tokens[: row.start] for row in rows], max_new_tokens=min(max(least, 2 * longest), most))
    except ModelError as error:
        if who == "base":
            run.say(f"no sample answers: {error}")
        return []
    return [answer.text for answer in made]


def _expected(example: Example) -> tuple[int, ...]:
    begin, end = example.answer or (0, 0)
    return example.tokens[begin:end]


def _value(run: Run, asked: _Asked, base: _Found, tuned: _Found) -> dict[str, Any]:
    value: dict[str, Any] = {
        "base": base.metrics.summary(), "tuned": tuned.metrics.summary(), "rows": judged_on(run),
        "gain": of_gain(base.metrics.right, tuned.metrics.right)._asdict(), "samples": _shown_samples(run, asked, base, tuned),
    }  # fmt: skip
    if asked.general:
        value["general"] = {**asked.general.facts, "before": base.general_loss, "after": tuned.general_loss}
    if asked.keep:
        value["must_keep"] = must_keep.judged(asked.keep, base.kept, tuned.kept, str(run.config.must_keep))
    return value


def judged_on(run: Run) -> str:
    """The kind of rows that a result is of: "test", or "validation" where there are no others. A copied file is no test either."""
    test, valid = ([one["sha256"] for one in run.hashes(split)] for split in ("test", "valid"))
    return "test" if test and test != valid else "validation"


def _shown_samples(run: Run, asked: _Asked, base: _Found, tuned: _Found) -> list[dict[str, Any]]:
    by_place = dict(run.rows("test"))
    found = []
    for i, before, after in zip(asked.samples, base.samples, tuned.samples, strict=False):
        example = asked.examples[i]
        expected = text_of(run.tokenizer, _expected(example)).strip()
        found.append({
            "row": i + 1, "prompt": prompt_for_people(by_place[example.where]), "expected": expected, "before": before, "after": after,
            "right_before": before.strip() == expected, "right_after": after.strip() == expected,
        })  # fmt: skip
    return found


def _rows(run: Run, asked: _Asked, base: Metrics, tuned: Metrics) -> list[dict[str, Any]]:
    """How each row was judged, for eval_rows.jsonl."""
    by_place = dict(run.rows("test"))
    texts = {_expected(e): e.completion for e in asked.examples}
    names = [(texts.get(tuple(choice)) or "").strip() for choice in asked.choices or []]

    def of(one: Judged) -> dict[str, Any]:
        answered = None if one.answered is None else names[one.answered]
        return {"right": one.right, "answered": answered, "chance": one.chance, "nats": one.nats}

    return [
        {
            "row": number, "where": Path(example.where).name, "prompt": prompt_for_people(by_place[example.where]),
            "expected": None if example.completion is None else example.completion.strip(), "before": of(one), "after": of(two),
        }
        for number, (example, one, two) in enumerate(zip(asked.examples, base.rows, tuned.rows, strict=True), 1)
    ]  # fmt: skip


def eval_lines(value: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns what eval.json holds in words, each line with its heading. Figures of validation rows are not called a test
    result. Files of earlier versions do not say which rows they are of, and have only the first two lines.
    """
    rows = value.get("rows", "held-out")
    lines = [(who, in_words(value[who], rows)) for who in ("base", "tuned")]
    if value.get("gain"):
        gain = Difference(**value["gain"])
        shown = "no difference shown" if gain.low <= 0 <= gain.high else "the difference is shown"
        lines.append(("gain", f"{gain.in_words()}: {shown}"))
    if general := value.get("general"):
        change = general["after"] - general["before"]
        lines.append(
            (
                "general",
                f"loss on text outside the task {general['before']:.4f} before, {general['after']:.4f} after ({change:+.4f})",
            )
        )
    if value.get("must_keep"):
        lines += [("keep", line) for line in must_keep.in_words(value["must_keep"])]
    return [*lines, ("note", CHOSE_THE_STEP)] if rows == "validation" else lines


def sample_lines(value: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the sample answers of eval.json, each line with its heading."""
    lines = []
    for one in value.get("samples", []):
        lines.append(("asked", _in_a_line(one["prompt"], last=True)))
        lines.append(("  before", _in_a_line(one["before"])))
        mark = "right" if one["right_after"] else f"expected: {_in_a_line(one['expected'])}"
        lines.append(("  after", f"{_in_a_line(one['after'])}  ({mark})"))
    return lines


def _in_a_line(text: str, last: bool = False, most: int = 70) -> str:
    flat = " ".join(text.split())
    if len(flat) <= most:
        return flat or "(nothing)"
    return f"…{flat[-most:]}" if last else f"{flat[:most]}…"


def lost(value: dict[str, Any]) -> bool:
    """Whether --must-keep found an answer that training has spoilt."""
    return bool(value.get("must_keep", {}).get("lost"))
