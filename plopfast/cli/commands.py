"""The commands: what each one reads (its groups of settings, its flags) and the function that it calls.

A command imports what it calls when it is called, so that --help answers before torch is loaded.
"""

import argparse
import contextlib
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..support import config as groups, machine
from ..support.config import RunConfig
from ..support.errors import ConfigError
from ..support.options import Settings

if TYPE_CHECKING:
    from ..run.run import Run


@dataclass(frozen=True)
class Call:
    """A command as it was called: the parsed arguments, the settings, and what is done when it has ended."""

    name: str
    arguments: argparse.Namespace
    config: RunConfig
    ends: contextlib.ExitStack

    def run(self) -> "Run":
        """Opens the run folder. Raises ConfigError where --out is missing, or --resume meets --overwrite."""
        from ..run.run import Run
        from ..support import ranks

        given, resume = self.arguments, getattr(self.arguments, "resume", False)
        if given.out is None:
            if COMMANDS[self.name].needs_out and not getattr(given, "adapter", None):
                raise ConfigError(f"plopfast {self.name} needs --out DIR, the run folder of the stages before it")
            now = ranks.largest(int(time.time()))
            given.out = Path("runs") / time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        _check_resume(given)
        shown = not machine.launch().rank
        run = Run(given.out, self.config, overwrite=given.overwrite, resume=resume, progress=shown)
        self.ends.callback(run.at.close)
        ranks.on_main(run.at.check)  # a wrong --out should stop the command before its work
        return run


def _check_resume(given: argparse.Namespace) -> None:
    if getattr(given, "resume", False) and given.overwrite:
        raise ConfigError("--resume goes on with what --overwrite would replace: leave one of them out")


@dataclass(frozen=True)
class Command:
    """`do` returns the exit code (None: 0). `takes`: groups of settings, or single ones, that the command reads, but for
    those in `without`. `flags`: see options.FLAGS. `needs_out`: it works in the run folder of the stages before it. `names`: of
    arguments without an option, in place of --out: run folders; settings come from the first one's config.json."""

    help: str
    do: Callable[[Call], int | None]
    takes: tuple[type[Settings] | str, ...] = ()
    without: tuple[str, ...] = ()
    flags: tuple[str, ...] = ("overwrite",)
    needs_out: bool = False
    names: tuple[str, ...] = ()

    @property
    def bare(self) -> bool:
        """Whether it reads no settings at all: verify, which looks at a folder as it is."""
        return not self.takes and not self.flags

    @property
    def on_ranks(self) -> bool:
        """Whether every process of torchrun takes part; other commands are rank 0's alone."""
        return groups.RankSettings in self.takes


def _stage(name: str) -> Callable[[Call], int]:
    """Calls the function `name` (wing.file.function) with the run, and prints the text or path that it returns, and what
    --print-peft asks for. A text with False beside it, which says that something is wrong, ends with exit code 1."""
    module, _, function = name.rpartition(".")

    def do(call: Call) -> int:
        with_peft = getattr(call.arguments, "print_peft", False)
        if with_peft and call.config.full:
            raise ConfigError(
                "--print-peft shows where adapters go, and --full trains all weights: leave one of them out"
            )
        run = call.run()
        result = getattr(importlib.import_module(f"plopfast.{module}"), function)(run)
        text, fine = result if isinstance(result, tuple) else (result, True)
        if isinstance(text, str | Path):
            print(text)
        if with_peft and not machine.launch().rank:
            from ..run.paste import peft_text

            print(peft_text(run, placed=call.name != "score"))
        return 0 if fine else 1

    return do


def _data(call: Call) -> None:
    from ..run.stages import run_data
    from ..support.progress import shows_color

    kept = call.arguments.out is not None
    run = call.run()
    run.progress = False  # all that would be said is in the text
    print((run_data(run) if kept else run.described()).text(shows_color(sys.stdout)))


def _train(call: Call) -> None:
    from ..run.stages import run_train

    result = run_train(call.run())
    print(f"{result.steps} steps ({result.stopped}), kept step {result.best_step}, {result.tokens_per_s:.0f} tokens/s")


def _estimate(call: Call) -> int | None:
    given = call.arguments
    if call.config.model_config is None:
        return _stage("run.costs.run_estimate")(call)
    from ..run.shapes import estimate_config

    default = not hasattr(given, "rule") and call.config.rule == RunConfig().rule
    print(estimate_config(call.config, given.out, default_rule=default, overwrite=given.overwrite))
    return None


def _grpo(call: Call) -> None:
    from ..integrations.rewards import load_function
    from ..run.grpo import in_words, run_grpo
    from ..support.grpo_settings import LR, names_code
    from ..support.settings_file import load_settings

    given: str | None = getattr(call.arguments, "reward", None)  # of the command line alone: no file makes code run
    chosen = hasattr(call.arguments, "lr") or (call.arguments.config and "lr" in load_settings(call.arguments.config))
    run = call.run()
    if not chosen and run.config.lr == RunConfig().lr:
        run.config = dataclasses.replace(run.config, lr=LR)
        run.say(f"learning rate {LR:g}: the default of supervised training, {RunConfig().lr:g}, is too high here")
    print(in_words(run_grpo(run, load_function(given) if given and names_code(given) else None)))


def _multi(call: Call) -> int:
    from ..run.jobs import read_jobs
    from ..run.multi import run_multi

    _check_resume(call.arguments)
    if call.arguments.jobs is None:
        raise ConfigError("plopfast multi needs --jobs FILE, a JSON or YAML file of jobs (docs/multi.md)")
    common, jobs = read_jobs(call.arguments.jobs, call.config)
    run = dataclasses.replace(call, config=common).run()
    text, all_trained = run_multi(run, call.arguments.jobs, jobs, call.arguments.at_once)
    print(text)
    return 0 if all_trained else 1


def _study(call: Call) -> int:
    from ..studies.plan import read_plan
    from ..studies.study import run_study

    given = call.arguments
    if given.plan is None or given.out is None:
        raise ConfigError(
            "plopfast study needs --plan FILE, a JSON or YAML file of models, tasks and budgets (docs/study.md), and --out DIR"
        )
    text, all_done = run_study(
        given.out, read_plan(given.plan, call.config), given.plan, call.config.confidence or 0.95
    )
    print(text)
    return 0 if all_done else 1


def _eval(call: Call) -> int:
    from ..run.evaluating import eval_lines, lost, run_eval, sample_lines

    value = run_eval(call.run(), call.arguments.adapter, call.arguments.any_base)
    for who, line in [*eval_lines(value), *sample_lines(value)]:
        print(f"{who:<8} {line}")
    return 1 if lost(value) else 0


def _talking(name: str) -> Callable[[Call], None]:
    """A function of talking.py, which loads what answers when it is called."""

    def do(call: Call) -> None:
        from . import talking

        getattr(talking, name)(call)

    return do


def _merge(call: Call) -> None:
    from ..run.stages import run_merge

    given = call.arguments
    print(run_merge(call.run(), given.adapter, given.any_base, given.requantize))


def _verify(call: Call) -> int:
    from ..run.verify import verify

    same, text = verify(call.arguments.out)
    print(text)
    return 0 if same else 1


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

    config, seconds = call.config, call.arguments.seconds
    device = devices.device_for(config.device)
    if path(device, "auto") != "torch":
        print(tuning.load() or tuning.describe())
    dtype = devices.dtype_for(config.dtype, device)
    healthy = examine(
        config.model, config.device, config.backend, dtype, quantize=config.quantize, quantize_head=config.quantize_head,
        seconds=seconds, rank=config.rank,
    )  # fmt: skip
    return 0 if healthy else 1


MODEL, DATA, SCORE, PLACE = groups.ModelSettings, groups.DataSettings, groups.ScoreSettings, groups.PlaceSettings
ADAPTER, TRAIN, STEP, RANKS = groups.AdapterSettings, groups.TrainConfig, groups.StepSettings, groups.RankSettings
EVAL, FIT, GRPO, GENERATE = groups.EvalSettings, groups.FitSettings, groups.GRPOSettings, groups.GenerateSettings
STREAM = ("stream", "resident_share")
ALL = (MODEL, DATA, SCORE, PLACE, ADAPTER, TRAIN)
RESUMABLE, OF_AN_ADAPTER = ("overwrite", "resume"), ("overwrite", "adapter", "any_base")
COMMANDS = {
    "run": Command(
        "score, place, train, evaluate and report in one go",
        _stage("run.whole.run_all"), (*ALL, EVAL, FIT, RANKS), flags=(*RESUMABLE, "print_peft"),
    ),
    "data": Command(
        "show what would be learned of your rows: lengths, learned tokens, what is left out, one whole row",
        _data, ("model", DATA),
    ),
    "score": Command(
        "measure the NFN of every linear module: scores.json",
        _stage("run.stages.run_score"), (MODEL, DATA, SCORE, RANKS), without=("unlabeled",),
        flags=("overwrite", "print_peft"),
    ),
    "audit": Command(
        "find out whether the scores can be trusted (stability, controls, other criteria): audit.json",
        _stage("studies.audit.run_audit"),
        (MODEL, DATA, "score_prompts", "score_tokens", "skip_first", "baseline", "k", "rank", "seed"),
        without=("unlabeled",),
    ),
    "place": Command(
        "choose modules by their scores: placement.json",
        _stage("run.stages.run_place"), (PLACE,), flags=("overwrite", "print_peft"), needs_out=True,
    ),
    "estimate": Command(
        "estimate memory and FLOPs of training on each placement, before any training: estimate.json; or, with --model-config, "
        "of a model that you have not got",
        _estimate, (MODEL, groups.ShapeSettings, DATA, "rule", "k", "rank", "budget", "ranks", "seed", STEP, FIT),
        without=("backend",), needs_out=True,
    ),
    "train": Command(
        "train adapters on the placement: adapter/",
        _train, (MODEL, DATA, ADAPTER, TRAIN, FIT, RANKS), flags=RESUMABLE, needs_out=True,
    ),
    "multi": Command(
        "train several adapters at once on one loaded base, each on rows and with settings of its own: multi.json, jobs/NAME/",
        _multi, (*ALL, RANKS), without=("full", "compile", "mlp_rows", "neftune"), flags=(*RESUMABLE, "jobs", "at_once"),
    ),
    "grpo": Command(
        "train adapters by reinforcement learning on a reward that can be computed (GRPO, by TRL): adapter/, grpo.json",
        _grpo,
        ("model", "dtype", "device", "threads", "train", "test", "bad_rows", "allow_overlap", "score_prompts", "confidence", PLACE,
         GRPO, "eval_rows", "max_steps", "lr", "schedule", "warmup", "weight_decay", "clip", "accumulate", "checkpointing",
         "save_every", "keep"),
        without=("init",), flags=RESUMABLE,
    ),
    "eval": Command(
        "measure loss and accuracy of the base and the tuned model on the test rows (else the validation rows): eval.json",
        _eval, (MODEL, DATA, EVAL, "full", RANKS), without=("unlabeled",), flags=OF_AN_ADAPTER, needs_out=True,
    ),
    "generate": Command(
        "answer prompts, with an adapter or without: prints the answers, and writes no run folder",
        _talking("generate_answers"), (MODEL, GENERATE, "seed"),
        flags=("prompt", "prompts", "answers", "overwrite", "adapters", "without", "any_base"),
    ),
    "chat": Command(
        "talk with the model, with an adapter or without; writes nothing",
        _talking("chat"), (MODEL, GENERATE, "seed"), flags=("adapter", "any_base"),
    ),
    "compare": Command(
        "compare two finished trainings on the same rows, row by row, with intervals; writes nothing",
        _talking("compare_two"), (MODEL, DATA), without=("unlabeled",), flags=("any_base",), names=("A", "B"),
    ),
    "trial": Command(
        "compare placements of equal size, with several seeds each, on the test rows: trial.json",
        _stage("studies.trial.run_trial"), (*ALL, "general", groups.TrialSettings), without=("rule", "lr", "full"), flags=RESUMABLE,
    ),
    "study": Command(
        "run trials of several models, tasks and budgets, and find out which criteria predict their results: study.json",
        _study, flags=("plan",),
    ),
    "search": Command(
        "search rank, alpha, learning rate, init and placement together (Optuna): search.json",
        _stage("studies.search.run_search"), (*ALL, groups.SearchSettings), without=("confidence",), flags=RESUMABLE,
    ),
    "report": Command(
        "show what a run folder holds as one self-contained page: report.html",
        _stage("run.stages.run_report"), needs_out=True,
    ),
    "merge": Command(
        "write the model with its adapter merged in: merged/",
        _merge, (MODEL,), without=("backend", *STREAM), flags=(*OF_AN_ADAPTER, "requantize"), needs_out=True,
    ),
    "verify": Command(
        "find out whether a run folder's files, and what they were made from, are still what they were; exit code 1 if not",
        _verify, flags=(), needs_out=True,
    ),
    "info": Command(
        "show versions, devices, the model's linear modules and the path that each one takes",
        _info, (MODEL, "rank"), without=("threads", "embedding", *STREAM), flags=(),
    ),
    "doctor": Command(
        "check kernels, gradients and paths on this machine with this model; exit code 1 if anything is wrong",
        _doctor, (MODEL, "rank"), without=("threads", "embedding", *STREAM), flags=("seconds",),
    ),
}  # fmt: skip
