"""How long Triton compiles."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any


class Compiling:
    """Seconds that Triton has spent on compiling since `watched` began, and how many kernels that were."""

    def __init__(self) -> None:
        self.seconds, self.kernels = 0.0, 0


@contextlib.contextmanager
def watched() -> Iterator[Compiling]:
    """Counts the time of compiling in the block; kernels from Triton's cache on disk are none. Blocks may be nested.

    with compile_time.watched() as found:
        kernel[grid](...)
    found.seconds, found.kernels
    """
    found = Compiling()
    if importlib.util.find_spec("triton") is None:
        yield found
        return
    from triton import knobs

    before = knobs.compilation.listener

    def listener(*, times: Any, cache_hit: bool, **others: Any) -> None:
        found.seconds += times.total / 1e6
        found.kernels += not cache_hit
        if before is not None:
            before(times=times, cache_hit=cache_hit, **others)

    knobs.compilation.listener = listener
    try:
        yield found
    finally:
        knobs.compilation.listener = before
