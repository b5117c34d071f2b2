"""How the report puts numbers, lists, ranges and differences into words."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from ..scoring.stopping import Decision
from ..support.tables import UNKNOWN

# control characters but line breaks and tabs, those that turn the direction of writing, and halves of characters
_STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def rich(text: str, *parts: Any, **named: Any) -> str:
    """Return text with tags of the page's own; what is put into its braces is escaped.

    >>> rich("On <b>{}</b>.", "a<b")
    Markup('On <b>a&lt;b</b>.')
    """
    return Markup(text).format(*parts, **named)


def harmless(page: str) -> str:
    """Show characters that would steer a terminal or the direction of writing as Python writes them, such as \\x1b."""
    return _STEERS.sub(
        lambda found: f"\\u{ord(found[0]):04x}" if ord(found[0]) > 255 else f"\\x{ord(found[0]):02x}", page
    )


def listed(words: Sequence[str]) -> str:
    """Return "a, b and c", and "all weights" for none."""
    if len(words) < 2:
        return words[0] if words else "all weights"
    return f"{', '.join(words[:-1])} and {words[-1]}"


def bold(words: Sequence[str]) -> str:
    """Return "a, b and c" with each in bold."""
    return Markup(listed([rich("<b>{}</b>", word) for word in words]))


def range_of(values: Sequence[int]) -> str:
    """Return "8", or "4 to 8"."""
    if not values:
        return UNKNOWN
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def points_of(versus: dict[str, Any]) -> str:
    """Return a difference in accuracy and its interval, in points."""
    difference, low, high = (100 * versus[key] for key in ("difference", "low", "high"))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def interval_of(metrics: dict[str, Any], spec: str) -> str:
    """Return the interval of an accuracy, "0.61 to 0.72"; nothing where an older file has none."""
    bounds = [metrics.get(key) for key in ("accuracy_low", "accuracy_high")]
    return "" if None in bounds else " to ".join(format(bound, spec) for bound in bounds)


def ties_of(decision: Decision, limit: int = 3) -> str:
    """Name the first near-ties of a decision."""
    pairs = [f"{chosen} from {other}" for chosen, other in decision.near_ties]
    return listed(pairs[:limit]) + (f" (and {len(pairs) - limit} more pairs)" if len(pairs) > limit else "")


def number(count: int) -> str:
    """Return "three", or "13"."""
    return NUMBERS[count] if 0 <= count < len(NUMBERS) else f"{count:,}"


def several(count: int, noun: str, plural: str = "") -> str:
    """Return "1 row", "2 rows"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def signed(value: float, spec: str = ".1f") -> str:
    """Return a number with its sign, a real minus for one below zero; what is rounded to zero has none.

    >>> signed(-2.25), signed(0.01)
    ('−2.2', '0.0')
    """
    text = format(abs(value), spec)
    if not text.strip("0.,"):
        return text
    return ("−" if value < 0 else "+") + text


def span(low: float, high: float, spec: str = ".1f") -> str:
    """Return "−2.2 to +6.5"."""
    return f"{signed(low, spec)} to {signed(high, spec)}"


def share(value: float) -> str:
    """Return "88%", "3.4%", "0.2%": two digits or so; what is not quite all or nothing is not called so."""
    percent = 100 * value
    if 0 < percent < 0.05:
        return "under 0.1%"
    if 99.5 <= percent < 100:
        return f"{min(percent, 99.9):.1f}%"
    return f"{percent:.0f}%" if percent >= 9.95 or percent == 0 else f"{percent:.1f}%"


def digits(value: float, count: int = 3) -> str:
    """Return a number in three digits or so, with commas: 0.0105, 12.9, 1,593."""
    if value and abs(value) < 0.001:
        return f"{value:.{count - 1}g}"
    text = f"{value:,.0f}" if abs(value) >= 10 ** (count - 1) else f"{value:.{count}g}"
    return text


def large(count: float) -> str:
    """Return "2.4 M", "134.5 M", "8.0 B", "4,321"."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:,.0f}"


def mib(value: float) -> str:
    """Return "640 MiB", or "1.6 GiB"."""
    return f"{value / 1024:.1f} GiB" if value >= 1024 else f"{value:,.0f} MiB"


def duration(seconds: float) -> str:
    """Return "0.4 s", "45 s", "6 min", "2.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def capital(text: str) -> str:
    """Return the text with a capital letter, and with a full stop where it has no end."""
    text = text.strip()
    end = "" if not text or text[-1] in ".!?" else "."
    return text[:1].upper() + text[1:] + end


def short(text: str, limit: int = 300) -> str:
    """Return the beginning of an answer; of an empty one, that it is."""
    text = text.strip()
    return "(nothing)" if not text else text if len(text) <= limit else text[:limit].rstrip() + " …"


def short_end(text: str, limit: int = 300) -> str:
    """Return the end of a prompt: what the answer follows on."""
    text = text.strip()
    return text if len(text) <= limit else "… " + text[-limit:].lstrip()


def name_of(path: str) -> str:
    """Return the last part of a path of any system: the page names no folders of the machine."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def place_of(where: str) -> str:
    """Return "train.jsonl, line 12" for "/data/train.jsonl:12"."""
    name, colon, line = name_of(where).rpartition(":")
    return f"{name}, line {line}" if colon and line.isdigit() else name_of(where)


def without_folders(text: str, paths: Iterable[str]) -> str:
    """Return the text with the names of these files in place of their paths."""
    for path in sorted({*paths}, key=len, reverse=True):
        text = text.replace(path, name_of(path))
    return text
