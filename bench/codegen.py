"""What the shipped kernels become on each target: registers, spills, memory, occupancy, instructions. Needs no GPU.

    python bench/codegen.py [--targets sm_90 gfx942] [--processes 2]

Compiled ahead of time by tests/aot.py from the jobs of tests/aot_jobs.py. Instructions are static counts; occupancy is
in blocks for each streaming multiprocessor (AMD: compute unit, or work-group processor).
"""

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plopfast.support import machine

machine.set_waiting_policy()

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "kernels"))
os.environ.pop("TRITON_CACHE_DIR", None)  # a kernel from a cache has no compile time

import aot_jobs
import measure
from aot import LIMITS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    pairs = [(job, target) for job, target in aot_jobs.every_pair() if target in arguments.targets]
    began = time.perf_counter()
    built = aot_jobs.build_all(pairs, arguments.processes)
    build_s = time.perf_counter() - began
    built = list({identity(one): one for one in reversed(built)}.values())[::-1]  # the first of equal kernels
    bad = sum(bool(one.wrong) for one in built)
    lines = [
        f"{len(built)} kernels in {build_s:.0f} s by {arguments.processes} processes; {bad} with something wrong",
        f"{'job':<33}{'target':<9}{'kernel':<15}{'tile, warps, stages':<25}{'regs':>5}{'spill':>6}{'stack':>6}"
        f"{'shared':>8}{'tmem':>5}{'blocks':>7}  compile  instructions; loads, stores {{bytes: count}}",
        *(line(one) for one in built),
    ]
    measure.save("codegen", "\n".join(lines), {"build_s": build_s, "kernels": [row(one) for one in built]})


def identity(one: aot_jobs.Built) -> str:
    return repr((one.target, one.launch and (one.launch.kernel, one.launch.constants), one.resources, one.wrong))


def line(one: aot_jobs.Built) -> str:
    launch, found = one.launch, one.resources
    if launch is None or found is None:
        return f"{one.job:<33}{one.target:<9}{'; '.join(one.wrong).splitlines()[0]}"
    tile = "x".join(value for name, value in launch.constants.items() if name in ("BM", "BN", "BC", "BK", "BLOCK"))
    counts = " ".join(f"{name} {count}" for name, count in found.instructions.items() if count)
    return (
        f"{one.job:<33}{one.target:<9}{launch.kernel:<15}{tile + f', {launch.num_warps}, {launch.num_stages}':<25}"
        f"{found.registers:>5}{found.spills:>6}{found.stack:>6}{found.shared:>8}{found.tensor_memory:>5}"
        f"{found.occupancy[0]:>7}{launch.compile_s:>7.1f} s  {counts}; {found.loads}, {found.stores}"
        + "".join(f"  !! {text}" for text in one.wrong)
    )


def row(one: aot_jobs.Built) -> dict[str, Any]:
    launch, found = one.launch, one.resources
    figures: dict[str, Any] = {"job": one.job, "target": one.target, "wrong": one.wrong}
    if launch is not None and found is not None:
        figures |= {
            "kernel": launch.kernel,
            "constants": launch.constants,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "grid": launch.grid,
            "compile_s": round(launch.compile_s, 2),
            **asdict(found),
        }
    return figures


if __name__ == "__main__":
    main()
