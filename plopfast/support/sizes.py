"""Sizes that people write: 2.5M, 10MB, 8MiB, 4.5GiB."""

import re
from fractions import Fraction


def size_of(text: str) -> tuple[Fraction, bool] | None:
    """The exact number that a size stands for, and whether its unit is bytes; None for any other text.

    >>> size_of("8MiB")
    (Fraction(8388608, 1), True)
    """
    found = re.fullmatch(r"(?P<number>\d{1,18}(\.\d{1,18})?) *(?P<unit>|[kKMG]|[kKMG]i?B|B)", text, re.ASCII)
    if not found:
        return None
    base, power = 1024 if "i" in found["unit"] else 1000, "BKMG".index((found["unit"].upper() or "B")[0])
    # exact: the float 67.1 * 10**6 is below 67,100,000
    return Fraction(found["number"]) * base**power, "B" in found["unit"]


def bytes_of(text: str) -> int | None:
    """The bytes that a text such as 6GB, 6GiB or 4.5GiB stands for; None for a text without a unit of bytes, and for 0."""
    size = size_of(text.strip())
    return int(size[0]) or None if size and size[1] else None
