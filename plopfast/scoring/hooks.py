"""Forward hooks on linear modules, removed when a context ends."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..models.linears import LinearInfo


@contextlib.contextmanager
def hooked(infos: Sequence[LinearInfo], hooks: Sequence[Any]) -> Iterator[None]:
    """Registers one forward hook on each module, and removes them all at the end."""
    handles = [info.module.register_forward_hook(hook) for info, hook in zip(infos, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
