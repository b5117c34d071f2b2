"""What the report reads from a run folder."""

import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

from ..lora.placement import Placement
from ..placing.rules import nfn_rule
from ..scoring.report import NFNReport
from ..scoring.stopping import Decision, Intervals
from ..support import files
from ..support.ledger import Ledger
from . import kinds

WRITERS = {"config": "run", "training": "train"}  # of files that are not named as their command


class RunFolder:
    """A run folder's files. Those that do not exist are None or empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        scores, placement = path / "scores.json", path / "placement.json"
        self.scores = NFNReport.load(scores) if _is_there(scores) else None
        self.placement = Placement.load(placement) if _is_there(placement) else None
        (
            self.config,
            self.training,
            self.eval,
            self.audit,
            self.estimate,
            self.trial,
            self.data,
            self.search,
            self.grpo,
        ) = map(self._read, ("config", "training", "eval", "audit", "estimate", "trial", "data", "search", "grpo"))
        self.rewards = self._read_lines("rewards", "grpo")
        self.eval_rows = self._read_lines("eval_rows", "eval") if self.eval else []
        self.stages = {name: stage for name, stage in Ledger(path).done().items() if name not in ("run", "report")}
        self.metrics = self._read_lines("metrics", "train")

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / f"{name}.json"
        return kinds.read(path, f"plopfast {WRITERS.get(name, name)}") if _is_there(path) else {}

    def _read_lines(self, name: str, stage: str) -> list[dict[str, Any]]:
        path = self.path / f"{name}.jsonl"
        return kinds.read(path, f"plopfast {stage}") if _is_there(path) else []

    def noted(self, stage: str) -> str:
        """Return the command line that was noted for a stage, if any."""
        return (self.trial if stage == "trial" else self.stages.get(stage, {})).get("command", "")

    def command(self, stage: str) -> str:
        """Return the command line that runs a stage with the folder's settings."""
        return f"plopfast {stage} --out {shlex.quote(str(self.path))}"

    @cached_property
    def _kept_intervals(self) -> dict[str, Any]:
        return files.read_json(self.path / "scores.json", "plopfast score").get("intervals") or {
            "why": "these scores were made before intervals were kept"
        }

    @property
    def intervals(self) -> Intervals | None:
        """The NFN's intervals over prompts; None where there are none, which `no_intervals` explains."""
        return None if self.no_intervals else Intervals(**self._kept_intervals)

    @property
    def no_intervals(self) -> str:
        """Why there are no intervals, or nothing."""
        return self._kept_intervals.get("why", "")

    @property
    def model_type(self) -> str:
        """The model_type of the model's config.json; "" where no stage has noted it."""
        return self.stages.get("load", {}).get("model_type", "")

    @property
    def judged_by(self) -> str:
        """The kind of rows that eval.json is of: test or validation. Older files do not say it."""
        return self.eval.get("rows", "held-out")

    @property
    def rule(self) -> str:
        """The placement's rule; without a placement, the rule of the scores' own choice."""
        return self.placement.rule if self.placement else self.decision.rule if self.decision else ""

    @property
    def types(self) -> list[str]:
        """The module types that get adapters; without a placement, the scores' own choice."""
        return self.placement.types if self.placement else self.decision.types if self.decision else []

    @property
    def whole_types(self) -> bool:
        """Whether all modules of the chosen types get adapters, as far as the files tell."""
        if not (self.scores and self.placement):
            return True
        types = self.placement.types
        named = {name for name, s in self.scores.scores.items() if s.layer is not None and s.type in types}
        return named == self.placement.modules.keys()

    @property
    def decision(self) -> Decision | None:
        """How sure the types are, where a rule chose whole types by their scores."""
        kept = self.scores.decision if self.scores else None
        if not (self.scores and self.placement):
            return kept
        rule, types = nfn_rule(self.placement.rule), set(self.placement.types)
        if rule is None or not self.whole_types:
            return None
        if kept and kept.rule == rule.name and set(kept.types) == types:
            return kept
        confidence = self.intervals.confidence if self.intervals else 0.95
        found = self.scores.decide(len(types), confidence, rule.highest)
        return found if found and set(found.types) == types else None


def _is_there(path: Path) -> bool:
    """A link that leads nowhere is there: reading it says so."""
    return path.exists() or path.is_symlink()
