"""What the benchmark scripts share: interleaved timing, peak memory, and a results file that says how it was made."""

import ctypes
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plopfast.support import machine, memory

RESULTS = Path(__file__).parent / "results"


def interleaved(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each candidate, one after the other in every repeat, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, base: str) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile of the time ratio within each repeat, as neighbours in time share their noise."""
    values = sorted(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
    if len(values) < 2:
        return values[0], values[0], values[0]
    quantiles = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), quantiles[0], quantiles[-1]


def peak_mib(run: Callable[[], Any]) -> float:
    """Peak resident memory while `run` runs. Freed heap is given back first, so that earlier work leaves no trace."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        print("warning: no glibc, so peak memory holds earlier candidates' heap", file=sys.stderr)
    memory.reset_peak()
    run()
    return memory.peak_mib()


def save(name: str | Path, table: str, figures: dict[str, Any]) -> None:
    """Prints the table and writes it, with command, machine, versions and commit: to bench/results/NAME.json, or a path."""
    value = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "table": table.splitlines(),
        **figures,
    }
    path = name if isinstance(name, Path) else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
    print(table)
    print(f"written: {path}")
