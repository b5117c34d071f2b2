"""The stage of reinforcement learning: prompts and a reward to adapter/, grpo.json and rewards.jsonl.

Scoring and placing come first where the folder has no placement. They read the prompts alone.
"""

import json
from pathlib import Path
from statistics import fmean

from ..data.describe import left_out
from ..data.example import Example
from ..data.rows import drawn
from ..data.tasks import Prompt, prompts_of, read_prompts
from ..integrations.grpo import GRPOResult, grpo, libraries
from ..integrations.judging import Judge
from ..integrations.rewards import FORMS, Reward, built_in
from ..lora.placement import Placement
from ..placing.by_settings import check_rule
from ..support import files, machine
from ..support.devices import device_for
from ..support.errors import ConfigError, DataError
from ..support.grpo_settings import drawn_at, names_code
from .adapter_folder import add_to
from .folder import CARD, GRPO_CHECKPOINTS
from .model_card import short
from .run import Run
from .splits import HOLD_OUT, held_out, sources_of
from .stages import run_place, run_score


def run_grpo(run: Run, function: Reward | None = None) -> GRPOResult:
    """Trains adapters by GRPO: adapter/, grpo.json and rewards.jsonl.

    `function` is the reward that the settings name, where that is code: who calls this has to load it, as settings that come
    from a file must not make code run. Raises what `grpo` raises.
    """
    config = run.config
    run.ready("grpo")
    judge, temperature = Judge(_reward(run, function)), drawn_at(config.temperature)
    libraries()
    device = device_for(config.device)
    if machine.launch().size > 1 or device.index:
        raise ConfigError(
            "plopfast grpo trains on one device, the first: choose another one by CUDA_VISIBLE_DEVICES, without torchrun"
        )
    train, test = _prompts(run, judge)
    if not run.file("place").exists():
        check_rule(config.placing, run.shapes)
        if not run.file("score").exists():
            run_score(run, _to_score(run, train))
        run_place(run)
    placement = Placement.load(run.file("place"))
    code = [Path(config.reward.rpartition(":")[0])] if function and config.reward else []
    with run.stage("grpo", inputs=[path for path in code if path.is_file()]):
        run.say(f"{len(train):,} prompts, reward {judge.name}, {config.generations} completions of each; {placement}")
        result = grpo(
            run.model, run.tokenizer, train, judge.reward, placement=placement, test=test, generations=config.generations,
            prompts=config.prompts, completion_length=config.completion_length, temperature=temperature,
            beta=config.beta, max_steps=config.max_steps, lr=config.lr, schedule=config.schedule, warmup=config.warmup,
            weight_decay=config.weight_decay, clip=config.clip, accumulate=config.accumulate,
            checkpointing=config.checkpointing, seed=config.seed, save_every=config.save_every, keep=config.keep,
            out=run.folder, resume=run.resume, progress=run.progress,
        )  # fmt: skip
        with run.at.ledger.replacing(run.file("grpo").name) as scratch:
            result.model.save_pretrained(scratch)
            (scratch / CARD).unlink(missing_ok=True)  # PEFT's, about an adapter that nobody has described
            counts = {"train": len(train), "test": len(test)}
            add_to(run, scratch, _settings_of(run, result), counts, _results_of(judge.name, result))
        value = {"plopfast": "grpo", "reward": config.reward, **result.facts()}
        files.write_json(run.folder / "grpo.json", value)
    run.at.ledger.clear(GRPO_CHECKPOINTS)
    for line in (*result.paths, *result.notes):
        run.say(line)
    return result


def in_words(result: GRPOResult) -> str:
    """How a training ended, in a line."""
    means = f"{fmean(result.before):.3f} before, {fmean(result.after):.3f} after" if result.before else "not measured"
    return f"{result.steps} steps; reward of {len(result.before)} test prompts: {means}"


def _settings_of(run: Run, result: GRPOResult) -> list[tuple[str, object]]:
    """What the adapter's card says of a training."""
    config = run.config
    return [
        ("method", "GRPO, reinforcement learning"),
        ("steps", result.steps),
        ("learning rate", f"{config.lr:g}"),
        ("completions of a prompt", config.generations),
        ("seed", config.seed),
    ]


def _results_of(reward: str, result: GRPOResult) -> str:
    means = in_words(result).partition("; ")[2]
    return f"Reward: `{short(reward)}`. The {means}."


def _reward(run: Run, function: Reward | None) -> Reward:
    name = run.config.reward
    if name is None:
        raise ConfigError(f"plopfast grpo needs --reward: {FORMS}")
    if not names_code(name):
        return built_in(name)
    if function is None:
        raise ConfigError(
            f"reward {name!r} is code, and a settings file alone must not make code run: give it on the command line, too, as "
            f"--reward {name}"
        )
    return function


def _prompts(run: Run, judge: Judge) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and those to measure on: the test rows, else every 20th training row.

    Raises DataError for a row that cannot be used (unless bad rows are skipped), where nothing is left, and where a test prompt is trained on unless that is
    allowed.
    """
    config, sources = run.config, sources_of(run.config)
    if "train" not in sources:
        raise ConfigError("plopfast grpo needs prompts: give --train FILE")
    longest = run.context and run.context - config.completion_length
    found: dict[str, list[Prompt]] = {}
    for split in ("train", "test"):
        if split in sources:
            rows = read_prompts(sources[split], config.bad_rows, split)
            run.at.reads += [path for path in map(Path, sources[split]) if path.is_file()]
            skipped: list[str] | None = [] if config.bad_rows == "skip" else None
            found[split] = prompts_of(rows, run.tokenizer, longest, judge.check, skipped)
            for line in left_out(skipped, len(rows)):
                run.say(f"{split}: {line}")
            if not found[split]:
                raise DataError(f"{split}: no row can be used; {'; '.join((skipped or [])[:3])}")
    train, test = found["train"], found.get("test", [])
    if not test and len(train) >= HOLD_OUT:
        train, test = held_out(train)
        run.say(f"{len(test)} of the training rows, every {HOLD_OUT}th, are held out: the reward is measured on them")
    _refuse_overlap(run, train, test)
    return train, test[: config.eval_rows]


def _refuse_overlap(run: Run, train: list[Prompt], test: list[Prompt]) -> None:
    seen = {json.dumps(prompt.prompt): prompt.where for prompt in train}
    both = [prompt for prompt in test if json.dumps(prompt.prompt) in seen]
    if not both:
        return
    said = f"{len(both)} of {len(test)} test prompts are trained on, such as that of {both[0].where}, which is {seen[json.dumps(both[0].prompt)]} too"
    if not run.config.allow_overlap:
        raise DataError(
            f"{said}: a reward on them would not show what the model does on new ones; take them out, or pass --allow-overlap"
        )
    run.say(said)


def _to_score(run: Run, prompts: list[Prompt]) -> list[Example]:
    config = run.config
    some = drawn(prompts, config.score_prompts, config.seed)
    return [Example.after_prompt(prompt.tokens, len(prompt.tokens), where=prompt.where) for prompt in some]
