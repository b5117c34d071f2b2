"""A placement: which modules get adapters, with what rank and alpha; and which ranks fit a weight."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import MinLen

from ..support import files
from ..support.errors import PlacementError
from ..support.schema import Count, Positive, Size, checked
from ..support.tables import Column, Table

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@dataclass(repr=False)
class Placement:
    """The modules that get adapters.

    `modules`: name -> (rank, alpha). `types`: the module types chosen. `parameters`: trainable parameters in all.
    `margin`: the NFN between the last type chosen and the first left out, for rules that choose types by NFN.
    `notes`: how sure the choice is, and what a budget did. `shapes`: name -> (n_out, n_in) of the weights, where they are
    known; a model with other weights is refused. `experts`: name -> how many, of those that are weights of experts.

    >>> pf.place(pf.score(model, batches), rule="mlp", rank=4)
    Placement(mlp: ...: 9 modules, rank 4, ... trainable parameters)
    """

    modules: Annotated[dict[str, tuple[Size, Positive]], MinLen(1)]
    types: list[str]
    rule: str
    parameters: Count
    margin: float | None = None
    model: str = ""
    notes: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[Size, Size]] = field(default_factory=dict)
    experts: dict[str, Size] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes the placement as JSON, atomically."""
        files.write_json(Path(path), {"plopfast": "placement", **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> "Placement":
        """Reads what `save` wrote.

        Raises FileError for a missing file, and for one with a rank, an alpha or another field that cannot be.
        """
        value = files.read_kind(Path(path), "placement", "plopfast place")
        return checked(cls, value, Path(path), "make it anew with plopfast place")

    def peft_config(self) -> dict[str, Any]:
        """Returns the arguments of `peft.LoraConfig` that adapt the same modules with the same ranks and alphas.

        In a model within a model, PEFT adapts modules whose names end with one of these, too.
        Example: `peft.get_peft_model(model, peft.LoraConfig(**placement.peft_config()))`.
        """
        targets: dict[str, Any] = {"target_modules": sorted(self.modules.keys() - self.experts.keys())}
        if self.experts:
            targets["target_parameters"] = sorted(self.experts)
        return {"task_type": "CAUSAL_LM", **targets, **ranks_and_patterns(self.modules)}

    def lora_config(self, model: "nn.Module | None" = None, **overrides: Any) -> "LoraConfig":
        """Returns a `peft.LoraConfig` that adapts the same modules with the same ranks and alphas, for PEFT and TRL.

        With the `model` that is to be wrapped, targets are written as briefly as PEFT reads them rightly: the last components of
        names where they match these modules alone (`["down_proj", "v_proj"]`), else full names, else a regular expression;
        and what PEFT would take for the experts of a mixture goes to `target_parameters`. Without it they are full names.
        `overrides` are other fields, such as `lora_dropout=0.05` or `use_rslora=True`.

        Raises ConfigError without peft, and for an override of what the placement says; PlacementError where `model` lacks a
        module. Example: `SFTTrainer(model, peft_config=placement.lora_config(model, lora_dropout=0.05), ...)`.
        """
        from .lora_config import lora_config  # which reads placements

        return lora_config(self, model, overrides)

    def __repr__(self) -> str:
        return f"Placement({str(self).splitlines()[0]})"

    def _repr_html_(self) -> str:
        """Returns what a notebook shows."""
        return self.table().html()

    def table(self) -> Table:
        """Returns a row for each module type: how many of its modules get adapters, and their ranks."""
        by_type: dict[str, list[int]] = {type_: [] for type_ in self.types}
        for name, (rank, _) in self.modules.items():
            fitting = [type_ for type_ in self.types if f".{name}".endswith(f".{type_}")]
            by_type.setdefault(max(fitting, key=len, default="other"), []).append(rank)
        rows = [
            (type_, len(ranks), " to ".join(map(str, sorted({min(ranks), max(ranks)}))))
            for type_, ranks in by_type.items()
            if ranks
        ]
        first, *notes = str(self).splitlines()
        return Table(first, [Column("module type"), Column("modules", "d"), Column("rank")], rows, "\n".join(notes))

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


def ranks_and_patterns(modules: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Returns PEFT's `r`, `lora_alpha`, `rank_pattern` and `alpha_pattern` for `modules`: name -> (rank, alpha).

    `r` and `lora_alpha` are the commonest values. The patterns hold the modules with other values, their names written as
    regular expressions.
    """
    common = [Counter(column).most_common(1)[0][0] for column in zip(*modules.values(), strict=True)]
    ends = {end for name in modules for end in ends_of(name)}
    pattern = {
        name: "^" * (name in ends) + re.escape(name) for name in modules
    }  # ^ as it would match those it ends too
    rank_pattern, alpha_pattern = (
        {pattern[name]: values[i] for name, values in modules.items() if values[i] != common[i]} for i in (0, 1)
    )
    return {"r": common[0], "lora_alpha": common[1], "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def ends_of(name: str) -> list[str]:
    """Returns the parts of a module's name after each of its dots. PEFT takes a name for every module that it ends."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def full_rank(n_in: int, n_out: int) -> int:
    """Returns the highest rank that an adapter of an n_out x n_in weight can use: the smaller side."""
    return min(n_in, n_out)


def check_rank(rank: int, n_in: int, n_out: int, where: str = "") -> None:
    """Raises PlacementError for a rank below 1 or above `full_rank`. `where` begins the message, such as "q_proj: "."""
    if not 1 <= rank <= full_rank(n_in, n_out):
        raise PlacementError(
            f"{where}rank {rank} does not fit a {n_out} x {n_in} weight: choose 1 to {full_rank(n_in, n_out)}"
        )
