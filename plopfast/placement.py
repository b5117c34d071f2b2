"""Where the adapters go: a rule applied to NFN scores gives modules with their rank and alpha.

PLoP (arXiv 2506.20629) adapts the k module types with the lowest mean NFN; the other rules are the baselines that its
comparisons use.
"""

import difflib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import files
from .errors import FileError, PlacementError
from .nfn import ModuleScore, NFNReport

RULES = ("plop", "plop-inverse", "attn", "mlp", "all", "random")
# last components of the names that transformers' models give to these projections, fused ones included
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "q", "k", "v")
MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "fc1", "fc2", "w1", "w2", "w3")
MLP_PARENTS = ("mlp", "feed_forward", "ffn")


@dataclass
class Placement:
    """`modules`: name -> (rank, alpha); `margin`: NFN between the k-th and the (k+1)-th type, for plop rules."""

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

    def __str__(self) -> str:
        ranks = sorted({rank for rank, _ in self.modules.values()})
        lines = [
            f"{self.rule}: {', '.join(self.types)}: {len(self.modules)} modules, rank {'/'.join(map(str, ranks))}, "
            f"{self.parameters:,} trainable parameters"
        ]
        if self.margin is not None:
            lines.append(f"margin between the last type chosen and the first left out: {self.margin:.3f} NFN")
        return "\n".join(lines + self.notes)


def place(
    report: NFNReport,
    rule: str | Sequence[str] = "plop",
    *,
    k: int = 3,
    rank: int = 16,
    alpha: float = 32,
    match_params: Placement | None = None,
    seed: int = 0,
) -> Placement:
    """The modules that `rule` picks from the scored ones, each with the same rank and alpha.

    Rules: "plop" (the k types of lowest NFN), "plop-inverse" (highest), "attn" (query, key, value), "mlp", "all",
    "random" (k types, seeded), or a list of module types and module names. `match_params` replaces `rank` by the one
    whose parameter count is nearest to another placement's; alpha stays. Parameters are rank * (n_in + n_out), summed.
    Raises PlacementError for unknown rules and names (with the nearest), an impossible k, or a rank that does not fit.
    """
    scored = {name: score for name, score in report.scores.items() if score.layer is not None}
    types = list(report.types)
    margin = None
    if not isinstance(rule, str):
        chosen, modules = _explicit(rule, scored, types)
        rule = "explicit"
    else:
        if rule not in RULES:
            raise PlacementError(f"rule {rule!r}: expected {', '.join(RULES)} or a list of types{_near(rule, RULES)}")
        if rule in ("plop", "plop-inverse", "random") and not 1 <= k <= len(types):
            raise PlacementError(f"k = {k}: expected 1 to {len(types)}, this model's module types ({', '.join(types)})")
        if rule == "plop-inverse":
            types.reverse()
        if rule in ("plop", "plop-inverse"):
            chosen = types[:k]
            margin = abs(report.types[types[k]] - report.types[types[k - 1]]) if k < len(types) else None
        elif rule == "random":
            chosen = random.Random(seed).sample(sorted(types), k)
        else:
            chosen = [type_ for type_ in types if rule == "all" or _is_of(rule, type_, scored)]
            if not chosen:
                raise PlacementError(f"rule {rule!r} knows none of the types {', '.join(types)}: name them instead")
        modules = [name for name, score in scored.items() if score.type in chosen]
    sizes = sum(scored[name].n_in + scored[name].n_out for name in modules)
    notes = []
    if match_params is not None:
        rank = max(1, round(match_params.parameters / sizes))
        off = rank * sizes / match_params.parameters - 1
        notes.append(f"rank {rank} is nearest to {match_params.parameters:,} parameters ({off:+.2%})")
    for name in modules:
        n_in, n_out = scored[name].n_in, scored[name].n_out
        if not 1 <= rank <= min(n_in, n_out):
            raise PlacementError(
                f"{name}: rank {rank} does not fit its {n_out} x {n_in} weight: 1 to {min(n_in, n_out)}"
            )
    return Placement(dict.fromkeys(modules, (rank, alpha)), chosen, rule, rank * sizes, margin, report.model, notes)


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
            raise PlacementError(f"{name!r} is neither a module type nor a module of this model{_near(name, known)}")
    if not names:
        raise PlacementError(f"no module named; expected some of the types {', '.join(types)}")
    modules = [name for name, score in scored.items() if score.type in names or name in names]
    return [type_ for type_ in types if any(scored[name].type == type_ for name in modules)], modules


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
