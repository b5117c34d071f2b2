"""Two finished trainings on the same rows: which is better, and is that more than the choice of rows?

It reads run folders, and writes none. The two are compared row by row, so that what is hard for both does not count as noise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.example import Example
from ..data.shown import prompt_for_people
from ..lora.adapter_config import CONFIG as ADAPTER_CONFIG
from ..lora.injection import unload
from ..lora.peft_files import check_files
from ..models.loading import load_model
from ..report import kinds
from ..support.devices import device_for, dtype_for
from ..support.errors import AdapterError, ConfigError, shown
from ..support.tables import Column, Table
from ..training.evaluate import Metrics, choices_of, evaluate
from ..training.intervals import Difference, of_change, of_gain
from .evaluating import CHOSE_THE_STEP, judged_on
from .folder import CONFIG
from .run import Run
from .stages import adapt

BASE = "base"
SHOWN = 3  # rows that one of them alone has right


@dataclass(frozen=True)
class Contestant:
    """One of the two: an adapter, a trained model (of --full), or the base."""

    text: str
    adapter: Path | None = None
    model: Path | None = None


def find(text: str) -> Contestant:
    """The contestant that a word of the command line names: a run folder, an adapter's folder, or "base".

    Raises AdapterError for a folder with neither an adapter nor a model, and for a damaged adapter.
    """
    folder = Path(text)
    if text == BASE and not folder.exists():
        return Contestant(text)
    for adapter in folder, folder / "adapter":
        if (adapter / ADAPTER_CONFIG).is_file():
            check_files(adapter)
            return Contestant(text, adapter=adapter)
    if (folder / "model" / "config.json").is_file():
        return Contestant(text, model=folder / "model")
    raise AdapterError(
        f"{text}: expected a run folder with adapter/ or model/, an adapter's folder, or {BASE}: plopfast train writes them"
    )


def check_same_rows(one: Contestant, two: Contestant) -> None:
    """Raises ConfigError where the run folders were made for different test rows, or another base."""
    paths = [Path(contestant.text) / CONFIG for contestant in (one, two)]
    if not all(path.is_file() for path in paths):
        return
    first, second = (kinds.read(path, "plopfast run") for path in paths)
    if _test_hashes(first) != _test_hashes(second):
        raise ConfigError(
            f"{one.text} and {two.text} were made for different test rows: say with --test FILE which ones both are to be judged on"
        )
    if first.get("model") != second.get("model"):
        raise ConfigError(
            f"{one.text} was made for the base {shown(first.get('model'))}, {two.text} for {shown(second.get('model'))}: compare "
            "adapters of one base"
        )


def _test_hashes(config: dict[str, Any]) -> list[str]:
    data = config.get("data", {})
    of = data.get("test") or data.get("valid") or []
    return sorted(one["sha256"] for one in (of if isinstance(of, list) else [of]))


def compare(run: Run, one: Contestant, two: Contestant, any_base: bool = False) -> str:
    """Evaluates both on the run's test rows; returns a table, the difference with its intervals, and what follows."""
    examples = run.examples("test")
    choices = choices_of(examples)
    both = [_measured(run, contestant, examples, choices, any_base) for contestant in (one, two)]
    return "\n".join([str(_table((one, two), both)), *_verdict(both), *_rows_apart(run, examples, both), *_notes(run)])


def _measured(run: Run, contestant: Contestant, examples: list[Example], choices: Any, any_base: bool) -> Metrics:
    label = f"{contestant.text[-20:]}" if run.progress else ""
    if contestant.model:
        device = device_for(run.config.device)
        model, _ = load_model(contestant.model, dtype=dtype_for(run.config.dtype, device, full=True), device=device)
        return evaluate(model, examples, choices=choices, progress=label)
    unload(run.model)
    if contestant.adapter:
        adapt(run, contestant.adapter, any_base, run.config.backend)
    return evaluate(run.model, examples, choices=choices, progress=label)


def _table(contestants: tuple[Contestant, ...], both: list[Metrics]) -> Table:
    columns = [
        Column(""),
        Column("accuracy", ".4f"),
        Column("95% interval"),
        Column("loss", ".4f"),
        Column("adapter or model"),
    ]
    rows = [
        (letter, m.accuracy, f"{m.accuracy_low:.4f} to {m.accuracy_high:.4f}", m.loss, contestant.text)
        for letter, m, contestant in zip("AB", both, contestants, strict=True)
    ]
    return Table(f"{both[0].examples} rows, accuracy: {both[0].metric}", columns, rows)


def _verdict(both: list[Metrics]) -> list[str]:
    one, two = both
    accuracy = of_gain(one.right, two.right)
    tokens = [row.tokens for row in one.rows]
    loss = of_change([b.nats - a.nats for a, b in zip(one.rows, two.rows, strict=True)], tokens)
    return [
        _in_words("accuracy", accuracy, "B is better", "A is better"),
        _in_words("loss", loss, "A is better", "B is better"),
    ]


def _in_words(what: str, found: Difference, above: str, below: str) -> str:
    verdict = above if found.low > 0 else below if found.high < 0 else "no difference shown"
    return f"{what} of B minus A: {found.in_words()}: {verdict}"


def _rows_apart(run: Run, examples: list[Example], both: list[Metrics]) -> list[str]:
    """Rows that one of them alone has right."""
    if both[0].metric == "token":
        return []
    by_place, lines = dict(run.rows("test")), []
    one, two = both
    for who, right, wrong in (("A", one, two), ("B", two, one)):
        apart = [e for e, a, b in zip(examples, right.rows, wrong.rows, strict=True) if a.right > b.right]
        lines.append(f"right by {who} alone: {len(apart)} rows")
        lines += [f"  {Path(e.where).name}: {shown(prompt_for_people(by_place[e.where]))}" for e in apart[:SHOWN]]
    return lines


def _notes(run: Run) -> list[str]:
    notes = ["The intervals say how far other rows could move the figures, not how far another seed in training could."]
    return notes if judged_on(run) == "test" else [*notes, CHOSE_THE_STEP]
