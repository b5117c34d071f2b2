"""`plopfast audit`: can the scores be trusted, and what do they say?

The audit compares the ranking of the module types by NFN with other rankings: by fewer prompts, by other tokens, by
controls without meaning, and by other criteria. It says how far the orders agree (Kendall's tau-b), and whether the same k
types are picked.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ..data.batches import batches_of
from ..data.example import Example
from ..models.experts import ExpertInfo, weights_of
from ..models.running import context_length, device_of
from ..placing.by_settings import SCORE_ROWS
from ..placing.rules import RULES, Rule, ranked
from ..report.tables import audit_tables
from ..run.run import Run
from ..scoring.nfn import score
from ..scoring.report import NFNReport
from ..support import files, memory
from ..support.config import ScoreSettings
from ..support.errors import ConfigError, DataError, PlopfastError
from .agreement import SHORTEST, agreement, doubled_below, pick, subset_rows, tau_of
from .controls import random_model, random_tokens, shuffled_words
from .criteria import Given, compared

OTHER_SAMPLES = 3
NEAR_ONE = 0.1  # how far a random model's scores may lie from 1
Mask = tuple[str, bool]  # which tokens are scored, and whether the first one is left out, as for `batches_of`


@dataclass(frozen=True)
class Measured:
    """A result, the seconds it took, and the MiB it took at most above what was in use before."""

    value: Any
    seconds: float
    extra_mib: float


@dataclass
class Work:
    """What the parts of an audit share. `missing` fills with the checks that were skipped, `peaks` with MiB in use."""

    model: nn.Module
    tokenizer: Any
    examples: Sequence[Example]
    settings: ScoreSettings
    progress: bool
    say: Callable[[str], None]
    missing: list[dict[str, str]] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def scored(
        self, rows: Sequence[Example], *, model: Any = None, mask: Mask | None = None, eva_rank: int | None = None
    ) -> NFNReport:
        """Score `rows` by the settings, or on another `model` or other tokens."""
        s = self.settings
        batches = batches_of(rows, SCORE_ROWS, *(mask or (s.score_tokens, s.skip_first)))
        return score(
            model or self.model, batches, baseline=s.baseline, seed=s.seed, backend=s.backend, eva_rank=eva_rank,
            progress=self.progress,
        )  # fmt: skip

    def skip(self, kind: str, what: str, why: str) -> None:
        """Note a check that this data or model does not allow."""
        self.missing.append({"kind": kind, "what": what, "why": why})
        self.say(f"{kind}, {what}: skipped: {why}")

    def tried(self, kind: str, what: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns. Where it raises one of our errors, skip the check and return None."""
        self.say(f"{kind}: {what}")
        try:
            return make()
        except PlopfastError as error:
            self.skip(kind, what, str(error))

    def measured(self, compute: Callable[[], Any]) -> Measured:
        """Compute a criterion, and measure its time and memory (resident memory on the CPU, torch's on a GPU)."""
        device = device_of(self.model)
        self.peaks.append(memory.peak_mib())  # the next line resets it
        memory.reset_peak(device)
        before, began = memory.peak_mib(device), time.perf_counter()
        value, after = compute(), memory.peak_mib(device)
        return Measured(value, time.perf_counter() - began, round(after - before, 1))


def audit(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    settings: ScoreSettings | None = None,
    *,
    others: Sequence[Sequence[Example]] = (),
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return what audit.json holds, as plain values; `audit_text` shows it.

    `examples` are the prompts, in random order; `others` are other samples of the same task. `settings.k` types are picked,
    and `settings.rank` is the rank of the inputs' spectrum and of the gradient. The parts:

    - "stability": subsets of the prompts, shorter rows and other samples;
    - "tokens": NFN of other tokens;
    - "controls": random tokens, shuffled words and random weights, with a "verdict" on them;
    - "criteria": NFN and others, each with its seconds, their ratio to NFN's, and the MiB that it took above what was in
      use before (resident memory on the CPU, torch's on a GPU).

    Unavailable checks are skipped; "missing" lists why. Raises what `score` raises for the scores themselves, ConfigError
    for a k outside 1 to the number of types, and DataError without examples.
    """
    settings = settings or ScoreSettings()
    known = list(dict.fromkeys(info.type for info in weights_of(model)))
    if settings.k > len(known):
        raise ConfigError(
            f"k = {settings.k}: expected 1 to {len(known)}, this model's module types ({', '.join(known)})"
        )
    if not examples:
        raise DataError("there is no prompt to score: expected one example or more")
    work = Work(model, tokenizer, examples, settings, progress, say)
    say(f"NFN of {len(examples)} prompts")
    work.scored(examples[:SCORE_ROWS])  # the cost of a first pass must not count as NFN's
    base = work.measured(lambda: work.scored(examples))
    report: NFNReport = base.value
    stability, masks, controls = _stability(work, report, others), _tokens(work, report), _controls(work, report)
    criteria, ours = _criteria(work, base), pick(report.types, settings.k)
    return {
        "model": report.model, "k": settings.k, "rank": settings.rank, "prompts": report.prompts,
        "scored_tokens": report.tokens, "seed": settings.seed, "score_tokens": settings.score_tokens,
        "skip_first": settings.skip_first, "pick": ours, "types": report.types, "stability": stability, "tokens": masks,
        "controls": controls, "verdict": verdict(ours, controls), "criteria": criteria, "missing": work.missing,
        "peak_mib": round(max([*work.peaks, memory.peak_mib()]), 1),
    }  # fmt: skip


def _stability(work: Work, base: NFNReport, others: Sequence[Sequence[Example]]) -> list[dict[str, Any]]:
    """Compare the ranking with those of fewer prompts, shorter rows and other samples."""
    k, kind = work.settings.k, "stability"
    rows = work.tried(kind, "random subsets of the prompts", lambda: subset_rows(base, k, work.settings.seed)) or []
    lengths = doubled_below(max(len(example.tokens) for example in work.examples))
    if not lengths:
        work.skip(kind, "shorter rows", f"no row is longer than {SHORTEST} tokens")
    for length in lengths:
        what, shorter = f"first {length} tokens", [e.truncated(length) for e in work.examples]
        if report := work.tried(kind, what, partial(work.scored, shorter)):
            rows.append(agreement("length", what, base.types, [report.types], k))
    if not others:
        work.skip(kind, "other samples", "none was given (a run draws none where it scores every training row)")
    found = [work.tried(kind, f"other sample {i}", partial(work.scored, sample)) for i, sample in enumerate(others, 1)]
    if drawn := [report.types for report in found if report]:
        rows.append(agreement("seed", f"{len(drawn)} other samples", base.types, drawn, k))
    return rows


def _tokens(work: Work, base: NFNReport) -> list[dict[str, Any]]:
    """Rank the types by the NFN of other tokens."""
    rows, ours = [], (work.settings.score_tokens, work.settings.skip_first)
    for what, mask in _masks(work).items():
        scored = partial(work.scored, work.examples, mask=mask)
        if report := base if mask == ours else work.tried("tokens", what, scored):
            rows.append(_ranked(what, report, base, work.settings.k))
    return rows


def _masks(work: Work) -> dict[str, Mask]:
    """Return the tokens to score, as far as these rows allow, by their name."""
    masks = {"all tokens": ("all", False), "without the first token": ("all", True)}
    if any(example.has_prompt for example in work.examples):
        masks |= {f"{part} tokens": (part, False) for part in ("prompt", "completion")}
    else:
        work.skip("tokens", "prompt and completion tokens", "the rows are plain text, without a prompt")
    roles = sorted({role for example in work.examples for role in example.roles or ()})
    if not roles:
        why = "the rows are no messages, or the chat template rewrites earlier messages"
        work.skip("tokens", "tokens by role", why)
    return masks | {f"{role} tokens": (role, False) for role in roles}


def _controls(work: Work, base: NFNReport) -> list[dict[str, Any]]:
    """Rank the types on text and weights without meaning."""
    examples, tokenizer, seed, rows = work.examples, work.tokenizer, work.settings.seed, []
    for what, make in {
        "random tokens": lambda: work.scored(random_tokens(examples, tokenizer, seed)),
        "shuffled words": lambda: work.scored(shuffled_words(examples, tokenizer, seed, context_length(work.model))),
        "random weights": lambda: work.scored(examples, model=random_model(work.model, seed)),
    }.items():
        began = time.perf_counter()
        if report := work.tried("control", what, make):
            row = _ranked(what, report, base, work.settings.k)
            rows.append(row | {"seconds": time.perf_counter() - began})
    return rows


def _ranked(what: str, report: NFNReport, base: NFNReport, k: int) -> dict[str, Any]:
    return {"what": what, "types": report.types, "pick": pick(report.types, k), "tau": tau_of(base.types, report.types)}


def _criteria(work: Work, base: Measured) -> list[dict[str, Any]]:
    """Rank the types by NFN and by each other criterion; `base` is the measured scoring."""
    types, infos = base.value.types, weights_of(work.model)
    of_type = {info.name: info.type for info in infos}
    settings, rows = work.settings, [_criterion_row(RULES["plop"], types, base, base, work.settings.k)]
    if any(isinstance(info, ExpertInfo) for info in infos):
        work.skip(
            "criterion", "experts", "criteria other than NFN are of linear modules alone, and compared on their types"
        )
    with_eva = partial(work.scored, work.examples, eva_rank=settings.rank)
    given = Given(work.model, work.examples, settings.rank, settings.seed, work.progress, with_eva, base.value)
    for rule, compute in compared():
        if got := work.tried("criterion", rule.criterion, partial(work.measured, partial(compute, given))):
            has = {of_type[name] for name in got.value}
            means = rule.type_scores(got.value, of_type, [type_ for type_ in types if type_ in has])
            rows.append(_criterion_row(rule, means, got, base, settings.k))
    return rows


def _criterion_row(rule: Rule, types: Mapping[str, float], cost: Measured, base: Measured, k: int) -> dict[str, Any]:
    ours = {type_: nfn for type_, nfn in base.value.types.items() if type_ in types}
    highest, order = rule.highest, ranked(types, rule.highest)
    return {
        "name": rule.criterion, "source": rule.source, "chooses": "highest" if highest else "lowest",
        "types": {type_: types[type_] for type_ in order}, "pick": order[:k],
        "tau": tau_of(ours, types, highest), "agrees": set(order[:k]) == set(pick(ours, k)),
        "seconds": cost.seconds, "cost": cost.seconds / base.seconds, "extra_mib": cost.extra_mib,
        "needs": rule.needs,
    }  # fmt: skip


def verdict(ours: Sequence[str], controls: Sequence[Mapping[str, Any]]) -> str:
    """Say in a sentence or two what the controls mean for the pick `ours`."""
    rows = {row["what"]: row for row in controls}
    texts = {what: rows[what]["pick"] for what in ("random tokens", "shuffled words") if what in rows}
    moved = {what: other for what, other in texts.items() if set(other) != set(ours)}
    kept = [what for what in texts if what not in moved]
    picked = f"the pick ({', '.join(ours)})"
    if controls and len(ours) == len(controls[0]["types"]):
        said = "every module type is picked, so there is no choice to control"
    elif moved:
        said = f"{picked} depends on the text: " + "; ".join(f"{w} give {', '.join(p)}" for w, p in moved.items())
        said += f"; {kept[0]} leave it as it is" if kept else ""
    elif len(kept) == 2:
        said = f"{picked} stays the same on random tokens and on shuffled words: it reflects the model rather than the task"
    elif kept:
        said = f"{picked} stays the same on {kept[0]}, but without the other control this settles nothing"
    else:
        said = f"neither random tokens nor shuffled words could be scored, so it stays open whether {picked} reflects the task"
    if "random weights" in rows:
        low, high = min(rows["random weights"]["types"].values()), max(rows["random weights"]["types"].values())
        near = max(abs(low - 1), abs(high - 1)) <= NEAR_ONE
        said += f". With random weights the types score {low:.2f} to {high:.2f}, " + (
            "near 1 as they should" if near else "not near 1: this architecture alone moves the scores"
        )
    return said[0].upper() + said[1:] + "."


def audit_text(found: dict[str, Any]) -> str:
    """Return an audit as text for the terminal."""
    said = f"NFN of {found['prompts']} prompts picks {', '.join(found['pick'])}\n{found['verdict']}"
    skipped = "\n".join(f"skipped: {row['kind']}, {row['what']}: {row['why']}" for row in found["missing"])
    return "\n\n".join(filter(None, (said, *map(str, audit_tables(found)), skipped)))


def run_audit(run: Run) -> str:
    """Audit a run's model and task on as many prompts as its settings say; write audit.json, and return it as text."""
    config = run.config
    if config.compat:
        raise ConfigError(
            "audit needs statistics of single prompts, which --compat official does not keep: leave it out"
        )
    run.ready("audit")
    rows = len(run.rows("train"))
    examples = run.sample()  # broken data should stop the run before the model is loaded
    with run.stage("audit") as noted:
        others = [run.sample(config.seed + i) for i in range(1, OTHER_SAMPLES + 1)] if len(examples) < rows else []
        found = audit(
            run.model, run.tokenizer, examples, config.scoring, others=others, progress=run.progress, say=run.say
        )
        noted["peak_mib"] = found["peak_mib"]
        files.write_json(run.file("audit"), {"plopfast": "audit", **found})
    return audit_text(found)
