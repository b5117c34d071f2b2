"""Can the scores be trusted, and what do they say? Their stability, what other tokens give, controls, other criteria.

Every ranking is compared with that of the scores themselves, by Kendall's tau-b over the module types and by whether the
same k types are picked.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..data.batches import batches_of
from ..data.rows import Example
from ..models.linears import context_length, device_of, linear_modules
from ..placing.rules import RULES, Rule, ranked
from ..run.folder import SCORE_ROWS, Run
from ..scoring.nfn import score
from ..scoring.report import NFNReport, types_of
from ..scoring.stopping import averages
from ..support import files, machine
from ..support.errors import ConfigError, DataError, PlopfastError
from .controls import random_model, random_tokens, shuffled_words, truncated
from .criteria import Given, compared

SHORTEST = 8  # prompts in a subset, and tokens of a truncated row; then 16, 32, ...
REPEATS = 100  # random subsets of each size
OTHER_SAMPLES = 3
NEAR_ONE = 0.1  # how far a random model's types may lie from 1


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b of two lists of equal length, -1 to 1 (Kendall, "The treatment of ties in ranking problems",
    Biometrika 1945): 1 for the same order. 0 where either list is all ties, for which it is undefined."""
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    sign_a, sign_b = ((x[:, None] - x).sign() for x in (a, b))
    pairs = float((sign_a.abs().sum() * sign_b.abs().sum()).sqrt())
    return float((sign_a * sign_b).sum()) / pairs if pairs else 0.0


def subset_rows(report: NFNReport, k: int, seed: int = 0, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """How `repeats` random subsets of 8, 16, 32, ... prompts rank the types, against all prompts: a row for each size, from
    `report.prompt_stats` alone. Raises ConfigError where there are none, or not more than 8 prompts."""
    if report.prompt_stats is None:
        raise ConfigError("these scores hold no statistics of single prompts (compat='official'): no subsets")
    stats = report.prompt_stats[:, :, report.prompt_stats[1].any(0)]
    prompts = stats.shape[2]
    if prompts <= SHORTEST:
        raise ConfigError(f"{prompts} prompts: too few for subsets of {SHORTEST}; score more of them")
    names, mean_TM = averages(types_of(report.scores.values()))
    generator = torch.Generator().manual_seed(seed)

    def types(kept_RP: torch.Tensor) -> list[dict[str, float]]:
        sums_RM, counts_RM = (kept_RP @ part.T for part in stats)
        return [dict(zip(names, row, strict=True)) for row in (sums_RM / counts_RM @ mean_TM.T).tolist()]

    (whole,) = types(torch.ones(1, prompts, dtype=torch.float64))
    rows = []
    for size in _doubled_below(prompts):
        order_RP = torch.rand(repeats, prompts, generator=generator).argsort(1)
        kept_RP = torch.zeros(repeats, prompts, dtype=torch.float64).scatter_(1, order_RP[:, :size], 1.0)
        rows.append(_agreement("subset", f"{size} prompts", whole, types(kept_RP), k))
    return rows


def _doubled_below(limit: int) -> list[int]:
    return [SHORTEST << i for i in range(limit.bit_length()) if SHORTEST << i < limit]


def _agreement(kind: str, what: str, base: Mapping[str, float], others: Sequence[Mapping[str, float]], k: int) -> Any:
    taus = [_tau(base, other) for other in others]
    same = [set(pick(other, k)) == set(pick(base, k)) for other in others]
    return {
        "kind": kind, "what": what, "repeats": len(others),
        "tau": sum(taus) / len(taus), "tau_low": min(taus), "same_pick": sum(same) / len(same),
    }  # fmt: skip


def _tau(base: Mapping[str, float], other: Mapping[str, float], sign: int = 1) -> float:
    return kendall_tau(list(base.values()), [sign * other[type_] for type_ in base])


def pick(types: Mapping[str, float], k: int, highest: bool = False) -> list[str]:
    """The k lowest (or highest) types, in that order."""
    return ranked(types, highest)[:k]


def audit(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    others: Sequence[Sequence[Example]] = (),
    k: int = 3,
    rank: int = 16,
    seed: int = 0,
    tokens: str = "all",
    skip_first: bool = False,
    baseline: str = "closed-form",
    backend: str = "auto",
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What audit.json holds, as plain values; `table` shows it.

    `examples` are the prompts, in random order, of which `tokens` and `skip_first` (as in `data.batches_of`) are scored;
    `others` are other samples of the same task. `rank` is that of the inputs' spectrum and of the gradient. Parts:
    "stability" over subsets of the prompts, shorter rows and other samples; "tokens": other token masks; "controls", with
    a "verdict" on them; "criteria" beside NFN, each with its seconds, their ratio to NFN's, and the memory in MiB that it
    took above what was there (resident memory on the CPU, torch's on a GPU).

    What this data or model does not allow (no roles, words that cannot be shuffled, no memory for a random model, ...) is
    left out and listed with its reason under "missing". Raises what `score` raises for the scores themselves, and
    ConfigError for a k that is not between 1 and the number of types.
    """
    of_type = {info.name: info.type for info in linear_modules(model)}
    known = list(dict.fromkeys(of_type.values()))
    if not 1 <= k <= len(known):
        raise ConfigError(f"k = {k}: expected 1 to {len(known)}, this model's module types ({', '.join(known)})")
    if not examples:
        raise DataError("there is no prompt to score: expected one example or more")
    missing: list[dict[str, str]] = []
    peaks: list[float] = []

    def scored(rows: Sequence[Example], of=model, mask=(tokens, skip_first), eva_rank: int | None = None) -> NFNReport:
        batches = batches_of(rows, SCORE_ROWS, *mask)
        return score(of, batches, baseline=baseline, seed=seed, backend=backend, eva_rank=eva_rank, progress=progress)

    def skip(kind: str, what: str, why: str) -> None:
        missing.append({"kind": kind, "what": what, "why": why})
        say(f"{kind}, {what}: left out: {why}")

    def tried(kind: str, what: str, make: Callable[[], Any]) -> Any:
        say(f"{kind}: {what}")
        try:
            return make()
        except PlopfastError as error:
            skip(kind, what, str(error))

    say(f"NFN of {len(examples)} prompts")
    scored(examples[:SCORE_ROWS])  # what only a first pass pays for is no part of the cost
    base, nfn_s, nfn_mib = _measured(partial(scored, examples), model, peaks)
    types = base.types

    stability = tried("stability", "random subsets of the prompts", lambda: subset_rows(base, k, seed)) or []
    lengths = _doubled_below(max(len(example.tokens) for example in examples))
    if not lengths:
        skip("stability", "shorter rows", f"no row is longer than {SHORTEST} tokens")
    for length in lengths:
        what = f"first {length} tokens"
        if report := tried("stability", what, partial(scored, [truncated(e, length) for e in examples])):
            stability.append(_agreement("length", what, types, [report.types], k))
    if not others:
        skip("stability", "other samples", "none was given (a run draws none where it scores every training row)")
    found = [tried("stability", f"other sample {i}", partial(scored, rows)) for i, rows in enumerate(others, 1)]
    if drawn := [report.types for report in found if report]:
        stability.append(_agreement("seed", f"{len(drawn)} other samples", types, drawn, k))

    masks = []
    for what, mask in _masks(examples, skip).items():
        same = mask == (tokens, skip_first)
        if report := base if same else tried("tokens", what, partial(scored, examples, mask=mask)):
            masks.append(_ranked(what, report.types, types, k))

    controls = []
    for what, make in {
        "random tokens": lambda: scored(random_tokens(examples, tokenizer, seed)),
        "shuffled words": lambda: scored(shuffled_words(examples, tokenizer, seed, context_length(model))),
        "random weights": lambda: scored(examples, of=random_model(model, seed)),
    }.items():
        began = time.perf_counter()
        if report := tried("control", what, make):
            controls.append(_ranked(what, report.types, types, k) | {"seconds": time.perf_counter() - began})

    criteria = [_criterion(RULES["plop"], types, types, k, nfn_s, nfn_s, nfn_mib)]
    given = Given(model, examples, rank, seed, progress, lambda: scored(examples, eva_rank=rank))
    for rule, compute in compared():
        if got := tried("criterion", rule.criterion, partial(_measured, partial(compute, given), model, peaks)):
            by_module, seconds, extra_mib = got
            means = rule.type_scores(by_module, of_type, types)
            criteria.append(_criterion(rule, means, types, k, seconds, nfn_s, extra_mib))
    ours = pick(types, k)
    return {
        "model": base.model, "k": k, "rank": rank, "prompts": base.prompts, "scored_tokens": base.tokens, "seed": seed,
        "score_tokens": tokens, "skip_first": skip_first, "pick": ours, "types": types, "stability": stability,
        "tokens": masks, "controls": controls, "verdict": verdict(ours, controls), "criteria": criteria,
        "missing": missing, "peak_mib": round(max([*peaks, machine.peak_mib()]), 1),
    }  # fmt: skip


def _masks(examples: Sequence[Example], skip: Callable[[str, str, str], None]) -> dict[str, tuple[str, bool]]:
    """What to call it -> `tokens` and `skip_first` of `batches_of`, for what these rows have."""
    masks = {"all tokens": ("all", False), "without the first token": ("all", True)}
    if any(example.completion is not None or example.start > 1 for example in examples):
        masks |= {"prompt tokens": ("prompt", False), "completion tokens": ("completion", False)}
    else:
        skip("tokens", "prompt and completion tokens", "the rows are plain text, without a prompt")
    roles = sorted({role for example in examples for role in example.roles or ()})
    if not roles:
        skip("tokens", "tokens by role", "the rows are no messages, or the chat template rewrites earlier messages")
    return masks | {f"{role} tokens": (role, False) for role in roles}


def _ranked(what: str, values: Mapping[str, float], base: Mapping[str, float], k: int) -> dict[str, Any]:
    return {"what": what, "types": dict(values), "pick": pick(values, k), "tau": _tau(base, values)}


def _criterion(
    rule: Rule, values: Mapping[str, float], base: Mapping[str, float], k: int, seconds: float, nfn_s: float, mib: float
) -> dict[str, Any]:
    picked = pick(values, k, rule.highest)
    return {
        "name": rule.criterion, "source": rule.source, "chooses": "highest" if rule.highest else "lowest",
        "types": {type_: values[type_] for type_ in ranked(values, rule.highest)}, "pick": picked,
        "tau": _tau(base, values, -1 if rule.highest else 1), "agrees": set(picked) == set(pick(base, k)),
        "seconds": seconds, "cost": seconds / nfn_s, "extra_mib": mib, "needs": rule.needs,
    }  # fmt: skip


def _measured(make: Callable[[], Any], model: nn.Module, peaks: list[float]) -> tuple[Any, float, float]:
    """(what `make` returns, seconds, MiB at most above what was taken before). Measuring resident memory starts its peak
    anew, so that the one before goes to `peaks`."""
    device = device_of(model)
    peaks.append(machine.peak_mib())
    machine.reset_peak(device)
    before, began = machine.peak_mib(device), time.perf_counter()
    value, after = make(), machine.peak_mib(device)
    return value, time.perf_counter() - began, round(after - before, 1)


def verdict(ours: Sequence[str], controls: Sequence[Mapping[str, Any]]) -> str:
    """What the controls say of the pick `ours`, in a sentence or two."""
    rows = {row["what"]: row for row in controls}
    texts = {what: rows[what]["pick"] for what in ("random tokens", "shuffled words") if what in rows}
    moved = {what: other for what, other in texts.items() if set(other) != set(ours)}
    kept = [what for what in texts if what not in moved]
    picked = f"the pick ({', '.join(ours)})"
    if controls and len(ours) == len(controls[0]["types"]):
        said = "every module type is picked, so that there is no choice to control"
    elif moved:
        said = f"{picked} depends on the text: " + "; ".join(f"{w} give {', '.join(p)}" for w, p in moved.items())
        said += f"; {kept[0]} leave it as it is" if kept else ""
    elif len(kept) == 2:
        said = f"{picked} stays the same on random tokens and on shuffled words: it reflects the model rather than the task"
    elif kept:
        said = f"{picked} stays the same on {kept[0]}; the other control is missing, so that this settles nothing"
    else:
        said = f"neither random tokens nor shuffled words could be scored: whether {picked} reflects the task is open"
    if "random weights" in rows:
        low, high = min(rows["random weights"]["types"].values()), max(rows["random weights"]["types"].values())
        near = max(abs(low - 1), abs(high - 1)) <= NEAR_ONE
        said += f". With random weights the types score {low:.2f} to {high:.2f}, " + (
            "near 1 as they should" if near else "not near 1: this architecture alone moves the scores"
        )
    return said[0].upper() + said[1:] + "."


def table(found: Mapping[str, Any]) -> str:
    """An audit as text."""

    def named(types: Sequence[str]) -> str:
        return ", ".join(types)

    width = max(map(len, (f"{row['what']}" for part in ("stability", "tokens", "controls") for row in found[part])))
    lines = [f"NFN of {found['prompts']} prompts picks {named(found['pick'])}", ""]
    lines.append(f"{'stability':<{width}}  {'repeats':>7} {'tau':>6} {'lowest':>6}  same pick")
    for row in found["stability"]:
        lines.append(
            f"{row['what']:<{width}}  {row['repeats']:>7} {row['tau']:>6.2f} {row['tau_low']:>6.2f}  {row['same_pick']:>9.0%}"
        )
    lines.append("(subsets are of the scored prompts themselves, and other samples can share some with them)")
    types = list(found["types"])
    for part in ("tokens", "controls"):
        lines += ["", f"{part:<{width}}  {'tau':>6}  " + " ".join(f"{t:>9}" for t in types) + "  pick"]
        for row in found[part]:
            values = " ".join(f"{row['types'][t]:>{max(9, len(t))}.3f}" for t in types)
            lines.append(f"{row['what']:<{width}}  {row['tau']:>6.2f}  {values}  {named(row['pick'])}")
    lines += ["", found["verdict"], ""]
    lines.append(f"{'criterion':<16}  {'chooses':<7}  {'tau':>5}  {'seconds':>7} {'of NFN':>6} {'MiB':>6}  pick")
    for row in found["criteria"]:
        lines.append(
            f"{row['name']:<16}  {row['chooses']:<7}  {row['tau']:>5.2f}  {row['seconds']:>7.2f} {row['cost']:>5.1f}x "
            f"{row['extra_mib']:>6.0f}  {named(row['pick'])}{'' if row['agrees'] else '  (disagrees)'}"
        )
    lines += [f"left out: {row['kind']}, {row['what']}: {row['why']}" for row in found["missing"]]
    return "\n".join(lines)


def run_audit(run: Run) -> str:
    """The audit of a run's model and task, on as many prompts as its settings say: audit.json, and the table."""
    config = run.config
    if config.compat:
        raise ConfigError(
            "plopfast audit needs statistics of single prompts, which --compat official has not: leave it out"
        )
    rows = len(run.rows("train"))  # broken data should stop the run before the model is loaded
    run.begin("audit")
    examples = run.sample()
    others = [run.sample(config.seed + i) for i in range(1, OTHER_SAMPLES + 1)] if len(examples) < rows else []
    with run.stage("audit") as noted:
        found = audit(
            run.model, run.tokenizer, examples, others=others, k=config.k, rank=config.rank, seed=config.seed,
            tokens=config.score_tokens, skip_first=config.skip_first, baseline=config.baseline, backend=config.backend,
            progress=run.progress, say=run.say,
        )  # fmt: skip
        noted["peak_mib"] = found["peak_mib"]
    files.write_json(run.file("audit"), {"plopfast": "audit", **found})
    return table(found)
