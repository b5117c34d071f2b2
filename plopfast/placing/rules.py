"""The placement rules, by name."""

import random
from collections.abc import Sequence

from ..scoring.report import ModuleScore, NFNReport
from ..support.errors import PlacementError, nearest

BY_NFN = ("plop", "plop-inverse")
BY_K = (*BY_NFN, "random")  # the rules that choose k types
RULES = (*BY_NFN, "attn", "mlp", "all", "random")


# last components of the names that transformers' models give to these projections, fused ones included
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "q", "k", "v")
MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "fc1", "fc2", "w1", "w2", "w3")
MLP_PARENTS = ("mlp", "feed_forward", "ffn")


def rule_of(text: str) -> str | list[str]:
    """What a setting names: a rule, or module types and module names with commas."""
    return text if text in RULES else [name.strip() for name in text.split(",") if name.strip()]


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
