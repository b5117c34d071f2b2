"""What a step of a model costs that is not loaded: its shapes come from a configuration, its placement from a rule."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..lora.placement import Placement
from ..models.shapes import config_of, model_of
from ..placing.by_settings import placed, unscored
from ..placing.rules import RULES, command_rules
from ..report.tables import shapes_table
from ..scoring.report import NFNReport
from ..support import files
from ..support.config import ROWS, RunConfig
from ..support.errors import ConfigError, FileError, PlacementError
from ..training.estimate import Estimate, estimate_shapes

TOKENS = 2048  # in a row, unless --max-length or the model's context says otherwise
NOT_COUNTED = (
    "Counted, not measured. Beside it there are the CUDA context (some 0.3 to 0.5 GiB) and what torch's allocator holds but "
    "does not use, which cannot be counted."
)


@dataclass(frozen=True)
class Shapes:
    """A model by name, a micro-batch of `rows` rows of `tokens` tokens of which the last `labels` are learned, the device
    ("meta" stands for a GPU) and the dtype. `place(model, config)` gives the placement; None where all weights are trained."""

    name: str
    rows: int
    tokens: int
    labels: int
    device: torch.device
    dtype: torch.dtype
    place: Callable[[Any, RunConfig], Placement | None]
    best: bool = True

    @cached_property
    def layers(self) -> int:
        """The number of the model's layers."""
        count: int = config_of(self.name)[0].get_text_config().num_hidden_layers
        return count

    def count(self, config: RunConfig, layers: int | None = None) -> Estimate:
        """Counts a step of `config`; `layers`: of a model with only so many."""
        model = model_of(
            self.name, dtype=self.dtype, quantize=config.quantize, quantize_head=config.quantize_head, layers=layers
        )
        (found,) = estimate_shapes(
            model, {"": self.place(model, config)}, config.training, rows=self.rows, row_tokens=self.tokens,
            label_tokens=self.labels, best=self.best, device=self.device,
            resident_share=config.resident_share if config.stream else None, embedding=config.embedding,
        )  # fmt: skip
        return found


def shapes_of(config: RunConfig, *, default_rule: bool) -> Shapes:
    """The shapes that the settings name: one row of 2048 tokens in bfloat16 on a GPU unless they say otherwise.

    `default_rule`: nobody gave a rule; then all linear modules get adapters, as there are no scores.
    """
    name = config.model_config
    assert name is not None
    given = [f"--{name}" for name in ("model", *ROWS, "unlabeled", "columns") if getattr(config, name)]
    if given:
        raise ConfigError(
            f"--model-config estimates without weights and data, so {', '.join(given)} cannot apply: leave it out, or estimate "
            "in a run folder without --model-config"
        )
    text = config_of(name)[0].get_text_config()
    room = getattr(text, "max_position_embeddings", None) or TOKENS
    if config.max_length and config.max_length > room:
        raise ConfigError(f"max_length {config.max_length}: {name} takes at most {room} tokens: lower it")
    tokens = config.max_length or min(TOKENS, room)
    if tokens < 2:
        raise ConfigError("max_length 1: a row has at least two tokens, one to read and one to learn")
    rows = config.batch_rows or max(1, (config.batch_tokens or 0) // tokens)
    if config.packing:
        rows, tokens = 1, config.batch_tokens or rows * tokens
    on_cpu = config.device == "cpu"
    dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    settings = dataclasses.replace(config, rule="all") if default_rule else config

    def place(model: Any, _: RunConfig) -> Placement:
        return without_scores(unscored(model), settings)

    return Shapes(name, rows, tokens, tokens - 1, torch.device("cpu" if on_cpu else "meta"), dtype, place)


def without_scores(report: NFNReport, settings: RunConfig) -> Placement:
    """Places by a rule that needs no scores. Raises PlacementError for the others."""
    match = re.fullmatch("match:([^:]+):.*", settings.budget or "")
    rules = [settings.rule, *(match.groups() if match else ())]
    for name in rules:
        rule = RULES.get(name)
        if rule and rule.ranks_by:
            known = ", ".join(rule for rule in command_rules() if not RULES[rule].ranks_by)
            raise PlacementError(
                f"rule {name!r} chooses by scores, and a configuration alone has none: give --rule {known}, or module types "
                "with commas (v_proj,o_proj,down_proj)"
            )
    if settings.ranks == "proportional":
        raise PlacementError("ranks 'proportional' needs scores, and a configuration alone has none: --ranks equal")
    return placed(report, settings.placing)


def largest(report: NFNReport, config: RunConfig) -> Placement:
    """The placement that a run may choose, before it has scored: by a rule that needs scores, the k types with the largest
    adapters."""
    rule, k = RULES.get(config.rule), config.k
    if rule and rule.needs_k:
        size: dict[str, int] = {}
        for score in report.scores.values():
            if score.layer is not None:
                size[score.type] = size.get(score.type, 0) + score.n_in + score.n_out
        types = sorted(size, key=lambda type_: size[type_], reverse=True)[:k]
        match = (config.budget or "").startswith("match:")
        more: dict[str, Any] = {"budget": None, "ranks": "equal"} if match else {"ranks": "equal"}
        config = dataclasses.replace(config, rule=",".join(types), granularity="type", cap=None, **more)
    return placed(report, config.placing)


def estimate_config(config: RunConfig, out: Path | None, *, default_rule: bool, overwrite: bool = False) -> str:
    """Counts a step of `config.model_config`; with `config.fit`, with the options that it chooses. Writes the figures to the
    JSON file `out`, if given, and returns them as text."""
    from .fit import fit

    if out is not None and (out.is_dir() or not out.name.endswith(".json")):
        raise ConfigError(f"--out {out}: with --model-config it is a file, such as estimate.json, not a run folder")
    if out is not None and out.exists() and not overwrite:
        raise FileError(f"{out}: exists already: give another name, or --overwrite")
    shapes = shapes_of(config, default_rule=default_rule)
    lines = ["no --rule: adapters on every linear module of the layers"] if default_rule else []
    if config.fit:
        fitted = fit(shapes, config, config.fit)
        config, found = fitted.config, fitted.estimate
        lines += fitted.lines
    else:
        found = shapes.count(config)
    value = value_of(shapes, config, found)
    if out is not None:
        files.write_json(out, value)
    return "\n".join([*lines, str(shapes_table(value))])


def value_of(shapes: Shapes, config: RunConfig, found: Estimate) -> dict[str, Any]:
    """What is written of an estimate by shapes."""
    from .fit import LADDER

    settings = {name: getattr(config, name) for rung in LADDER for name in rung.changes}
    return {
        "plopfast": "estimate of shapes", "model": shapes.name, "rows": shapes.rows, "row_tokens": shapes.tokens,
        "label_tokens": shapes.labels, "accumulate": config.accumulate,
        "device": "GPU" if shapes.device.type == "meta" else shapes.device.type,
        "dtype": str(shapes.dtype).removeprefix("torch."), "rank": config.rank, "settings": settings,
        **{k: v for k, v in dataclasses.asdict(found).items() if k != "name"}, "note": NOT_COUNTED,
    }  # fmt: skip
