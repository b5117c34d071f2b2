"""The commands: what each one reads (its groups of settings, its flags) and the function that it calls.

A command imports what it calls when it is called, so that --help answers before torch is loaded.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..support import machine
from ..support.config import (
    AdapterSettings,
    DataSettings,
    ModelSettings,
    PlaceSettings,
    RankSettings,
    RunConfig,
    ScoreSettings,
    SearchSettings,
    StepSettings,
    TrainConfig,
    TrialSettings,
)  # fmt: skip
from ..support.errors import ConfigError
from ..support.options import Settings

if TYPE_CHECKING:
    from ..run.folder import Run


@dataclass(frozen=True)
class Call:
    """A command as it was called: the parsed arguments and the settings."""

    name: str
    arguments: argparse.Namespace
    config: RunConfig

    def run(self) -> "Run":
        """Opens the run folder. Raises ConfigError where --out is missing, or --resume meets --overwrite."""
        from ..run.folder import Run
        from ..support import ranks

        given, resume = self.arguments, getattr(self.arguments, "resume", False)
        if given.out is None:
            if COMMANDS[self.name].needs_out and not getattr(given, "adapter", None):
                raise ConfigError(f"plopfast {self.name} needs --out DIR, the run folder of the stages before it")
            now = ranks.largest(int(time.time()))
            given.out = Path("runs") / time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        if resume and given.overwrite:
            raise ConfigError("--resume goes on with what --overwrite would replace: leave one of them out")
        shown = not machine.launch().rank
        return Run(given.out, self.config, overwrite=given.overwrite, resume=resume, progress=shown)


@dataclass(frozen=True)
class Command:
    """`takes`: groups of settings, or single ones, that the command reads, but for those in `without`. `flags`: see
    options.FLAGS. `on_ranks`: every process of torchrun takes part; other commands are rank 0's alone."""

    help: str
    do: Callable[[Call], int | None]
    takes: tuple[type[Settings] | str, ...] = ()
    without: tuple[str, ...] = ()
    flags: tuple[str, ...] = ("overwrite",)
    needs_out: bool = False
    on_ranks: bool = False


def _run(call: Call) -> None:
    from ..run.whole import run_all

    print(run_all(call.run()))


def _score(call: Call) -> None:
    from ..run.stages import run_score

    run_score(call.run())


def _audit(call: Call) -> None:
    from ..studies.audit import run_audit

    print(run_audit(call.run()))


def _place(call: Call) -> None:
    from ..run.stages import run_place

    run_place(call.run())


def _estimate(call: Call) -> None:
    from ..run.costs import run_estimate

    print(run_estimate(call.run()))


def _train(call: Call) -> None:
    from ..run.stages import run_train

    result = run_train(call.run())
    print(f"{result.steps} steps ({result.stopped}), kept step {result.best_step}, {result.tokens_per_s:.0f} tokens/s")


def _eval(call: Call) -> None:
    from ..run.stages import run_eval

    for who, metrics in run_eval(call.run(), call.arguments.adapter, call.arguments.any_base).items():
        print(f"{who:<6} loss {metrics.loss:.4f}  accuracy {metrics.accuracy:.4f} ({metrics.metric})")


def _trial(call: Call) -> None:
    from ..studies.trial import run_trial

    print(run_trial(call.run()))


def _search(call: Call) -> None:
    from ..studies.search import run_search

    print(run_search(call.run()))


def _report(call: Call) -> None:
    from ..run.stages import run_report

    print(run_report(call.run()))


def _merge(call: Call) -> None:
    from ..run.stages import run_merge

    print(run_merge(call.run(), call.arguments.adapter, call.arguments.any_base))


def _info(call: Call) -> None:
    from .info import info

    print(" ".join(f"{name} {version}" for name, version in machine.versions().items()))
    print(machine.describe(), flush=True)
    print(info(call.config))


def _doctor(call: Call) -> int:
    from ..lora import tuning
    from ..lora.ops import path
    from ..support import devices
    from .doctor import examine

    config = call.config
    device = devices.device_for(config.device)
    if path(device, "auto") != "torch":
        print(tuning.load() or tuning.describe())
    dtype = devices.dtype_for(config.dtype, device)
    healthy = examine(
        config.model, config.device, config.backend, dtype, seconds=call.arguments.seconds, rank=config.rank
    )
    return 0 if healthy else 1


_TRAINED = (ModelSettings, DataSettings, ScoreSettings, PlaceSettings, AdapterSettings, TrainConfig)
COMMANDS = {
    "run": Command(
        "score, place, train, evaluate and report in one go",
        _run, (*_TRAINED, RankSettings), flags=("overwrite", "resume"), on_ranks=True,
    ),
    "score": Command(
        "measure the NFN of every linear module: scores.json",
        _score, (ModelSettings, DataSettings, ScoreSettings, RankSettings), without=("unlabeled",), on_ranks=True,
    ),
    "audit": Command(
        "find out whether the scores can be trusted (stability, controls, other criteria): audit.json",
        _audit,
        (ModelSettings, DataSettings, "score_prompts", "score_tokens", "skip_first", "baseline", "k", "rank", "seed"),
        without=("unlabeled",),
    ),
    "place": Command("choose modules by their scores: placement.json", _place, (PlaceSettings,), needs_out=True),
    "estimate": Command(
        "estimate memory and FLOPs of training on each placement, before any training: estimate.json",
        _estimate, (ModelSettings, DataSettings, "k", "rank", "alpha", "budget", "ranks", "seed", StepSettings),
        needs_out=True,
    ),
    "train": Command(
        "train adapters on the placement: adapter/",
        _train, (ModelSettings, DataSettings, AdapterSettings, TrainConfig, RankSettings),
        flags=("overwrite", "resume"), needs_out=True, on_ranks=True,
    ),
    "eval": Command(
        "measure loss and accuracy of the base and the tuned model on the test rows: eval.json",
        _eval, (ModelSettings, DataSettings, "full", RankSettings), without=("unlabeled",),
        flags=("overwrite", "adapter", "any_base"), needs_out=True, on_ranks=True,
    ),
    "trial": Command(
        "compare placements of equal size, with several seeds each, on the test rows: trial.json",
        _trial, (*_TRAINED, TrialSettings), without=("rule", "lr", "full"), flags=("overwrite", "resume"),
    ),
    "search": Command(
        "search rank, alpha, learning rate, init and placement together (Optuna): search.json",
        _search, (*_TRAINED, SearchSettings), without=("confidence",), flags=("overwrite", "resume"),
    ),
    "report": Command("show what a run folder holds as one self-contained page: report.html", _report, needs_out=True),
    "merge": Command(
        "write the model with its adapter merged in: merged/",
        _merge, (ModelSettings,), without=("backend",), flags=("overwrite", "adapter", "any_base"), needs_out=True,
    ),
    "info": Command(
        "show versions, devices, the model's linear modules and the path that each one takes",
        _info, (ModelSettings, "rank"), without=("threads",), flags=(),
    ),
    "doctor": Command(
        "check kernels, gradients and paths on this machine with this model; exit code 1 if anything is wrong",
        _doctor, (ModelSettings, "rank"), without=("threads",), flags=("seconds",),
    ),
}  # fmt: skip
