"""The command line: each command calls one public function of stages.py."""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..placing.rules import help_words
from ..support import machine, threads
from ..support.config import RunConfig, TrainConfig, load_settings
from ..support.errors import ConfigError, Interrupted, PlopfastError, RankError

COMMON = ("model", "train", "valid", "test", "max_length", "seed", "max_steps", "dtype", "device", "backend", "threads")
RANKS = ("parallel", "timeout")
SCORING = ("score_prompts", "confidence", "score_tokens", "skip_first", "baseline", "compat")
PLACING = ("rule", "k", "rank", "alpha", "budget", "ranks", "granularity", "cap")
EVA = ("init", "rank")  # what EVA vectors, taken while scoring, depend on
TRAINING = (
    *(f.name for f in dataclasses.fields(TrainConfig) if f.name not in COMMON),
    "rslora",
    "init",
    "unlabeled",
    "full",
)
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": ("score, place, train, evaluate and report in one go", (*SCORING, *PLACING, *TRAINING, *RANKS)),
    "score": ("measure NFN of every linear module: scores.json", (*SCORING, "k", "rule", *EVA, *RANKS)),
    "audit": (
        "can the scores be trusted? stability, controls and other criteria: audit.json",
        ("score_prompts", "score_tokens", "skip_first", "k", "rank"),
    ),
    "place": ("choose modules by their scores: placement.json", PLACING),
    "estimate": (
        "memory and FLOPs of training on each placement, before training: estimate.json",
        ("k", "rank", "alpha", "budget", "ranks", "batch_tokens", "checkpointing", "packing"),
    ),
    "train": ("train adapters on the placement: adapter/", (*TRAINING, *RANKS)),
    "eval": ("loss and accuracy of base and tuned model on the test rows: eval.json", ("full", *RANKS)),
    "trial": (
        "placements of equal size, several seeds each, compared on the test rows: trial.json",
        (
            *SCORING,
            *PLACING[1:],
            *(name for name in TRAINING if name not in ("lr", "full")),
            "arms",
            "lrs",
            "seeds",
            "general",
        ),
    ),
    "search": (
        "search rank, alpha, learning rate, init and placement together (Optuna): search.json",
        (*SCORING, *PLACING, *TRAINING, "search_trials"),
    ),
    "report": ("one self-contained page from the run's files: report.html", ()),
    "merge": ("write the model with its adapter merged in: merged/", ()),
    "info": ("versions, devices, the model's linear modules and the path each one takes", ()),
    "doctor": (
        "check kernels, gradients and paths on this machine with this model; exit code 1 if anything is wrong",
        (),
    ),
}
RESUMABLE = ("run", "train", "trial", "search")
ON_RANKS = ("run", "score", "train", "eval")  # what every rank takes part in; the others are rank 0's alone
BENCH = "time the kernels and a layer against PEFT on this GPU; --tune: measure which path each shape should take"
DESCRIPTION = """Where do LoRA adapters belong, and how well do they train there?
plopfast measures Normalized Feature Norms (PLoP, arXiv 2506.20629) on your data with forward passes only, puts
adapters on the module types that score lowest, trains them, and writes a PEFT adapter and a report."""
EPILOG = """Settings come from, in rising order: defaults, the run folder's config.json, --config FILE, options.
Data rows are JSON lines: {"prompt", "completion"}, {"messages"} or {"text"}.
Exit codes: 0 done, 1 doctor found something wrong, 2 a clear error, 130 or 143 interrupted (state saved). On several devices:
torchrun --nproc-per-node N -m plopfast run|score|train|eval ..."""


def main(argv: Sequence[str] | None = None) -> int:
    threads.set_waiting_policy()
    launch = machine.launch()
    if launch.size == 1:
        return _main(argv, launch)
    # rank 0 speaks for all
    with contextlib.redirect_stdout(io.StringIO()) if launch.rank else contextlib.nullcontext():
        code = _main(argv, launch)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # on busy cores, threads of torch's process groups can abort an interpreter that shuts down


def _main(argv: Sequence[str] | None, launch: machine.Launch) -> int:
    with contextlib.redirect_stderr(io.StringIO()) if launch.rank else contextlib.nullcontext():
        arguments = build_parser().parse_args(argv)
    try:
        code = _run(arguments, launch)
    except RankError:
        return 2
    except PlopfastError as error:
        return _fail(str(error), launch)
    except OSError as error:
        return _fail(f"{error.filename or ''}: {error.strerror or error}", launch)
    except KeyboardInterrupt as error:
        resumable = arguments.out and arguments.command in RESUMABLE
        hint = f"; go on with: plopfast {arguments.command} --resume --out {arguments.out}" if resumable else ""
        if not launch.rank:
            print(f"\nplopfast: interrupted: {error or 'finished stages are kept'}{hint}", file=sys.stderr)
        code = 128 + (error.number if isinstance(error, Interrupted) else 2)
        if not isinstance(error, Interrupted):
            return code
    except Exception as error:
        if launch.size == 1:
            raise
        from ..support import ranks

        lost = (
            "another rank has ended, or did not answer within --timeout: see its message, or torchrun's below "
            f"({str(error).splitlines()[0]})"
        )
        told = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        return _fail(lost if ranks.is_loss(error) else told, launch)
    if launch.size > 1:
        from ..support import ranks

        ranks.close()
    return code


def _fail(message: str, launch: machine.Launch) -> int:
    if launch.size > 1:
        from ..support import ranks

        if not ranks.first_to_fail():
            return 2
        message = f"rank {launch.rank} of {launch.size}: {message}"
    print(f"plopfast: error: {message}", file=sys.stderr, flush=True)
    return 2


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("plopfast", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, own) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, epilog=EPILOG, formatter_class=raw)
        command.add_argument("--out", type=Path, help="run folder (default: a new one, runs/DATE-TIME)")
        command.add_argument(
            "--config", type=Path, metavar="FILE", help="JSON file of settings, named as the options are"
        )
        if name == "doctor":
            command.add_argument("--seconds", type=float, default=60.0, help="for the kernel checks (default: 60)")
        if name not in ("info", "doctor"):
            command.add_argument("--overwrite", action="store_true", help="replace results that exist")
        if name in RESUMABLE:
            command.add_argument("--resume", action="store_true", help="go on with what was interrupted")
        if name in ("eval", "merge"):
            command.add_argument("--adapter", type=Path, metavar="DIR", help="adapter folder (default: OUT/adapter)")
            command.add_argument("--any-base", action="store_true", help="accept an adapter of other base weights")
        _add_settings(command, (*COMMON, *own))
    bench = commands.add_parser("bench", help=BENCH, description=BENCH)
    bench.add_argument(
        "--out", type=Path, help="folder of bench.jsonl and bench.png (default: a new one, bench-DATE-TIME)"
    )
    bench.add_argument("--overwrite", action="store_true", help="replace results that exist")
    bench.add_argument("--tune", action="store_true", help="fill the tuning table in the user's cache instead")
    bench.add_argument("--shapes", default="all", choices=("all", "llama-8b", "smollm2"), help="(default: all)")
    bench.add_argument("--model", help="take the shapes of this model's linear modules instead")
    bench.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="(default: bfloat16)"
    )
    bench.add_argument("--repeats", type=int, default=30, help="of each measurement (default: 30)")
    bench.add_argument(
        "--seconds", type=float, default=540.0, help="then repeats and cases are left out (default: 540)"
    )
    bench.add_argument(
        "--dry", action="store_true", help="tiny shapes on the CPU: a test of the program, no measurement"
    )
    return parser


def _add_settings(command: argparse.ArgumentParser, names: Sequence[str]) -> None:
    types, group = get_type_hints(RunConfig), command.add_argument_group("settings")
    fields, words = {f.name: f for f in dataclasses.fields(RunConfig)}, help_words()
    for name in names:
        field, hint = fields[name], types[name]
        plain = next((t for t in get_args(hint) if t is not type(None)), hint)  # int | None -> int
        text = field.metadata["help"].format(**words) + ("" if field.default is None else " (default: %(default)s)")
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": text.replace("%(default)s", str(field.default)),
        }
        if plain is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {
                "type": plain,
                "metavar": "FILE"
                if name in ("train", "valid", "test", "unlabeled", "general")
                else plain.__name__.upper(),
            }
            if field.metadata["choices"]:
                options |= {"choices": field.metadata["choices"], "metavar": None}
        group.add_argument(f"--{name.replace('_', '-')}", **options)


def settings_of(arguments: argparse.Namespace) -> RunConfig:
    """Defaults, then the run folder's config.json (a new run ignores it), then --config, then the options given."""
    settings: dict[str, Any] = {}
    kept = arguments.out / "config.json" if arguments.out else None
    if kept and kept.is_file() and (arguments.command != "run" or arguments.resume):
        settings |= load_settings(kept)
    if arguments.config:
        settings |= load_settings(arguments.config)
    names = {field.name for field in dataclasses.fields(RunConfig)}
    return RunConfig(**settings | {key: value for key, value in vars(arguments).items() if key in names})


def _run(arguments: argparse.Namespace, launch: machine.Launch) -> int:
    if launch.rank and arguments.command not in ON_RANKS:
        return 0
    if arguments.command == "bench":
        return _bench(arguments)
    config = settings_of(arguments)
    from ..run import folder, stages
    from ..support import devices, ranks

    command = arguments.command
    if command in ON_RANKS:
        ranks.init(devices.device_for(config.device), config.timeout)
    if command == "info":
        print(" ".join(f"{name} {version}" for name, version in machine.versions().items()))
        print(machine.describe(), flush=True)
        print(info(config))
        return 0
    if command == "doctor":
        from ..lora import tuning
        from ..lora.ops import path
        from .doctor import examine

        device = devices.device_for(config.device)
        if path(device, "auto") != "torch":
            print(tuning.load() or tuning.describe())
        dtype = devices.dtype_for(config.dtype, device)
        settings = config.model, config.device, config.backend, dtype
        return 0 if examine(*settings, seconds=arguments.seconds, rank=config.rank) else 1
    if arguments.out is None:
        if command in ("place", "estimate", "train", "report") or (
            command in ("eval", "merge") and not arguments.adapter
        ):
            raise ConfigError(f"plopfast {command} needs --out DIR, the run folder of the stages before it")
        now = ranks.largest(int(time.time()))
        arguments.out = Path("runs") / time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    progress, resume = not launch.rank, getattr(arguments, "resume", False)
    if resume and arguments.overwrite:
        raise ConfigError("--resume goes on with what --overwrite would replace: leave one of them out")
    run = folder.Run(arguments.out, config, overwrite=arguments.overwrite, resume=resume, progress=progress)
    if command == "run":
        print(stages.run_all(run))
    elif command == "score":
        stages.run_score(run)
    elif command == "audit":
        from ..studies.audit import run_audit

        print(run_audit(run))
    elif command == "place":
        stages.run_place(run)
    elif command == "estimate":
        print(stages.run_estimate(run))
    elif command == "train":
        result = stages.run_train(run)
        print(
            f"{result.steps} steps ({result.stopped}), kept step {result.best_step}, {result.tokens_per_s:.0f} tokens/s"
        )
    elif command == "eval":
        for who, metrics in stages.run_eval(run, arguments.adapter, arguments.any_base).items():
            print(f"{who:<6} loss {metrics.loss:.4f}  accuracy {metrics.accuracy:.4f} ({metrics.metric})")
    elif command == "trial":
        from ..studies.trial import run_trial

        print(run_trial(run))
    elif command == "search":
        from ..studies.search import run_search

        print(run_search(run))
    elif command == "report":
        print(stages.run_report(run))
    elif command == "merge":
        print(stages.run_merge(run, arguments.adapter, arguments.any_base))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from . import bench

    shapes = arguments.shapes
    if arguments.model:
        from ..models.linears import linear_modules
        from ..models.loading import load_model

        shapes = sorted({(info.n_in, info.n_out) for info in linear_modules(load_model(arguments.model)[0])})
    how = {
        "shapes": shapes, "dtype": arguments.dtype, "repeats": arguments.repeats,
        "budget_s": arguments.seconds, "dry": arguments.dry, "progress": True,
    }  # fmt: skip
    if arguments.tune:
        print(bench.tune(**how)[1])
        return 0
    out = arguments.out or Path("bench-" + time.strftime("%Y%m%d-%H%M%S"))
    print(bench.run(out, overwrite=arguments.overwrite, **how)[1])
    return 0


def info(config: RunConfig) -> str:
    """The model's linear modules by type, with the path that each one takes and why."""
    from ..lora import tuning
    from ..lora.ops import path
    from ..models.loading import load_model
    from ..support.devices import device_for, dtype_for
    from .doctor import module_paths

    device = device_for(config.device)
    lines = [tuning.describe()]
    if path(device, config.backend) != "torch":
        tuning.load()
    model, _ = load_model(config.model)
    lines.append(f"model: {model.name_or_path}")
    lines.append(f"{'modules':>7} {'module type':<16} {'in -> out':<14} path on {device}, rank {config.rank}")
    dtype = dtype_for(config.dtype, device)
    for number, type_, shape, plan in module_paths(model, device, dtype, 1024, config.rank, config.backend):
        lines.append(f"{number:>7} {type_:<16} {shape:<14} {plan}")
    return "\n".join(line for line in lines if line)


if __name__ == "__main__":
    sys.exit(main())
