"""`plopfast bench`: its options, which are no settings of a run, and its call."""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

from ..support.errors import ConfigError
from .arguments import number, one_of, path
from .help import basics_of
from .parser import Parser

HELP = (
    "time the kernels and a layer against PEFT on this GPU; --tune: measure which path each shape should take; --train: "
    "train your model on your rows with plopfast and with PEFT"
)
TRAIN = ("data", "device", "rank", "lr", "batch_rows", "max_steps")  # that --train alone reads
KERNELS = {"tune": False, "dry": False, "shapes": "all"}  # that it does not read, with their defaults


def add_to(commands: Any) -> Parser:
    """Adds the subcommand to argparse's `commands`, and returns its parser."""
    basics = basics_of("bench")
    text = [HELP[0].upper() + HELP[1:] + ".", f"example: plopfast bench {basics.example}"]
    bench: Parser = commands.add_parser("bench", text=text, basics=basics.options.split())
    bench.foot = "plopfast bench --help-all shows every option."
    add = bench.add_argument
    add("--out", type=path, metavar="DIR", help="write bench.jsonl and bench.png here (default: a new bench-DATE-TIME)")
    add("--overwrite", action="store_true", help="replace results that exist")
    add("--tune", action="store_true", help="fill the tuning table in the user's cache instead")
    add("--train", action="store_true", help="compare training with PEFT and the Hugging Face Trainer, on a CPU too")
    add("--shapes", default="all", **one_of(("all", "llama-8b", "smollm2")), help="shapes to time (default: all)")
    add("--model", help="time the shapes of this model's linear modules instead; with --train: train this model")
    add(
        "--dtype",
        **one_of(("bfloat16", "float16", "float32")),
        help="(default: bfloat16; with --train on a CPU: float32)",
    )
    add("--repeats", type=number(int, 10_000), help="repeats of each measurement (default: 30; with --train: 3)")
    add(
        "--seconds",
        type=number(float, 1e6),
        default=540.0,
        help="leave out repeats and cases after this time (default: 540)",
    )
    add("--dry", action="store_true", help="use tiny shapes on the CPU: tests the program, measures nothing")
    add = bench.add_argument_group("with --train").add_argument
    add("--data", type=path, nargs="+", metavar="FILE", help="training rows (default: the WordNet demo)")
    add("--device", **one_of(("auto", "cpu", "cuda", "mps")), help="auto: a GPU if there is one (default: auto)")
    add("--rank", type=number(int, 4096), help="LoRA rank, on every linear module (default: 16)")
    add("--lr", type=number(float, 1e3), help="peak learning rate of AdamW (default: 0.001)")
    add("--batch-rows", type=number(int, 1e6), help="rows of a step (default: 8)")
    add("--max-steps", type=number(int, 1e6), help="steps of each training (default: 20)")
    return bench


def run_bench(arguments: argparse.Namespace) -> None:
    """Measures, and prints what `bench.run`, `bench.tune` or `bench_train.run` says of it.

    Raises ConfigError for options that do not go together.
    """
    trained = {name: value for name in TRAIN if (value := getattr(arguments, name)) is not None}
    timed = {name for name, usual in KERNELS.items() if getattr(arguments, name) != usual}
    if wrong := timed if arguments.train else trained:
        flag = "--" + sorted(wrong)[0].replace("_", "-")
        raise ConfigError(
            f"bench: {flag} {'does not go with --train: leave one out' if arguments.train else 'needs --train'}"
        )
    out = arguments.out or Path("bench-" + time.strftime("%Y%m%d-%H%M%S"))
    print(_trained(arguments, out, trained) if arguments.train else _timed(arguments, out))


def _trained(arguments: argparse.Namespace, out: Path, settings: dict[str, Any]) -> str:
    from . import bench_train

    settings |= {"data": [str(name) for name in settings.get("data", [])], "dtype": arguments.dtype or "auto"}
    _, text = bench_train.run(
        out, model=arguments.model, repeats=arguments.repeats or 3, budget_s=arguments.seconds,
        overwrite=arguments.overwrite, progress=True, **settings,
    )  # fmt: skip
    return text


def _timed(arguments: argparse.Namespace, out: Path) -> str:
    from . import bench

    shapes = arguments.shapes
    if arguments.model:
        from ..models.linears import linear_modules
        from ..models.loading import load_model

        shapes = sorted({(info.n_in, info.n_out) for info in linear_modules(load_model(arguments.model)[0])})
    measure = bench.tune if arguments.tune else functools.partial(bench.run, out, overwrite=arguments.overwrite)
    _, text = measure(
        shapes=shapes, dtype=arguments.dtype or "bfloat16", repeats=arguments.repeats or 30, budget_s=arguments.seconds,
        dry=arguments.dry, progress=True,
    )  # fmt: skip
    return text
