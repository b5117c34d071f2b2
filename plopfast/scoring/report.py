"""The scores of a model's modules: nfn.py measures them, placement chooses by them, the report shows them."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from safetensors.torch import save_file
from typing_extensions import TypedDict

from ..support import files
from ..support.errors import ConfigError, FileError
from ..support.schema import Count, NotNegative, Share, Size, checked
from ..support.strict_json import dumps
from ..support.tables import Column, Table
from .outliers import OUTLIER, robust_z
from .stopping import Decision, Intervals, decide, intervals

NAMED = 8  # types in a note


@dataclass(frozen=True)
class ModuleScore:
    """One module's NFN, its mean and standard deviation over `tokens` tokens, and the module's type, layer and shape.

    A weight of `experts` experts is one module: a token counts once for each expert that it is routed to, with that
    expert's part [n_out, n_in] of the weight. So its NFN is the mean of the experts' own, weighted by their tokens.
    """

    nfn: NotNegative
    std: NotNegative
    tokens: Count
    type: str
    layer: Count | None
    n_in: Size
    n_out: Size
    experts: Size = 1


@dataclass(frozen=True)
class ExpertScores:
    """The NFN of each of a layer's experts (None where no token reached it), and how many tokens it is the mean of."""

    nfn: list[NotNegative | None]
    tokens: list[Count]


def types_of(modules: Iterable[Any]) -> list[str]:
    """Return the type of each module (ModuleScore or LinearInfo), as stopping.py takes it; the output head's is empty."""
    return ["" if module.layer is None else module.type for module in modules]


def unseen_note(modules: Sequence[Any]) -> list[str]:
    """A line that says which modules (LinearInfo) have no score, as no token that counts reached them; none for none."""
    types = sorted({module.type for module in modules})
    named = ", ".join(types[:NAMED]) + (", ..." if len(types) > NAMED else "")
    line = f"left out: {len(modules)} modules that no token reached by a call ({named}), so no rule chooses them"
    return [line] if modules else []


def lonely_note(report: "NFNReport") -> list[str]:
    """A line that says how many experts no token reached, and in which layers; none for none."""
    by_layer: dict[int | None, int] = {}
    total = 0
    for name, each in report.experts.items():
        if name.endswith("down_proj"):  # both weights of a layer's experts see the same tokens
            total += len(each.tokens)
            if alone := each.tokens.count(0):
                by_layer[report.scores[name].layer] = alone
    if not by_layer:
        return []
    where = ", ".join(f"{count} in layer {layer}" for layer, count in list(by_layer.items())[:NAMED])
    more = ", ..." * (len(by_layer) > NAMED)
    return [f"no token reached {sum(by_layer.values())} of {total} experts ({where}{more}), so their NFN is not known"]


@dataclass(repr=False)
class NFNReport:
    """Scores of a model on a sample of prompts. `print(report.table())` shows them.

    `scores`: module name -> ModuleScore.
    `prompt_stats` [2, modules, prompts] float64: sums and counts of the token ratios; modules as in `scores`, prompts in
    the order they came. None for the authors' procedure, which keeps none.
    `decision`: whether the prompts tell the k chosen types from the others.
    `eva` [eva_rank, n_in] and `eva_ratios` [eva_rank], for each module: vectors and the shares that they explain
    (`InputSketch.vectors`). Empty without `eva_rank`. `eva.save` writes them, not `save`.
    `experts`: name of a weight of experts -> what its experts have each.
    `notes`: a line for each kind of module that has no score, and why.

    >>> report = pf.score(model, batches)
    >>> sorted(report.types)
    ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']
    >>> report
    NFNReport(12 prompts, 21 modules of 7 types, lowest NFN first: ...)
    """

    scores: dict[str, ModuleScore]
    tokens: int
    prompts: int
    seconds: float
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    decision: Decision | None = None
    prompt_stats: torch.Tensor | None = field(default=None, repr=False, compare=False)
    eva: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    eva_ratios: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    experts: dict[str, ExpertScores] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def modules(self) -> dict[str, float]:
        """Module name -> NFN."""
        return {name: score.nfn for name, score in self.scores.items()}

    @property
    def types(self) -> dict[str, float]:
        """Type -> mean NFN over the layers, lowest first. The output head is in no type."""
        means = {type_: statistics.fmean(by_name.values()) for type_, by_name in self._by_type().items()}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    def _by_type(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for name, score in self.scores.items():
            if score.layer is not None:
                found.setdefault(score.type, {})[name] = score.nfn
        return found

    def intervals(self, confidence: float = 0.95, seed: int = 0) -> Intervals:
        """Compute bootstrap intervals over prompts of the types' and modules' NFN (`stopping.intervals`).

        Raises ConfigError for fewer than 8 prompts, and where no statistics of single prompts were kept.
        """
        if self.prompt_stats is None:
            raise ConfigError("no intervals: these scores hold no statistics of single prompts (compat='official')")
        return intervals(self.prompt_stats, list(self.scores), types_of(self.scores.values()), confidence, seed)

    def decide(self, k: int, confidence: float = 0.95, inverse: bool = False) -> Decision | None:
        """Test how sure the k lowest types are (highest, if `inverse`), given the looks that scoring took.

        Returns None where no statistics of single prompts were kept.
        """
        if self.prompt_stats is None:
            return None
        looks = self.decision.looks if self.decision else [self.prompts]
        return decide(self.prompt_stats, types_of(self.scores.values()), k, confidence, looks, inverse)

    def z_scores(self) -> dict[str, float]:
        """Module -> distance of its NFN from its type's median over the layers, in robust standard deviations."""
        found: dict[str, float] = {}
        for by_name in self._by_type().values():
            found |= zip(by_name, robust_z([*by_name.values()]), strict=True)
        return {name: found[name] for name in self.scores if name in found}

    def outliers(self) -> list[str]:
        """List the modules whose NFN is more than 3.5 robust standard deviations from their type's median."""
        return [name for name, z in self.z_scores().items() if abs(z) > OUTLIER]

    def __repr__(self) -> str:
        lowest = ", ".join(f"{type_} {nfn:.3f}" for type_, nfn in list(self.types.items())[:3])
        types = f"{len(self.scores)} modules of {len(self.types)} types, lowest NFN first: {lowest}"
        return f"NFNReport({self.prompts} prompts, {types}{', ...' * (len(self.types) > 3)})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the types with their intervals, and how sure the choice is."""
        table, notes = self._table_and_notes()
        return dataclasses.replace(table, note="\n".join(notes)).html()

    def table(self) -> str:
        """Return the types, lowest NFN first, with their intervals and how sure the choice is, as text."""
        table, notes = self._table_and_notes()
        return "\n".join((str(table), *notes))

    def _table_and_notes(self) -> tuple[Table, list[str]]:
        known, why = self._intervals_or_why()
        chosen = self.decision.types if self.decision else ()
        notes = (why, self.decision.note if self.decision else "", *self.notes)
        return self.types_table(known, chosen), [note for note in notes if note]

    def types_table(self, known: Intervals | None, chosen: Sequence[str] = ()) -> Table:
        """Return the types, lowest NFN first, for the terminal and the page: `known` intervals and `chosen` types."""
        columns = [Column("module type"), Column("mean NFN", ".3f")]
        if known:
            columns.append(Column(f"{100 * known.confidence:g}% interval"))
        columns += [Column("lowest", ".3f"), Column("highest", ".3f"), Column("modules", "d")]
        if chosen:
            columns.append(Column("chosen"))
        rows, by_type = [], self._by_type()
        for type_, mean in self.types.items():
            values = by_type[type_].values()
            interval = ["{:.3f} to {:.3f}".format(*known.types[type_])] if known else []
            picked = [type_ in chosen] if chosen else []
            rows.append((type_, mean, *interval, min(values), max(values), len(values), *picked))
        return Table("NFN by module type", columns, rows)

    def _intervals_or_why(self) -> tuple[Intervals | None, str]:
        try:
            return self.intervals(self.settings.get("confidence") or 0.95), ""
        except ConfigError as error:
            return None, str(error)

    def save(self, path: str | Path) -> None:
        """Write JSON to `path`, and the statistics of single prompts beside it as safetensors, both atomically."""
        path = Path(path)
        value = asdict(replace(self, prompt_stats=None, eva={}, eva_ratios={}))
        del value["prompt_stats"], value["eva"], value["eva_ratios"]
        known, why = self._intervals_or_why()
        value["intervals"] = asdict(known) if known else {"why": why}
        beside = path.with_suffix(".safetensors")
        if beside.exists() and set(files.read_tensors(beside, "plopfast score")[0]) != {"prompt_stats"}:
            raise FileError(
                f"{beside}: in the way, and not the statistics of such scores: choose another name than {path}"
            )
        value = {"plopfast": "scores", "types": self.types, **value}
        if self.prompt_stats is None:
            files.write_json(path, value)
            beside.unlink(missing_ok=True)
            return
        # both are complete before one takes its place, as earlier scores are lost with one of their files
        with files.replacing(path) as scores, files.replacing(beside) as stats:
            save_file({"prompt_stats": self.prompt_stats.float().contiguous()}, stats)
            value["prompt_stats_sha256"] = files.sha256(stats)
            scores.write_text(dumps(value, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "NFNReport":
        """Read what `save` wrote. Without the safetensors file, there are no statistics of single prompts.

        Raises FileError for a file that is damaged, of another kind, or does not belong to the one beside it.
        """
        path, anew = Path(path), "make it anew with plopfast score"
        kept = checked(_Kept, files.read_kind(path, "scores", "plopfast score"), path, anew)
        beside, stats = path.with_suffix(".safetensors"), None
        if kept.prompt_stats_sha256 is not None and beside.exists():
            files.check_regular(beside)
            if files.sha256(beside) != kept.prompt_stats_sha256:
                raise FileError(f"{beside}: damaged, or of other scores; make both anew with plopfast score")
            stats = _prompt_stats(beside, len(kept.scores))
        report = cls(
            kept.scores, kept.tokens, kept.prompts, kept.seconds, kept.model, {**kept.settings}, kept.decision, stats,
            experts=kept.experts, notes=kept.notes,
        )  # fmt: skip
        if kept.types and kept.types != report.types:
            raise FileError(f"{path}: types: other means than those of its scores; {anew}")
        return report


class _Settings(TypedDict, total=False):
    """How scores were made: what `score` keeps of its options."""

    baseline: str
    tokens: str
    skip_bos: bool
    skip_first: bool
    confidence: Share
    k: Size
    eva_rank: Size
    seed: Count
    mc_samples: Size
    compat: str


class _Why(TypedDict):
    why: str


@dataclass(frozen=True)
class _Kept:
    """What scores.json holds. Files of earlier versions lack what has a default."""

    scores: Annotated[dict[str, ModuleScore], MinLen(1)]
    tokens: Count
    prompts: Count
    seconds: NotNegative
    model: str
    settings: _Settings
    types: dict[str, NotNegative] = field(default_factory=dict)
    decision: Decision | None = None
    intervals: Intervals | _Why | None = None
    prompt_stats_sha256: str | None = None
    experts: dict[str, ExpertScores] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _prompt_stats(path: Path, modules: int) -> torch.Tensor:
    """Returns the statistics of single prompts of so many modules. Raises FileError for others."""
    stats = files.read_tensors(path, "plopfast score")[0].get("prompt_stats", torch.empty(0))
    fits = stats.ndim == 3 and stats.shape[:2] == (2, modules) and stats.shape[2] > 0 and stats.is_floating_point()
    if not (fits and bool((stats.isfinite() & (stats >= 0)).all()) and bool(stats[1].any(1).all())):
        raise FileError(
            f"{path}: expected prompt_stats of shape [2, {modules}, prompts], finite and at least 0, got "
            f"{list(stats.shape)} {stats.dtype}; make it anew with plopfast score"
        )
    return stats.double()
