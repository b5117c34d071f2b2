"""A sweep of learning rates that goes on while the best one is at its edge."""

from typing import Any

FURTHER = 4  # rates that are tried beyond the given ones, at most
STEP = 10.0  # the widest step beyond an edge; given rates may lie further apart


class Sweep:
    """The rates of one arm. `tried`: rate -> what result.json holds of its training, the given rates first.

    A single rate is taken as it is. Of several, the lowest validation loss at the lowest or highest rate is followed by another
    rate beyond it, as many times away as the one before (STEP at most), until the best rate has tried neighbours on both sides or
    FURTHER were added.
    """

    def __init__(self, given: list[float]) -> None:
        self.given = given
        self.tried: dict[float, dict[str, Any]] = {}

    def wanted(self) -> list[float]:
        """The rates to train next; none where the sweep is over."""
        return [lr for lr in self.given if lr not in self.tried] or self.further()

    def best(self) -> float | None:
        """The rate of the lowest validation loss, of equal ones the first; None where no loss is finite."""
        return next(iter(self.leaders()), None)

    def leaders(self) -> list[float]:
        """The two rates of the lowest losses, best first; fewer where fewer trained."""
        finite = [lr for lr, t in self.tried.items() if t["valid_loss"] is not None]
        return sorted(finite, key=lambda lr: self.tried[lr]["valid_loss"])[:2]

    def edge(self) -> str:
        """Where the best rate is: "lowest" or "highest" of several that were tried, else nothing."""
        best = self.best()
        if best is None or len(self.given) < 2 or min(self.tried) < best < max(self.tried):
            return ""
        return "highest" if best == max(self.tried) else "lowest"

    def further(self) -> list[float]:
        """The one rate beyond the edge, or none."""
        rates, edge = sorted(self.tried), self.edge()
        if not edge or len(rates) >= len(self.given) + FURTHER:
            return []
        last, before = (rates[-1], rates[-2]) if edge == "highest" else (rates[0], rates[1])
        return [rounded(last * min(max(last / before, 1 / STEP), STEP))]


def rounded(lr: float | str) -> float:
    """The rate as the folder of its training is named."""
    return float(f"{float(lr):g}")
