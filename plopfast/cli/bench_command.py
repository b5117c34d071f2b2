"""`plopfast bench`: its options, which are no settings of a run, and its call."""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

from .arguments import number, path

HELP = "time the kernels and a layer against PEFT on this GPU; --tune: measure which path each shape should take"


def add_to(commands: Any) -> None:
    """Adds the subcommand to argparse's `commands`."""
    bench = commands.add_parser("bench", help=HELP, description=HELP)
    add = bench.add_argument
    add("--out", type=path, metavar="DIR", help="write bench.jsonl and bench.png here (default: a new bench-DATE-TIME)")
    add("--overwrite", action="store_true", help="replace results that exist")
    add("--tune", action="store_true", help="fill the tuning table in the user's cache instead")
    add("--shapes", default="all", choices=("all", "llama-8b", "smollm2"), help="shapes to time (default: all)")
    add("--model", help="time the shapes of this model's linear modules instead")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="(default: bfloat16)")
    add("--repeats", type=number(int, 10_000), default=30, help="repeats of each measurement (default: 30)")
    add(
        "--seconds",
        type=number(float, 1e6),
        default=540.0,
        help="leave out repeats and cases after this time (default: 540)",
    )
    add("--dry", action="store_true", help="use tiny shapes on the CPU: tests the program, measures nothing")


def run_bench(arguments: argparse.Namespace) -> None:
    """Measures, and prints what `bench.run` or `bench.tune` says of it."""
    from . import bench

    shapes = arguments.shapes
    if arguments.model:
        from ..models.linears import linear_modules
        from ..models.loading import load_model

        shapes = sorted({(info.n_in, info.n_out) for info in linear_modules(load_model(arguments.model)[0])})
    out = arguments.out or Path("bench-" + time.strftime("%Y%m%d-%H%M%S"))
    measure = bench.tune if arguments.tune else functools.partial(bench.run, out, overwrite=arguments.overwrite)
    _, text = measure(
        shapes=shapes, dtype=arguments.dtype, repeats=arguments.repeats, budget_s=arguments.seconds, dry=arguments.dry,
        progress=True,
    )  # fmt: skip
    print(text)
