"""Reinforcement learning with verifiable rewards: GRPO (DeepSeekMath, arXiv 2402.03300) by TRL's trainer, on a placement.

Each step draws several completions of each of some prompts. A completion is rewarded, and becomes more likely where its
reward is above the mean of its prompt's completions. TRL draws, compares and steps; PEFT holds the adapters. Here are the
rows, the rewards, the measurement before and after, and what makes a run go on where it was.
"""

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.tasks import Prompt, prompts_of
from ..lora.layer import LoRALinear
from ..lora.placement import Placement
from ..models.linears import words_of_codes
from ..models.running import modes_kept, remember_requires_grad
from ..support.config import TrainConfig
from ..support.errors import ConfigError, FileError, ModelError
from ..support.grpo_settings import LR, GRPOSettings, drawn_at
from ..support.progress import bar
from .checkpoints import GRPO_CHECKPOINTS, last_checkpoint
from .judging import Judge, Judged, measure
from .rewards import Reward, built_in

SHOWN = 6  # test prompts whose completions are kept


@dataclass(frozen=True)
class Sample:
    """A test prompt, its most likely completion before and after, and the rewards of these."""

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float


@dataclass(frozen=True)
class GRPOResult:
    """How a training ended. `model` is the PEFT model, adapters and all.

    `before` and `after` are the rewards of the test prompts, one each, of the most likely completion (greedy); empty without
    test prompts. `history` holds a record a step, as rewards.jsonl does. `idle` is the share of the steps in which all
    completions of each prompt were rewarded alike, which teach nothing. `paths` says what `accelerate` made faster.
    """

    model: Any
    steps: int
    before: list[float]
    after: list[float]
    samples: list[Sample]
    history: list[dict[str, Any]]
    idle: float
    seconds: float
    paths: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """What grpo.json holds."""
        means = {"mean_before": fmean(self.before), "mean_after": fmean(self.after)} if self.before else {}
        rewards = [record["reward"] for record in self.history if record["reward"] is not None]
        few = max(1, len(rewards) // 4)
        return {
            "steps": self.steps, "test_prompts": len(self.before), **means, "idle": self.idle, "seconds": self.seconds,
            "reward_first": fmean(rewards[:few]) if rewards else None, "reward_last": fmean(rewards[-few:]) if rewards else None,
            "samples": [vars(sample) for sample in self.samples], "paths": self.paths, "notes": self.notes,
        }  # fmt: skip


@contextlib.contextmanager
def _own_random() -> Iterator[None]:
    """Puts the random states back that a trainer seeds: Python's, NumPy's and torch's."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@_own_random()
def grpo(
    model: nn.Module, tokenizer: Any, rows: Sequence[Any], reward: str | Reward, *, placement: Placement | None = None,
    test: Sequence[Any] = (), generations: int = 8, prompts: int = 4, completion_length: int = 256, temperature: float = 1.0,
    beta: float = 0.0, max_steps: int | None = None, lr: float = LR, schedule: str = "cosine", warmup: float = 0.1,
    weight_decay: float = 0.0, clip: float = 1.0, accumulate: int = 1, checkpointing: bool = False, seed: int = 0,
    save_every: int | None = None, keep: int = 2, out: str | Path | None = None, resume: bool = False, progress: bool = False,
) -> GRPOResult:  # fmt: skip
    """Trains adapters by GRPO, so that completions of the prompts in `rows` earn more of a reward.

    `model`: as `load_model` gives it, with a `placement`, on which PEFT's adapters are made; or a PEFT model, whose
    adapters are trained on. `rows`: dicts with a "prompt", which is a text or messages (put through the tokenizer's chat
    template), and whatever the reward wants. `reward`: the name of one that is included ("exact", "number", "number:0.01",
    "regex:PATTERN", "json:SCHEMA.json"), or a function that is called as TRL calls it, with the lists `completions`,
    `prompts` and one for each further column, and returns a number for each completion.

    A step takes `prompts` rows with `generations` completions each, in `accumulate` micro-batches; `max_steps` is one pass
    over the rows by default. On `test` rows the reward of the most likely completion is measured before and after. With
    `out`, a folder, records and checkpoints are kept there, and `resume` goes on from the last checkpoint.

        result = pf.grpo(model, tokenizer, [{"prompt": "2 + 2 =", "answer": "4"}, ...], "number", placement=placement)
        result.model.save_pretrained("adapter")

    Raises ConfigError for impossible settings and where TRL or PEFT is missing, DataError for a row that cannot be used,
    FileError for a folder that holds another training, ModelError for a model that PEFT cannot adapt, TrainingError for a loss
    or reward that is not finite, and Interrupted for a signal.
    """
    settings = GRPOSettings(
        generations=generations, prompts=prompts, completion_length=completion_length,
        temperature=drawn_at(temperature), beta=beta,
    )  # fmt: skip
    config = TrainConfig(
        max_steps=max_steps, lr=lr, schedule=schedule, warmup=warmup, weight_decay=weight_decay, clip=clip,
        accumulate=accumulate, checkpointing=checkpointing, seed=seed, save_every=save_every, keep=keep,
    )  # fmt: skip
    steps_of = libraries()
    judge = Judge(built_in(reward) if isinstance(reward, str) else reward)
    _check_model(model, placement)
    context = getattr(model.config, "max_position_embeddings", None)
    limit = context and context - completion_length
    train, held = (prompts_of(some, tokenizer, limit, judge.check) for some in (rows, test))
    _check_step(settings, config, len(train))
    _check_folder(out, resume)
    began = time.perf_counter()
    measured = partial(_measured, tokenizer, held, judge, completion_length, progress)
    with contextlib.ExitStack() as ends:
        ends.enter_context(modes_kept(model))
        ends.enter_context(_given_back(model))
        folder = Path(out) if out is not None else Path(ends.enter_context(TemporaryDirectory()))
        before = measured("before", model)
        steps = steps_of(
            model, tokenizer, placement, train, judge, settings, config, folder, kept=out is not None, progress=progress
        )
        run = ends.enter_context(steps)
        run.fit(resume=resume)
        after = measured("after", run.model)
        samples = [
            Sample(prompt.text, old.text, new.text, old.reward, new.reward)
            for prompt, old, new in zip(held[:SHOWN], before, after, strict=False)
        ]
        return GRPOResult(
            run.model, run.steps, [one.reward for one in before], [one.reward for one in after], samples, run.history, run.idle,
            time.perf_counter() - began, run.paths, run.notes,
        )  # fmt: skip


def _measured(
    tokenizer: Any, held: Sequence[Prompt], judge: Judge, length: int, progress: bool, who: str, model: Any
) -> list[Judged]:
    """The most likely completions of the test prompts, under a bar."""
    found = []
    with bar(who, len(held), "prompts", progress and bool(held)) as meter:
        for one in measure(model, tokenizer, held, judge, length):
            found.append(one)
            meter.update()
    return found


def _check_folder(out: str | Path | None, resume: bool) -> None:
    """Raises ConfigError for nothing to resume from, and FileError for checkpoints that a later `resume` would take for ours."""
    if out is None and resume:
        raise ConfigError("resume goes on with what a folder holds: give out, too")
    if out is not None and not resume and (last := last_checkpoint(Path(out) / GRPO_CHECKPOINTS)):
        raise FileError(f"{last}: of an earlier training; pass resume=True to go on with it, or another out")


@contextlib.contextmanager
def _given_back(model: Any) -> Iterator[None]:
    """Gives the model its `use_cache` back, which TRL switches off; after an error also `requires_grad`, gradients and tags, which
    PEFT and the Trainer change."""
    put_back, gradients = remember_requires_grad(model), [(p, p.grad) for p in model.parameters()]
    cached, tags = getattr(model.config, "use_cache", None), vars(model).get("model_tags")
    tags = tags and list(tags)
    try:
        yield
    except BaseException:
        put_back()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        vars(model).pop("model_tags", None)
        if tags is not None:
            model.model_tags = tags
        raise
    finally:
        if cached is not None:
            model.config.use_cache = cached


def libraries() -> Any:
    """What takes the steps. Raises ConfigError where TRL, PEFT or datasets is missing, or too old."""
    try:
        from .steps import Steps
    except ImportError as error:
        raise ConfigError(f"GRPO is done by TRL on adapters of PEFT ({error}): pip install 'plopfast[rl]'") from None
    return Steps


def _check_model(model: nn.Module, placement: Placement | None) -> None:
    """Raises ConfigError where it is not clear what is trained, and ModelError for weights that PEFT does not adapt."""
    wrapped = hasattr(model, "peft_config")
    if wrapped == (placement is not None):
        raise ConfigError(
            "GRPO trains the adapters that a PEFT model has: leave the placement out"
            if wrapped
            else "GRPO needs to know what is trained: give a placement (pf.place), or a PEFT model"
        )
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ConfigError(
            "the model has plopfast's own adapters, which TRL does not train: unload(model), and give the placement"
        )
    if codes := words_of_codes(model):
        raise ModelError(
            f"PEFT puts no adapters on plopfast's own codes, and this model holds {codes}: load dense weights"
        )


def _check_step(settings: GRPOSettings, config: TrainConfig, rows: int) -> None:
    """Raises ConfigError for a step that cannot be cut into micro-batches, or takes more prompts than there are."""
    completions = settings.prompts * settings.generations
    if completions % config.accumulate:
        raise ConfigError(
            f"accumulate {config.accumulate}: {settings.prompts} prompts with {settings.generations} completions each cannot be "
            f"cut into {config.accumulate} equal micro-batches: give a divisor of {completions}"
        )
    if rows < settings.prompts:
        raise ConfigError(f"prompts {settings.prompts}: there are only {rows} rows to take them from; lower --prompts")
