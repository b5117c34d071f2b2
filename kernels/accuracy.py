"""The rule of errors: a result may be off by twice as much as plain torch in the same dtype, plus a floor.

    |got - exact| <= 2 |plain - exact| + floor        `exact`: reference.py's float64 result

A fixed tolerance would be too wide for one dtype or shape and too narrow for another. Both sizes of an error must pass:
its norm, and its largest element, because one wrong number among thousands hides in a norm.

The floor is there because plain torch may round to the exact result by luck, and another order of a sum rounds
differently. It is counted in eps, the spacing of the numbers at 1. A rounding moves a number by at most eps / 2.

- Three roundings lie between the operands and a result: of S (or dS), of the low-rank term and of the sum. At worst
  they add up to 1.5 eps, on average (root mean square) to 0.5 eps. Twice that is allowed: 3 eps of the largest element
  of the exact result, and 1 eps of its norm.
- 16-bit types add up in float32, where the roundings of a sum do not show. A float32 sum rounds as coarsely as its
  result at every step: K random terms, added one after the other, are off by about eps sqrt(K) / 6 of the norm, which
  is 6 eps for K = 1536. A library may split such a sum into short ones and be off by much less. So float32 is allowed 8
  times the floor. That is still far below any fault: one product in TF32 is off by 1000 eps.
"""

import math
from dataclasses import dataclass

import torch

FACTOR = 2.0  # of plain torch's own error
SIZES = {"norm": (2, 1), "largest element": (math.inf, 3)}  # order of the vector norm, roundings that the floor allows
LONG_SUM = 8  # times the floor, where sums round as coarsely as their result: float32 and wider


@dataclass(frozen=True)
class Comparison:
    """How far a result is off in one size, "norm" or "largest element", relative to that of the exact result."""

    size: str
    error: float
    plain: float
    allowed: float

    @property
    def share(self) -> float:
        """The error over the allowed one: at most 1 passes, and infinity stands for NaN."""
        share = self.error / self.allowed if self.error and self.allowed else math.inf if self.error else 0.0
        return math.inf if math.isnan(share) else share

    @property
    def passes(self) -> bool:
        """Whether the result obeys the rule."""
        return self.share <= 1

    def __str__(self) -> str:
        return (
            f"off by {self.error:.1e} in its {self.size}, plain torch by {self.plain:.1e}, allowed {self.allowed:.1e}"
        )


def compare(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> Comparison:
    """Compares two results of one shape with the exact one; the size in which `got` does worse.

    `got` and `plain` have the dtype that is judged, and may be on another device than `exact` (float64).
    """
    found = []
    ours, theirs = (one.to(exact.device).double() - exact for one in (got, plain))
    for size, (order, roundings) in SIZES.items():
        if not exact.numel():
            return Comparison(size, 0.0, 0.0, 0.0)
        scale, error, other = (torch.linalg.vector_norm(t, order).item() for t in (exact, ours, theirs))
        floor = roundings * torch.finfo(got.dtype).eps * (LONG_SUM if got.dtype.itemsize >= 4 else 1)
        unit = scale or 1.0  # an exact result of zeros has no size
        found.append(Comparison(size, error / unit, other / unit, FACTOR * other / unit + floor * scale / unit))
    return max(found, key=lambda one: one.share)


def assert_no_worse(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Asserts one shape, one dtype and the rule of errors; for tests."""
    assert got.shape == plain.shape == exact.shape, f"{list(got.shape)}, {list(plain.shape)}, {list(exact.shape)}"
    assert got.dtype == plain.dtype, f"{got.dtype}, {plain.dtype}"
    found = compare(got, plain, exact)
    assert found.passes, str(found)
