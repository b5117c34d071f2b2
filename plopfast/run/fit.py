"""--fit: the cheapest options with which a step fits into a device's memory.

`LADDER` lists the options, the cheapest first. They are taken one after the other until the step fits; then those that turn
out not to be needed are left out again, the dearest first. While it chooses, a model with few layers stands for the whole
one: bytes and FLOPs grow by the same amount with each layer. What is chosen is then counted on the whole model.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..support.config import RunConfig
from ..support.errors import ConfigError, ModelError, shown
from ..support.sizes import bytes_of
from ..training.dry import MIB, Estimate
from .shapes import Shapes

FEW, MORE = 4, 6  # layers from which those of a deeper model are reckoned
NEAR = 1.02  # what few layers show is this near, at least
LEAST_SAVED = 0.001  # of the peak: an option that saves less is left out


@dataclass(frozen=True)
class Rung:
    """An option: the settings that it changes, its words on a command line, and what it costs beside the FLOPs and copies that
    are counted. `for_cpu`: it saves memory where the CPU trains, too. `given` tells that the user has chosen about it."""

    words: str
    changes: dict[str, Any]
    price: str = ""
    for_cpu: bool = True
    changes_results: bool = False
    needs: Callable[[RunConfig], bool] = lambda config: True

    def is_open(self, config: RunConfig, on_cpu: bool) -> bool:
        """Whether it can be taken, beside what the settings say."""
        plain = RunConfig()
        chosen = any(getattr(config, name) not in (getattr(plain, name), value) for name, value in self.changes.items())
        taken = all(getattr(config, name) == value for name, value in self.changes.items())
        return not chosen and not taken and (self.for_cpu or not on_cpu) and self.needs(config)


def _frozen(config: RunConfig) -> bool:
    return not config.full and config.parallel != "fsdp"


def _streamable(config: RunConfig) -> bool:
    return _frozen(config) and not config.compile


def _has_8bit() -> bool:
    return any(importlib.util.find_spec(name) for name in ("bitsandbytes", "torchao"))


LADDER: tuple[Rung, ...] = (
    Rung("--checkpointing", {"checkpointing": True}),
    Rung(
        "--quantize nf4", {"quantize": "nf4"}, "weights rounded to 4 bits, and decoded for each product",
        changes_results=True, needs=_frozen,
    ),
    Rung(
        "--mlp-rows 512", {"mlp_rows": 512}, "smaller products",
        needs=lambda config: not config.compile and config.parallel != "fsdp",
    ),
    Rung("--offload", {"offload": True}, "what blocks keep is copied to CPU memory and back", for_cpu=False),
    Rung(
        "--keep-best cpu", {"keep_best": "cpu"}, "a copy of the adapters to CPU memory at each better validation", for_cpu=False
    ),
    Rung(
        "--embedding cpu", {"embedding": "cpu"}, "a wait for each micro-batch's rows of the embedding",
        for_cpu=False, needs=_frozen,
    ),
    Rung(
        "--quantize-head", {"quantize_head": True}, "the output head rounded and decoded, too", changes_results=True,
        needs=lambda config: bool(config.quantize) and _frozen(config),
    ),
    Rung(
        "--optimizer adamw8bit", {"optimizer": "adamw8bit"}, "AdamW's moments rounded to 8 bits", changes_results=True,
        needs=lambda config: _has_8bit(),
    ),
    Rung(
        "--stream --resident-share 0.5", {"stream": True, "resident_share": 0.5},
        "every second layer copied from pinned CPU memory, forwards and backwards", needs=_streamable,
    ),
    Rung(
        "--stream", {"stream": True, "resident_share": 0.0},
        "each layer copied from pinned CPU memory, forwards and backwards", needs=_streamable,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """The settings with which a step fits, its estimate, and lines that say what was chosen and what it costs."""

    config: RunConfig
    estimate: Estimate
    lines: list[str] = field(default_factory=list)


def fit(shapes: Shapes, config: RunConfig, budget: str, ladder: Sequence[Rung] = LADDER) -> Fitted:
    """Chooses options for `budget`, such as "6GB". Raises ConfigError where nothing fits: it names the least that would, and the
    largest part of that."""
    limit = limit_of(budget)
    search = _Search(shapes, config, limit)
    seen = search.reckoned([])
    exact = shapes.count(config) if seen is None or seen.total_mib <= NEAR * limit else None
    if exact is not None and exact.total_mib <= limit:
        return Fitted(config, exact, [f"fit {budget}: {_size(exact.total_mib)}, as the settings are"])
    taken = search.climb(ladder)
    while True:
        settings = search.settings(taken)
        exact = shapes.count(settings)
        if exact.total_mib <= limit:
            break
        if not (further := search.climb(ladder, taken)):
            raise ConfigError(_least(shapes, budget, taken, exact))
        taken = further
    pruned = search.prune(taken)
    if pruned != taken and (again := shapes.count(search.settings(pruned))).total_mib <= limit:
        taken, exact = pruned, again
    return Fitted(search.settings(taken), exact, search.lines(taken, exact, budget))


def limit_of(budget: str) -> float:
    """The MiB of a budget. Raises ConfigError for a text that is no size of memory."""
    size = bytes_of(budget)
    if size is None:
        raise ConfigError(f"fit: expected a size of memory such as 6GB, 6GiB or 4.5GiB, got {shown(budget)}")
    return size / MIB


class _Search:
    """Which rungs are taken, by what few layers show."""

    def __init__(self, shapes: Shapes, config: RunConfig, limit: float) -> None:
        self.shapes, self.config, self.limit = shapes, config, limit
        self.known: dict[str, Estimate | None] = {}

    def settings(self, taken: Sequence[Rung]) -> RunConfig:
        changes: dict[str, Any] = {}
        for rung in taken:
            changes |= rung.changes
        return dataclasses.replace(self.config, **changes)

    def reckoned(self, taken: Sequence[Rung]) -> Estimate | None:
        """About what a step takes; None where the model does not allow these options."""
        settings = self.settings(taken)
        key = repr(settings)
        if key not in self.known:
            try:
                self.known[key] = reckon(self.shapes, settings)
            except (ConfigError, ModelError):
                self.known[key] = None
        return self.known[key]

    def climb(self, ladder: Sequence[Rung], taken: Sequence[Rung] = ()) -> list[Rung]:
        """Takes rungs, after those that were taken, until the step seems to fit; empty where there are no more."""
        start, found = len(taken), list(taken)
        on_cpu = self.shapes.device.type == "cpu"
        for rung in ladder:
            if rung in found or not rung.is_open(
                self.settings([r for r in found if not r.changes.keys() & rung.changes.keys()]), on_cpu
            ):
                continue
            before, after = self.reckoned(found), self.reckoned([*found, rung])
            if before is None or after is None or before.total_mib - after.total_mib < LEAST_SAVED * before.total_mib:
                continue
            found.append(rung)
            if after.total_mib <= self.limit:
                break
        return found if len(found) > start else []

    def prune(self, taken: Sequence[Rung]) -> list[Rung]:
        """Leaves out what is not needed, the dearest first; the last one is."""
        kept = list(taken)
        for rung in reversed(taken[:-1]):
            others = [one for one in kept if one is not rung]
            if not all(one.needs(self.settings(others[: others.index(one)])) for one in others):
                continue
            found = self.reckoned(others)
            if found is not None and found.total_mib <= self.limit:
                kept = others
        return kept

    def lines(self, taken: Sequence[Rung], exact: Estimate, budget: str) -> list[str]:
        """What was chosen, and what each costs."""
        said = [f"fit {budget}: {' '.join(rung.words for rung in taken)}: {_size(exact.total_mib)}"]
        for number, rung in enumerate(taken):
            before, after = self.reckoned(taken[:number]), self.reckoned(taken[: number + 1])
            if before is None or after is None:
                continue
            costs = [rung.price] if rung.price else []
            if (more := after.tflops_per_step / before.tflops_per_step - 1) > 0.005:
                costs.append(f"{more:.0%} more FLOPs")
            if (crossed := after.crossed_mib - before.crossed_mib) > 1:
                costs.append(f"{_size(crossed)} a step between CPU and GPU")
            saved = _size(before.total_mib - after.total_mib)
            said.append(f"  {rung.words}: {saved} less; {', '.join(costs) or 'costs hardly anything'}")
        if changing := [rung.words for rung in taken if rung.changes_results]:
            said.append(f"  {' and '.join(changing)} changes the results: chosen by --fit, not by you")
        return said


def reckon(shapes: Shapes, config: RunConfig) -> Estimate:
    """About what a step takes, from models of few layers; exactly, where there are not many more."""
    if shapes.layers <= MORE + 2:
        return shapes.count(config)
    low, high = shapes.count(config, FEW), shapes.count(config, MORE)
    layers = (shapes.layers - FEW) / (MORE - FEW)
    names = ("total_mib", "tflops_per_step", "host_mib", "crossed_mib")
    by_name = {name: getattr(low, name) + layers * (getattr(high, name) - getattr(low, name)) for name in names}
    parts = {
        part: low.parts.get(part, 0.0) + layers * (high.parts.get(part, 0.0) - low.parts.get(part, 0.0))
        for part in high.parts
    }
    count = low.parameters + round(layers * (high.parameters - low.parameters))
    return dataclasses.replace(high, parameters=count, parts=parts, **by_name)


def _size(mib: float) -> str:
    return f"{mib / 1024:.2f} GiB" if mib >= 100 else f"{mib:.2f} MiB"


def _least(shapes: Shapes, budget: str, taken: Sequence[Rung], exact: Estimate) -> str:
    part, most = max(exact.parts.items(), key=lambda item: item[1])
    tried = " ".join(rung.words for rung in taken) or "the settings as they are"
    return (
        f"fit {budget}: nothing that plopfast can choose fits. The least is {_size(exact.total_mib)}, with {tried}; "
        f"its largest part: {part}, {_size(most)}. Give a larger --fit, shorter rows or a lower --rank"
    )
