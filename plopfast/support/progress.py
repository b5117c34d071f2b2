"""Progress of long stages: a bar with rate and time left on stderr, or nothing."""

from typing import Any


class _Silent:
    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, n: int = 1) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...


def bar(label: str, total: int | None, unit: str, show: bool) -> Any:
    """A context manager with `update(n)` and `set_postfix_str(text)`."""
    if not show:
        return _Silent()
    from tqdm import tqdm

    return tqdm(desc=f"{label:<9}", total=total, unit=f" {unit}", mininterval=0.5, dynamic_ncols=True)
