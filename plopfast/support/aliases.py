"""What other tools call plopfast's settings: PEFT, Hugging Face's Trainer, TRL, Unsloth, Axolotl and LLaMA-Factory.

A name stands here only where it means the same there, so that options and files of settings from elsewhere work as they
are. Names with another meaning are in foreign.py, which says what to use instead.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .errors import ConfigError, nearest, shown

LEAVE = object()  # what a name says that changes nothing, such as load_in_8bit: false
BATCH = "is --batch-rows: so many rows in a micro-batch at most, as --batch-tokens (default: 1024, or the longest row) bounds it, too"


class Alias(NamedTuple):
    """`read` returns what a value means here (None: it means the same), or LEAVE. Raises ConfigError for what has no such
    meaning. `takes` says how the option is given: one value, a switch, or several names."""

    setting: str  # or "out", the run folder, which only the command line names
    read: Callable[[Any], Any] | None = None
    takes: str = "value"
    note: str = ""


def switch(value: Any) -> bool:
    """Whether a switch of another tool is on. Raises ConfigError for what is neither true nor false."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ConfigError(f"expected true or false, got {shown(value)}")
    return value


def _where_on(meaning: str) -> Callable[[Any], Any]:
    return lambda value: meaning if switch(value) else LEAVE


def _words(meanings: Mapping[str, str], refused: Mapping[str, str]) -> Callable[[Any], str]:
    """Reads one of several words; `refused` says what to use instead of words that mean something else here."""

    def read(value: Any) -> str:
        if isinstance(value, str) and value in meanings:
            return meanings[value]
        if isinstance(value, str) and value in refused:
            raise ConfigError(f"{shown(value)} {refused[value]}")
        meant = nearest(value, [*meanings]) if isinstance(value, str) else ""
        raise ConfigError(f"expected one of {', '.join(meanings)}, got {shown(value)}{meant}")

    return read


NAMES_OF_RULES = (
    "plop",
    "plop-inverse",
    "attn",
    "mlp",
    "input-spectrum",
    "condition-number",
    "gradient-energy",
    "no-qk",
    "nfn-median",
    "nfn-no-outliers",
    "nfn-per-size",
    "weight-nfn",
    "weight-size",
    "random",
)
PATTERN = set("*|()[]{}^$+?\\")


def _modules(value: Any) -> str:
    """Names of modules or of their types, as a list or with commas; "all-linear" is the rule all."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"expected names of modules, or all-linear, got {shown(value)}")
    names = [name.strip() for item in items for name in item.split(",") if name.strip()]
    if names in (["all-linear"], ["all"]):
        return "all"
    for name in names:
        if PATTERN & {*name}:
            raise ConfigError(f"{shown(name)} is a pattern: expected names of modules such as q_proj,v_proj")
        if name in (*NAMES_OF_RULES, "all", "all-linear"):
            rule = "all" if name.startswith("all") else name
            raise ConfigError(
                f"{shown(name)} is no name of a module here: give --rule {rule}, or names such as q_proj,v_proj"
            )
    return ",".join(names)


def _targets(value: Any) -> str:
    """Where a training is logged to: one name or a list."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"expected none, tensorboard or wandb, got {shown(value)}")
    return ",".join(names)


_SCHEDULES = _words(
    {"linear": "linear", "cosine": "cosine", "constant_with_warmup": "constant"},
    {"constant": "has no warmup there: give --schedule constant --warmup 0"},
)
_OPTIMIZERS = _words(
    dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw")
    | dict.fromkeys(("adamw8bit", "adamw_8bit", "adamw_bnb_8bit"), "adamw8bit"),
    {},
)
SAME = {  # setting -> what others call it
    "model": "model_name_or_path base_model pretrained_model_name_or_path model_name model_id",
    "train": "train_file", "valid": "validation_file", "test": "test_file",
    "max_length": "max_seq_length max_seq_len sequence_len cutoff_len",
    "rank": "lora_r lora_rank r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "rslora": "use_rslora peft_use_rslora", "dora": "use_dora peft_use_dora", "lora_plus": "loraplus_lr_ratio",
    "lr": "learning_rate", "epochs": "num_train_epochs num_epochs", "accumulate": "gradient_accumulation_steps",
    "warmup": "warmup_ratio", "clip": "max_grad_norm", "neftune": "neftune_noise_alpha",
    "checkpointing": "gradient_checkpointing", "packing": "sample_packing", "liger": "use_liger_kernel enable_liger_kernel",
    "compile": "torch_compile", "full": "full_finetuning", "eval_every": "eval_steps", "save_every": "save_steps",
    "keep": "save_total_limit", "patience": "early_stopping_patience", "generations": "num_generations",
    "completion_length": "max_completion_length", "out": "output_dir output",
}  # fmt: skip
ALIASES: dict[str, Alias] = {
    **{name: Alias(setting) for setting, names in SAME.items() for name in names.split()},
    **{name: Alias("batch_rows", note=BATCH) for name in ("batch_size", "per_device_train_batch_size", "micro_batch_size")},
    **{name: Alias("rule", _modules, "names") for name in ("target_modules", "lora_target_modules", "lora_target")},
    "lora_target_linear": Alias("rule", _where_on("all"), "switch"),
    "load_in_4bit": Alias("quantize", _where_on("nf4"), "switch"),
    "load_in_8bit": Alias("quantize", _where_on("int8"), "switch"),
    "lr_scheduler_type": Alias("schedule", _SCHEDULES), "lr_scheduler": Alias("schedule", _SCHEDULES),
    "optim": Alias("optimizer", _OPTIMIZERS), "report_to": Alias("log_to", _targets, "names"),
}  # fmt: skip


def note_of(name: str) -> str:
    """What has to be said where this name of a setting is used; mostly nothing."""
    alias = ALIASES.get(name.strip("-").replace("-", "_"))
    return f"{name} {alias.note}" if alias and alias.note else ""
