"""The placement rules: `RULES`, the one table of them, and what is derived from it.

A new rule is one entry of `RULES`. `place`, the help of --rule and --arms, the arms of a trial, the rules that a search
tries, early stopping, the audit's list of criteria and the report's sentences all read the table.

This file imports no torch, as the command line reads it for --help.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, geometric_mean, median
from typing import TYPE_CHECKING

from ..scoring.outliers import OUTLIER, robust_z

if TYPE_CHECKING:
    from ..scoring.report import NFNReport

Scores = dict[str, float]
NFN = "NFN"
FULL = "full"  # the arm that trains all weights; it is no rule, and no rule may take its name
EACH_TYPE, EACH_LAYER_THIRD = "each-type", "each-layer-third"  # these stand for several arms, and are no rules, either
STRONGEST = "strongest-module"  # the arm of the one module of highest gradient energy; no rule, as rules choose types

# last components of the names that transformers' models give to these projections, fused ones included
ATTENTION_INPUTS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "q", "k", "v", "query", "key", "value",
    "kv_proj", "query_proj", "key_proj", "value_proj", "q_lin", "k_lin", "v_lin", "Wq", "Wk", "Wv", "project_q", "project_k",
    "project_v",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",  # of latent attention (DeepSeek-V2, arXiv 2405.04434)
)  # fmt: skip
QUERIES_AND_KEYS = (  # without the fused ones, which hold the values too
    "q_proj", "k_proj", "q", "k", "query", "key", "query_proj", "key_proj", "q_lin", "k_lin", "Wq", "Wk", "project_q", "project_k",
    "q_a_proj", "q_b_proj",
)  # fmt: skip
MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "fc1", "fc2", "w1", "w2", "w3")
MLP_PARENTS = ("mlp", "feed_forward", "ffn")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How module types are chosen: either the first k of a ranking (`ranks_by`), or what a function returns (`pick`).

    A rule that ranks by NFN also tells early scoring when to stop, and can choose single modules. The scores of any other
    criterion are computed apart (studies/criteria.py), so `place` has to be given them: the audit and a trial do so.
    """

    name: str
    help: str  # the types it chooses, in a few words, for --rule
    ranks_by: str = ""  # NFN, or a criterion by its name in the audit
    highest: bool = False  # whether a ranking begins with the highest score
    mean: Callable[[list[float]], float] = fmean  # a type's score in a ranking, from its modules' scores
    pick: Callable[["NFNReport", int, int], list[str]] | None = None  # (report, k, seed) -> types
    needs_k: bool = False  # whether it chooses k types
    seeded: bool = False  # whether another seed gives other types
    source: str = ""  # the audit compares the rules that have a source
    needs: str = ""  # what its scores take, for the audit

    @property
    def by_nfn(self) -> bool:
        return self.ranks_by == NFN

    @property
    def from_report(self) -> bool:
        """Whether the NFN report is all that it needs."""
        return self.ranks_by in ("", NFN)

    @property
    def criterion(self) -> str:
        """Its name in the audit."""
        return self.ranks_by or self.name

    def type_scores(self, by_module: Mapping[str, float], type_of: Mapping[str, str], types: Iterable[str]) -> Scores:
        """Returns type -> mean score of its modules, in the order of `types`. `type_of`: module -> type."""
        return {
            type_: self.mean([score for name, score in by_module.items() if type_of[name] == type_]) for type_ in types
        }


def ranked(scores: Mapping[str, float], highest: bool = False) -> list[str]:
    """Returns the names by score, lowest first unless `highest`. Equal scores keep their order."""
    return sorted(scores, key=lambda name: scores[name], reverse=highest)


def _attention(report: "NFNReport", _k: int, _seed: int) -> list[str]:
    return [type_ for type_ in report.types if {*type_.split(".")} & {*ATTENTION_INPUTS}]


def _mlp(report: "NFNReport", _k: int, _seed: int) -> list[str]:
    parents: dict[str, set[str]] = {}
    for name, score in report.scores.items():
        if score.layer is not None:
            parents.setdefault(score.type, set()).update(name.split(".")[:-1])
    return [t for t in report.types if t.split(".")[-1] in MLP_NAMES or parents[t] & set(MLP_PARENTS)]


def _random(report: "NFNReport", k: int, seed: int) -> list[str]:
    return random.Random(seed).sample(sorted(report.types), k)


def _without_queries_and_keys(report: "NFNReport", _k: int, _seed: int) -> list[str]:
    return [type_ for type_ in report.types if not {*type_.split(".")} & {*QUERIES_AND_KEYS}]


def _mean_without_outliers(values: list[float]) -> float:
    return fmean(v for v, z in zip(values, robust_z(values), strict=True) if abs(z) <= OUTLIER)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            name="plop", help="the k types of lowest NFN", ranks_by=NFN, needs_k=True,
            source="PLoP, arXiv 2506.20629", needs="forward passes",
        ),
        Rule(name="plop-inverse", help="the k types of highest NFN", ranks_by=NFN, highest=True, needs_k=True),
        Rule(name="attn", help="query, key and value", pick=_attention),
        Rule(name="mlp", help="the MLPs", pick=_mlp),
        Rule(name="all", help="every type", pick=lambda report, _k, _seed: list(report.types)),
        Rule(
            name="input-spectrum", help="the k types whose inputs lie most along a few directions", needs_k=True,
            ranks_by="input spectrum", highest=True, source="EVA, arXiv 2410.07170", needs="forward passes",
        ),
        Rule(
            name="condition-number", help="the k types of lowest condition number", needs_k=True,
            ranks_by="condition number", mean=geometric_mean, source="KappaTune, arXiv 2506.16289", needs="weights alone",
        ),
        Rule(
            name="gradient-energy", help="the k types of highest gradient energy", needs_k=True,
            ranks_by="gradient energy", highest=True, source="first-order gain of a step in B at B = 0",
            needs="one backward pass",
        ),
        Rule(
            name="no-qk", help="every type but query and key", pick=_without_queries_and_keys,
        ),
        Rule(
            name="nfn-median", help="the k types of lowest median NFN over the layers", needs_k=True,
            ranks_by="median NFN", mean=median, needs="forward passes",
        ),
        Rule(
            name="nfn-no-outliers", help="the k types of lowest NFN, without outlier layers", needs_k=True,
            ranks_by="NFN without outlier layers", mean=_mean_without_outliers, needs="forward passes",
        ),
        Rule(
            name="nfn-per-size", help="the k types of lowest NFN / (n_in n_out)", needs_k=True,
            ranks_by="NFN / size", needs="forward passes",
        ),
        Rule(
            name="weight-nfn", help="the k types of lowest spectral norm of W over that of a random one", needs_k=True,
            ranks_by="weight-only NFN", needs="weights alone",
        ),
        Rule(
            name="weight-size", help="the k types of the largest weights", needs_k=True,
            ranks_by="size of the weight", highest=True, needs="nothing",
        ),
        Rule(
            name="random", help="k types drawn with the seed", pick=_random, needs_k=True, seeded=True,
            source="seeded draw", needs="nothing",
        ),
    )
}  # fmt: skip


def rule_of(text: str) -> str | list[str]:
    """Returns what a setting names: a rule, or a list of the module types and module names between its commas."""
    return text if text in RULES else [name.strip() for name in text.split(",") if name.strip()]


def nfn_rule(name: str) -> Rule | None:
    """Returns the rule of this name if it ranks by NFN; None for other rules and for what is no rule."""
    rule = RULES.get(name)
    return rule if rule and rule.by_nfn else None


def command_rules() -> list[str]:
    """Returns the rules that a command can place by: those that need nothing but the NFN report."""
    return [name for name, rule in RULES.items() if rule.from_report]


def arm_names() -> list[str]:
    """Returns the arms that a trial can compare, besides module types."""
    return [*RULES, STRONGEST, FULL]


def help_words() -> dict[str, str]:
    """Returns the words that the help texts in support/config.py leave open, as support may not import this wing."""
    *most, last = [name for name in command_rules() if RULES[name].needs_k]
    return {
        "rules": ", ".join(f"{name} ({RULES[name].help})" for name in command_rules()),
        "arms": f"{', '.join(arm_names())}, module types joined by +, {EACH_TYPE} (alone) or {EACH_LAYER_THIRD}",
        "rules_with_k": f"{', '.join(most)} and {last}",
    }
