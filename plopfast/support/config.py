"""Settings as values: defaults, checks, and where each one comes from. The command line is built from these fields."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from . import files
from .errors import ConfigError


def _option(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    *,
    positive: bool = False,
    below: float = math.inf,
    free: bool = False,
) -> Any:
    """A setting; numbers are at least 0 (above 0 if `positive`) and `below` a bound. A `free` one may change when a run
    is resumed, as what is learned does not depend on it (bits may)."""
    rules = {"help": help, "choices": choices, "positive": positive, "below": below, "free": free}
    return dataclasses.field(default=default, metadata=rules)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How adapters, or whatever requires a gradient, are trained. Raises ConfigError for impossible values."""

    lr: float = _option(1e-3, "peak learning rate of AdamW", positive=True)
    schedule: str = _option("cosine", "learning rate after the warmup", ("cosine", "linear", "constant"))
    warmup: float = _option(0.1, "share of the steps over which the learning rate rises", below=1)
    lora_plus: float = _option(1.0, "learning rate of lora_B over lora_A's (LoRA+ proposes 16)", positive=True)
    weight_decay: float = _option(0.0, "AdamW's weight decay on the adapters")
    clip: float = _option(1.0, "largest gradient norm; 0 for no clipping")
    ema: float = _option(
        0.0, "decay of a moving average of the adapters, which is validated and kept; 0 for none", below=1
    )
    neftune: float = _option(0.0, "NEFTune's alpha: uniform noise on the embeddings; 0 for none")
    batch_tokens: int | None = _option(
        None, "padded tokens in a micro-batch (default: 1024 or the longest row; 160 on the demo data)", positive=True
    )
    packing: bool = _option(False, "micro-batches are one row of whole examples that cannot see each other")
    accumulate: int = _option(1, "micro-batches in a step, weighted by their label tokens", positive=True)
    max_steps: int | None = _option(None, "training steps (default: one epoch; 60 on the demo data)", positive=True)
    eval_every: int = _option(30, "steps between two looks at the validation loss", positive=True)
    eval_rows: int = _option(128, "validation rows looked at each time (the first ones)", positive=True)
    patience: int = _option(3, "looks without a better validation loss before training stops", positive=True)
    dropout: float = _option(0.0, "LoRA dropout", below=1)
    unlabeled_share: float = _option(
        0.0,
        "share of the micro-batches that hold --unlabeled text; 0: one pass over it before the labelled rows",
        below=1,
    )
    nonfinite: str = _option("stop", "what a loss or gradient that is not finite does", ("stop", "skip"))
    save_every: int | None = _option(
        None, "steps between two checkpoints (default: eval_every)", positive=True, free=True
    )
    keep: int = _option(2, "newest checkpoints kept while training", positive=True, free=True)
    checkpointing: bool = _option(False, "compute activations again in the backward pass, block by block", free=True)
    offload: bool = _option(False, "keep activations in CPU memory until the backward pass (GPU)", free=True)
    compile: bool = _option(False, "torch.compile each block: slow to start, then faster elementwise work")
    liger: bool = _option(True, "liger-kernel's norm, SwiGLU and RoPE on a GPU where it is installed")
    log_to: str = _option("none", "tensorboard, wandb or both with a comma, beside metrics.jsonl", free=True)
    seed: int = _option(0, "seed of sampling, initialisation, batch order and dropout", below=2**63)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, rules = getattr(self, item.name), item.metadata
            if rules["choices"] and value is not None and value not in rules["choices"]:
                raise ConfigError(f"{item.name}: expected one of {', '.join(rules['choices'])}, got {value!r}")
            if isinstance(value, int | float):
                low, below = "above" if rules["positive"] else "of at least", rules["below"]
                if not (value > 0 or (value == 0 and not rules["positive"])) or not value < below:
                    raise ConfigError(f"{item.name}: expected a number {low} 0 and below {below}, got {value}")
        if self.packing and self.neftune:
            raise ConfigError(
                "packing and neftune: the noise is scaled to a row's length, which a packed one has not; leave one out"
            )


FREE = {"device", "threads", "timeout", "search_trials"} | {
    item.name for item in dataclasses.fields(TrainConfig) if item.metadata["free"]
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """Everything a run depends on; resolved values are kept in the run folder's config.json."""

    model: str | None = _option(None, "hub id, local folder or .gguf file (default: SmolLM2-135M-Instruct)")
    train: str | None = _option(None, "training rows, JSONL (default: the WordNet demo)")
    valid: str | None = _option(None, "validation rows, JSONL (default with --train: every 20th training row)")
    test: str | None = _option(None, "held-out rows, JSONL (default with --train: the validation rows)")
    unlabeled: str | None = _option(
        None, "plain text of the domain, UTF-8 .txt, learned before the rows (see --unlabeled-share)"
    )
    max_length: int | None = _option(None, "longest row in tokens (default: the model's context)", positive=True)
    dtype: str = _option(
        "auto",
        "of the frozen weights and the activations (auto: bfloat16 on a GPU that has it, else float32); adapters stay float32",
        ("auto", "float32", "bfloat16", "float16"),
    )
    device: str = _option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, mps")
    backend: str = _option(
        "auto",
        "auto (Triton where it runs, else torch), or one path for every module",
        ("auto", "torch", "triton", "fused", "lora-first"),
    )
    parallel: str = _option(
        "ddp", "under torchrun: the whole model on each rank, or its frozen blocks spread over them", ("ddp", "fsdp")
    )
    timeout: int = _option(1800, "seconds that a rank waits for the others before it gives up", positive=True)
    threads: int | None = _option(None, "CPU threads (default: torch's choice)", positive=True)
    score_prompts: int = _option(200, "training rows that are scored at most", positive=True)
    confidence: float = _option(
        0.95, "scoring ends once the k lowest types are this sure; also of the intervals; 0: score every row", below=1
    )
    score_tokens: str = _option(
        "all",
        "tokens that are scored; roles need messages",
        ("all", "prompt", "completion", "system", "user", "assistant", "tool"),
    )
    skip_first: bool = _option(False, "leave out each row's first token, where attention sinks")
    baseline: str = _option("closed-form", "NFN denominator", ("closed-form", "monte-carlo"))
    compat: str | None = _option(None, "'official' scores exactly as the PLoP authors' code", ("official",))
    # {words} in help texts are filled in by the command line, from placing/rules.py
    rule: str = _option("plop", "{rules}, or module types and names with commas")
    k: int = _option(3, "module types that {rules_with_k} choose", positive=True)
    rank: int = _option(16, "LoRA rank", positive=True)
    budget: str | None = _option(
        None, "instead of --rank: parameters (2.5M), bytes of float32 (10MB, 8MiB) or match:RULE:rRANK; empty: none"
    )
    ranks: str = _option(
        "equal", "how a budget is shared out: equal ranks, or proportional to 1 / NFN", ("equal", "proportional")
    )
    granularity: str = _option(
        "type", "choose whole module types, or (experimental; needs --budget) single modules", ("type", "module")
    )
    cap: int | None = _option(None, "with --granularity module: most modules of one type; 0: any number")
    alpha: float = _option(32.0, "LoRA alpha; the scaling is alpha / rank", positive=True)
    rslora: bool = _option(False, "scale by alpha / sqrt(rank) instead")
    init: str = _option(
        "kaiming",
        "A at first; eva: the inputs' leading singular vectors, taken while scoring",
        ("kaiming", "gaussian", "orthogonal", "eva"),
    )
    arms: str = _option("plop,plop-inverse,attn,mlp,all", "placements that a trial compares, some of {arms}")
    lrs: str = _option("5e-4,1e-3,2e-3", "learning rates that each arm of a trial tries")
    seeds: str = _option("0,1,2", "seeds of each arm of a trial, three at least")
    general: str | None = _option(
        None, "plain text far from the task, UTF-8 .txt: its loss shows forgetting (default: Python's own help texts)"
    )
    search_trials: int = _option(20, "combinations that a search tries", positive=True)
    full: bool = _option(
        False, "train all weights instead of adapters, the baseline one compares with (with a lower --lr, such as 2e-5)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full and self.parallel == "fsdp":
            raise ConfigError("--parallel fsdp spreads frozen weights, --full trains them: leave one of them out")
        if self.full:
            plain = {"lora_plus": 1.0, "dropout": 0.0, "rslora": False, "init": "kaiming"}
            given = [f"--{name.replace('_', '-')}" for name, value in plain.items() if getattr(self, name) != value]
            if given:
                raise ConfigError(
                    f"--full trains no adapters, so {', '.join(given)} cannot apply: leave one of them out"
                )
        for name, usual in ("granularity", "type"), ("ranks", "equal"):
            if (value := getattr(self, name)) != usual and not self.budget:
                raise ConfigError(f"{name} {value!r} needs a budget: give --budget, or --{name} {usual}")
        if self.cap and self.granularity == "type":
            raise ConfigError(
                f"cap {self.cap}: limits the modules of a type, which needs --granularity module; 0 for none"
            )
        if self.unlabeled_share and not self.unlabeled:
            raise ConfigError("unlabeled_share needs --unlabeled FILE.txt")


def load_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a JSON file, checked by name and type; a run folder's config.json works too."""
    value = files.read_json(Path(path), "you, or by plopfast run as config.json")
    settings = value.get("settings", value) if isinstance(value, dict) else None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a JSON object of settings, got {type(value).__name__}")
    types = get_type_hints(RunConfig)
    for name, setting in settings.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            raise ConfigError(f"{path}: unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        wanted = types[name] | int if types[name] is float else types[name]
        if not isinstance(setting, wanted) or (isinstance(setting, bool) and types[name] is not bool):
            raise ConfigError(f"{path}: {name}: expected {_type_name(types[name])}, got {setting!r}")
    return settings


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
