"""Where the adapters go: a rule applied to NFN scores gives modules with their rank and alpha.

PLoP (arXiv 2506.20629) adapts the k module types with the lowest mean NFN; the other rules are the baselines that its
comparisons use.
"""

import difflib
import heapq
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from . import files
from .errors import FileError, PlacementError
from .scores import ModuleScore, NFNReport

BY_NFN = ("plop", "plop-inverse")
BY_K = (*BY_NFN, "random")  # the rules that choose k types
RULES = (*BY_NFN, "attn", "mlp", "all", "random")
# last components of the names that transformers' models give to these projections, fused ones included
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "q", "k", "v")
MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "fc1", "fc2", "w1", "w2", "w3")
PARAMETER_BYTES = 4  # adapters are float32
MLP_PARENTS = ("mlp", "feed_forward", "ffn")


@dataclass
class Placement:
    """`modules`: name -> (rank, alpha); `margin`: NFN between the k-th and the (k+1)-th type, for plop rules; `notes`: how
    sure the choice is, and what a budget did."""

    modules: dict[str, tuple[int, float]]
    types: list[str]
    rule: str
    parameters: int
    margin: float | None = None
    model: str = ""
    notes: list[str] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically."""
        files.write_json(Path(path), {"plopfast": "placement", **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> "Placement":
        value = files.read_json(Path(path), "plopfast place")
        try:
            value.pop("plopfast")
            placement = cls(**value)
            placement.modules = {name: (int(rank), float(alpha)) for name, (rank, alpha) in placement.modules.items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileError(f"{path}: not a placement file ({error}); make it anew with plopfast place") from None
        return placement

    def peft_config(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig` that adapt the same modules with the same ranks and alphas."""
        return {"task_type": "CAUSAL_LM", "target_modules": sorted(self.modules), **ranks_and_patterns(self.modules)}

    def __str__(self) -> str:
        ranks = [rank for rank, _ in self.modules.values()]
        span = f"rank {ranks[0]}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
        lines = [
            f"{self.rule}: {', '.join(self.types)}: {len(self.modules)} modules, {span}, "
            f"{self.parameters:,} trainable parameters"
        ]
        if self.margin is not None and not any("margin" in note for note in self.notes):
            lines.append(f"margin between the last type chosen and the first left out: {self.margin:.3f} NFN")
        return "\n".join(lines + self.notes)


def rule_of(text: str) -> str | list[str]:
    """What a setting names: a rule, or module types and module names with commas."""
    return text if text in RULES else [name.strip() for name in text.split(",") if name.strip()]


def ranks_and_patterns(modules: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """PEFT's `r`, `lora_alpha`, `rank_pattern` and `alpha_pattern` for modules with (rank, alpha): the commonest values, and
    the modules that have others, as regular expressions of their names."""
    common = [Counter(column).most_common(1)[0][0] for column in zip(*modules.values(), strict=True)]
    rank_pattern, alpha_pattern = (
        {re.escape(name): values[i] for name, values in modules.items() if values[i] != common[i]} for i in (0, 1)
    )
    return {"r": common[0], "lora_alpha": common[1], "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def place(
    report: NFNReport,
    rule: str | Sequence[str] = "plop",
    *,
    k: int = 3,
    rank: int = 16,
    alpha: float = 32,
    seed: int = 0,
    budget: int | str | None = None,
    ranks: str = "equal",
    granularity: str = "type",
    cap: int | None = None,
) -> Placement:
    """The modules that `rule` picks from the scored ones, each with its rank, and all with the same alpha.

    Rules: "plop" (the k types of lowest NFN), "plop-inverse" (highest), "attn" (query, key, value), "mlp", "all",
    "random" (k types, seeded), or a list of module types and module names. Parameters are rank * (n_in + n_out), summed.

    `budget` sets the ranks instead of `rank`: parameters (an int, or "2.5M"), bytes of the float32 tensors ("10MB", "8MiB";
    an adapter file's header comes on top, some 100 bytes a tensor), or "match:all:r8", the parameters of another rule at a
    rank. It is never exceeded, and what it leaves is less than one rank of any chosen module that could take one more.
    `ranks` shares it out, one rank at a time to the module with the most weight for each rank it would then have
    (D'Hondt's apportionment): "equal" weights, so that ranks differ by one at most but for modules that are full or too
    large for the rest, or "proportional" to 1 / NFN.

    `granularity` "module" (experimental; the paper chooses types) takes the modules of lowest NFN one by one at `rank`
    while the budget lasts, at most `cap` of a type, and shares out the rest; `k` is not used then.

    Where a budget moves the rank, alpha and the learning rate stay as they are. For a random A, B = 0 and Adam, the best
    learning rate goes with 1 / sqrt(scaling * rank) (Chen, Villar and Hayou, arXiv 2602.06204, for large widths): it does not
    depend on the rank with the scaling alpha / rank, which Schulman et al. 2025 ("LoRA Without Regret") measured to be so
    within a factor of 2 from rank 4 to 512, and falls with its fourth root with rsLoRA's alpha / sqrt(rank). `notes` says
    so where ranks move.

    Raises PlacementError for unknown rules and names (with the nearest), an impossible k, a rank that does not fit, and a
    budget that cannot be read, is below the smallest adapter or above the largest.
    """
    scored = {name: score for name, score in report.scores.items() if score.layer is not None}
    if ranks not in ("equal", "proportional"):
        raise PlacementError(f"ranks {ranks!r}: expected equal or proportional")
    if granularity not in ("type", "module"):
        raise PlacementError(f"granularity {granularity!r}: expected type or module")
    if granularity == "type" and cap is not None:
        raise PlacementError(f"cap {cap}: limits the modules of a type, which needs granularity 'module'")
    allowed = None if budget is None else _parameters(report, budget, k, alpha, seed)
    if granularity == "type":
        chosen, modules, margin, notes = _by_type(report, scored, rule, k, seed)
    else:
        modules = _by_module(scored, rule, rank, allowed, cap)
        chosen = [type_ for type_ in report.types if any(scored[name].type == type_ for name in modules)]
        margin, notes = None, ["chosen module by module, which is experimental: the paper chooses types"]
    if allowed is None:
        for name in modules:
            n_in, n_out = scored[name].n_in, scored[name].n_out
            if not 1 <= rank <= min(n_in, n_out):
                raise PlacementError(
                    f"{name}: rank {rank} does not fit its {n_out} x {n_in} weight: 1 to {min(n_in, n_out)}"
                )
        given = dict.fromkeys(modules, rank)
    else:
        given = _shared_out(allowed, {name: scored[name] for name in modules}, ranks == "proportional")
        low, high = min(given.values()), max(given.values())
        if (low, high) != (rank, rank):
            span = f"rank {low}" if low == high else f"ranks {low} to {high}"
            notes.append(
                f"{span} instead of {rank}: keep alpha {alpha:g} and the learning rate, whose best value hardly depends on "
                "the rank where the scaling is alpha / rank (with --rslora it goes with rank^-1/4; arXiv 2602.06204)"
            )
    parameters = sum(r * _size(scored[name]) for name, r in given.items())
    if allowed is not None:
        notes.append(f"budget {allowed:,} parameters, {allowed - parameters:,} of them left")
    name_of_rule = rule if isinstance(rule, str) else "explicit"
    return Placement(
        {name: (r, alpha) for name, r in given.items()}, chosen, name_of_rule, parameters, margin, report.model, notes
    )


def _by_type(
    report: NFNReport, scored: dict[str, ModuleScore], rule: str | Sequence[str], k: int, seed: int
) -> tuple[list[str], list[str], float | None, list[str]]:
    """Types, modules, margin and notes of a rule."""
    types = list(report.types)
    if not isinstance(rule, str):
        return *_explicit(rule, scored, types), None, []
    if rule not in RULES:
        raise PlacementError(f"rule {rule!r}: expected {', '.join(RULES)} or a list of types{nearest(rule, RULES)}")
    if rule in BY_K and not 1 <= k <= len(types):
        raise PlacementError(f"k = {k}: expected 1 to {len(types)}, this model's module types ({', '.join(types)})")
    margin, notes = None, []
    if rule == "plop-inverse":
        types.reverse()
    if rule in BY_NFN:
        chosen = types[:k]
        margin = abs(report.types[types[k]] - report.types[types[k - 1]]) if k < len(types) else None
        confidence = report.settings.get("confidence") or 0.95
        if decision := report.decide(k, confidence, inverse=rule == "plop-inverse"):
            notes.append(decision.note)
    elif rule == "random":
        chosen = random.Random(seed).sample(sorted(types), k)
    else:
        chosen = [type_ for type_ in types if rule == "all" or _is_of(rule, type_, scored)]
        if not chosen:
            raise PlacementError(f"rule {rule!r} knows none of the types {', '.join(types)}: name them instead")
    return chosen, [name for name, score in scored.items() if score.type in chosen], margin, notes


def _by_module(
    scored: dict[str, ModuleScore], rule: str | Sequence[str], rank: int, budget: int | None, cap: int | None
) -> list[str]:
    """The modules of lowest (or highest) NFN that the budget pays for at `rank`, in the model's order."""
    if budget is None or rule not in BY_NFN:
        raise PlacementError("granularity 'module' needs a budget, and the rule plop or plop-inverse")
    if rank < 1 or (cap is not None and cap < 1):
        raise PlacementError(f"rank {rank}, cap {cap}: expected 1 or more")
    order = sorted(scored, key=lambda name: scored[name].nfn, reverse=rule == "plop-inverse")
    taken: list[str] = []
    left = budget
    for name in order:
        if cap is not None and sum(scored[other].type == scored[name].type for other in taken) >= cap:
            continue
        left -= min(rank, _full_rank(scored[name])) * _size(scored[name])
        if left < 0:
            break
        taken.append(name)
    if not taken:
        cost = min(rank, _full_rank(scored[order[0]])) * _size(scored[order[0]])
        raise PlacementError(
            f"budget {budget:,} parameters: below the smallest adapter, the first module {order[0]} at rank {rank}, which "
            f"takes {cost:,}: raise it, or lower the rank"
        )
    return [name for name in scored if name in taken]


def _shared_out(budget: int, modules: dict[str, ModuleScore], proportional: bool) -> dict[str, int]:
    """The ranks that a budget of parameters gives to modules, one at least to each."""
    least = sum(map(_size, modules.values()))
    most = sum(_full_rank(score) * _size(score) for score in modules.values())
    if budget < least:
        raise PlacementError(
            f"budget {budget:,} parameters: below the smallest adapter on these {len(modules)} modules, which takes {least:,} "
            "at rank 1: raise it, or choose fewer modules"
        )
    if budget > most:
        raise PlacementError(
            f"budget {budget:,} parameters: above the {most:,} that full ranks of these {len(modules)} modules take: "
            "lower it, or choose more modules"
        )
    order = sorted(modules, key=lambda name: modules[name].nfn)
    price = {name: modules[name].nfn if proportional else 1.0 for name in order}  # 1 / weight, which NFN 0 has not
    given = dict.fromkeys(modules, 1)
    left = budget - least
    queue = [(2 * price[name], place, name) for place, name in enumerate(order)]
    heapq.heapify(queue)
    while queue:
        _, place, name = heapq.heappop(queue)
        size, full = _size(modules[name]), _full_rank(modules[name])
        if size <= left and given[name] < full:  # else never again: left only falls
            given[name] += 1
            left -= size
            heapq.heappush(queue, ((given[name] + 1) * price[name], place, name))
    return given


def _size(score: ModuleScore) -> int:
    """Parameters of one rank."""
    return score.n_in + score.n_out


def _full_rank(score: ModuleScore) -> int:
    return min(score.n_in, score.n_out)


def _parameters(report: NFNReport, budget: int | str, k: int, alpha: float, seed: int) -> int:
    """The parameters that a budget allows."""
    if isinstance(budget, int) and not isinstance(budget, bool):
        return budget
    text = str(budget).strip()
    if match := re.fullmatch(r"match:(?P<rule>[^:]+):r(?P<rank>\d+)", text):
        return place(report, match["rule"], k=k, rank=int(match["rank"]), alpha=alpha, seed=seed).parameters
    if match := re.fullmatch(r"(?P<number>\d+(\.\d+)?) *(?P<unit>|[kKMG]|[kKMG]i?B|B)", text):
        base, power = 1024 if "i" in match["unit"] else 1000, "BKMG".index((match["unit"].upper() or "B")[0])
        allowed = Fraction(match["number"]) * base**power  # as 67.1 * 10**6 falls short of 67,100,000
        return int(allowed / (PARAMETER_BYTES if "B" in match["unit"] else 1))
    raise PlacementError(
        f"budget {budget!r}: expected parameters (2396160, 2.5M), bytes (10MB, 8MiB) or match:RULE:rRANK (match:all:r8)"
    )


def _is_of(rule: str, type_: str, scored: dict[str, ModuleScore]) -> bool:
    last = type_.split(".")[-1]
    if rule == "attn":
        return last in ATTENTION_INPUTS
    parents = {part for name, score in scored.items() if score.type == type_ for part in name.split(".")[:-1]}
    return last in MLP_NAMES or bool(parents & set(MLP_PARENTS))


def _explicit(names: Sequence[str], scored: dict[str, ModuleScore], types: list[str]) -> tuple[list[str], list[str]]:
    for name in names:
        if name not in types and name not in scored:
            known = [*types, *scored]
            raise PlacementError(f"{name!r} is neither a module type nor a module of this model{nearest(name, known)}")
    if not names:
        raise PlacementError(f"no module named; expected some of the types {', '.join(types)}")
    modules = [name for name, score in scored.items() if score.type in names or name in names]
    return [type_ for type_ in types if any(scored[name].type == type_ for name in modules)], modules


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown name: what may have been meant, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
