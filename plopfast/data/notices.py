"""What is to be said about rows that can be used, with a count and the first place."""


class Notices:
    """Counts what is to be said about rows.

    >>> notices = Notices()
    >>> notices.add("cut to 512 tokens", "train.jsonl:3")
    >>> notices.lines()
    ['1 row (first: train.jsonl:3): cut to 512 tokens']
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str, bool]] = {}

    def add(self, text: str, where: str, once: bool = False) -> None:
        """Count a row at `where` that `text` is true of. `once`: it is advice, to be said of one split alone."""
        count, first, _ = self._found.get(text, (0, where, once))
        self._found[text] = count + 1, first, once

    def lines(self, told: set[str] | None = None) -> list[str]:
        """Return a line for each text, in the order of their first rows, without advice in `told`, which gets the rest."""
        told = set() if told is None else told
        lines = []
        for text, (count, where, once) in self._found.items():
            if text not in told:
                lines.append(f"{count:,} row{'s' * (count > 1)} (first: {where}): {text}")
            if once:
                told.add(text)
        return lines
