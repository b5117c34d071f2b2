"""The steps of GRPO: TRL's trainer, told what to do by our settings, and watched step by step.

Only this file imports TRL; grpo.py says what to install where it is missing.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import transformers
import trl
from torch import nn
from trl.trainer.utils import RepeatSampler

from ..data.tasks import Prompt
from ..lora.placement import Placement
from ..models.running import device_of
from ..support.config import TrainConfig
from ..support.errors import Interrupted, TrainingError
from ..support.grpo_settings import GRPOSettings, drawn_at
from ..support.progress import bar
from ..training.interrupt import Noted, interruptible
from ..training.records import Records
from .checkpoints import GRPO_CHECKPOINTS, finish, last_checkpoint, rotate, step_of
from .judging import Judge
from .peft import accelerate, restore

RECORDS = "rewards.jsonl"
SAVE_EVERY = 50  # steps between two checkpoints by default
ROW = "plopfast_row"  # the column by which the reward finds a row: others may hold what Arrow does not take
NAMES = {  # of a record -> TRL's
    "reward": "reward", "reward_std": "reward_std", "idle": "frac_reward_zero_std", "length": "completions/mean_length",
    "cut": "completions/clipped_ratio", "entropy": "entropy", "kl": "kl", "lr": "learning_rate", "grad_norm": "grad_norm",
}  # fmt: skip
SCHEDULES = {"constant": "constant_with_warmup"}


class Steps:
    """GRPO on a model, from its adapters' making to the last step.

    With `placement`, PEFT wraps the model in place; else it is a PEFT model already. `folder` gets checkpoints and records
    where `kept`. After `fit`, `model`, `steps`, `history`, `idle`, `paths` and `notes` are as `GRPOResult` says.
    """

    def __init__(
        self, model: Any, tokenizer: Any, placement: Placement | None, rows: Sequence[Prompt], judge: Judge,
        settings: GRPOSettings, config: TrainConfig, folder: Path, *, kept: bool, progress: bool,
    ) -> None:  # fmt: skip
        base = model if placement is not None else model.get_base_model()
        self._forward = vars(base).get("forward")  # the caller's own, if any: TRL puts another one before it
        self.total = config.max_steps or max(1, len(rows) // settings.prompts)
        self.rows, self.judge, self.config, self.progress = rows, judge, config, progress
        self.checkpoints, self.kept = folder / GRPO_CHECKPOINTS, kept
        self.records = Records(folder if kept else None, RECORDS)
        self.notes: list[str] = []
        with _quiet():
            self.trainer = _Trainer(
                model=model,
                reward_funcs=self._reward,
                args=_arguments(settings, config, self.checkpoints, self.total, model, kept),
                train_dataset=datasets.Dataset.from_dict(
                    {"prompt": [row.prompt for row in rows], ROW: range(len(rows))}
                ),
                processing_class=tokenizer,
                peft_config=None if placement is None else placement.lora_config(model),
            )
        for one in (transformers.PrinterCallback, transformers.ProgressCallback):
            self.trainer.remove_callback(one)
        self.model = cast(Any, self.trainer.model)
        self.paths: list[str] = []
        if placement is not None:  # of a PEFT model that was given, its owner decides
            self.paths = str(accelerate(self.model, loss=False)).splitlines()

    @property
    def steps(self) -> int:
        return int(self.trainer.state.global_step)

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.records.history

    @property
    def idle(self) -> float:
        """Share of the steps that taught nothing: the completions of each prompt were rewarded alike."""
        return sum(record["idle"] == 1 for record in self.history) / max(1, len(self.history))

    def _reward(self, completions: Sequence[Any], **given: Any) -> list[float | None]:
        rows = [self.rows[number] for number in given.pop(ROW)]
        given.pop("prompts")
        return self.judge(rows, completions, **given)

    def fit(self, *, resume: bool) -> None:
        """Takes the steps that are left. Raises Interrupted for a signal, after the state is saved, and TrainingError."""
        last = last_checkpoint(self.checkpoints) if resume else None
        self.records.begin(step_of(last) if last else 0)
        with interruptible() as noted, bar("grpo", self.total, "steps", self.progress) as meter, _quiet():
            if last:
                meter.update(step_of(last))
            self.trainer.add_callback(_Watch(self, noted, meter))
            try:
                self.trainer.train(resume_from_checkpoint=str(last) if last else None)
            except RuntimeError as error:
                if "probability tensor" not in str(error):  # torch.multinomial's words
                    raise
                raise TrainingError(
                    f"step {self.steps + 1}: the model's probabilities are not finite: lower --lr, or --dtype float32"
                ) from error
        if noted.number:
            where = f"; the state is in {self.checkpoints}" if self.kept else ""
            raise Interrupted(f"stopped after step {self.steps} of {self.total}{where}", noted.number)
        if self.idle > 0.5:
            self.notes.append(
                f"{self.idle:.0%} of the steps taught nothing: all completions of a prompt were rewarded alike; try easier or "
                "harder prompts, more --generations, or a reward with degrees"
            )

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Takes TRL's own forward pass, and plopfast's operations, off the model again; after an error the adapters, too."""
        base = self.model.get_base_model()
        vars(base).pop("forward", None)
        if self._forward is not None:
            base.forward = self._forward
        if self.paths:
            restore(self.model)
            if kind:
                self.model.unload()

    def note(self, logs: dict[str, Any]) -> str:
        """Keeps a record of a step; returns it in words. Raises TrainingError where the step was not finite."""
        record: dict[str, Any] = {"step": self.steps}
        record |= {name: _number(logs[key]) for name, key in NAMES.items() if logs.get(key) is not None}
        record.setdefault("reward", None)
        self.records.add(record)
        for name in ("loss", "grad_norm"):
            value = logs.get(name)
            if value is not None and not math.isfinite(float(value)):
                raise TrainingError(
                    f"step {self.steps}: the {name.replace('_', ' ')} is {value}: lower --lr, or --beta; the last checkpoint is whole"
                )
        words = [
            f"{name} {record[name]:.3g}"
            for name in ("reward", "length", "entropy", "kl")
            if record.get(name) is not None
        ]
        return ", ".join(words)


class _Order(RepeatSampler):
    """TRL's order of the prompts, but of the seed and the epoch alone: resumed, TRL's own begins with the first epoch's."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed((self.seed or 0) + epoch)


class _Trainer(trl.GRPOTrainer):
    """TRL's trainer, which tells nobody that it is used, and writes no page about it."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        order = super()._get_train_sampler(dataset)
        order.__class__ = _Order
        return order

    def _send_telemetry(self) -> None: ...

    def create_model_card(self, *_: Any, **__: Any) -> None: ...


class _Watch(transformers.TrainerCallback):
    """After each step: the record, the bar, and whether a signal has come."""

    def __init__(self, steps: Steps, noted: Noted, meter: Any) -> None:
        self.steps, self.noted, self.meter = steps, noted, meter

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            self.meter.set_postfix_str(self.steps.note(logs))
            self.meter.update()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.noted.number:
            control.should_training_stop = True
            control.should_save = self.steps.kept

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        finish(Path(args.output_dir), state.global_step)
        rotate(Path(args.output_dir), self.steps.config.keep)  # Hugging Face's own rotation deletes whole folders


def _number(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _arguments(
    settings: GRPOSettings, config: TrainConfig, folder: Path, total: int, model: nn.Module, kept: bool
) -> trl.GRPOConfig:
    device, dtype = device_of(model), next(model.parameters()).dtype
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.prompts * settings.generations // config.accumulate,
        gradient_accumulation_steps=config.accumulate,
        num_generations=settings.generations,
        max_completion_length=settings.completion_length,
        temperature=drawn_at(settings.temperature),
        beta=settings.beta,
        max_steps=total,
        learning_rate=config.lr,
        lr_scheduler_type=SCHEDULES.get(config.schedule, config.schedule),
        warmup_steps=math.ceil(config.warmup * total),
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        gradient_checkpointing=config.checkpointing,
        seed=config.seed,
        save_strategy="steps" if kept else "no",
        save_steps=config.save_every or SAVE_EVERY,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one device, and no nn.DataParallel over all that are visible
    return arguments


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines and bars of transformers and datasets, as ours say the same, and its warnings about TRL's code."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
