"""Forward hooks on linear modules, for as long as a context lasts."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..models.linears import LinearInfo


@contextlib.contextmanager
def _hooked(infos: Sequence[LinearInfo], hooks: Sequence[Any]) -> Iterator[None]:
    handles = [info.module.register_forward_hook(hook) for info, hook in zip(infos, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
