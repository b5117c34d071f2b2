"""Things to say once about many rows, with a count and the first place."""


class Notices:
    """Counts what is to be said about rows.

    >>> notices = Notices()
    >>> notices.add("cut to 512 tokens", "train.jsonl:3")
    >>> notices.lines()
    ['1 row (first: train.jsonl:3): cut to 512 tokens']
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, text: str, where: str) -> None:
        """Count a row at `where` that `text` is true of."""
        count, first = self._found.get(text, (0, where))
        self._found[text] = count + 1, first

    def lines(self, told: set[str] | None = None) -> list[str]:
        """Return a line for each text, in the order of their first rows.

        Texts in `told` are left out, and the others are added to it: so a thing is said once for several splits.
        """
        told = set() if told is None else told
        new = {text: found for text, found in self._found.items() if text not in told}
        told |= new.keys()
        return [f"{count:,} row{'s' * (count > 1)} (first: {where}): {text}" for text, (count, where) in new.items()]
