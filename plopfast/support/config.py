"""Settings: groups of options, and `RunConfig`, which holds all of them. The command line is built from these fields.

A function takes the group that it reads: the trainer takes a `TrainConfig`, placing a `PlaceSettings`. Options that
several groups share (`Seed`, `Backend`, `Init`, `Choice`) are declared once and inherited.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from .errors import ConfigError
from .eval_settings import EvalSettings
from .fit_settings import FitSettings, ShapeSettings
from .generate_settings import GenerateSettings
from .grpo_settings import GRPOSettings
from .memory_settings import MemorySettings
from .model_settings import Backend, ModelSettings, RankSettings, Seed
from .options import Settings, option

Group = TypeVar("Group", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """The rows."""

    title = "data"
    train: str | tuple[str, ...] | None = option(
        None,
        "training rows, one or several: .jsonl, .json, .csv, .tsv or .parquet files, a folder, or a data set of the hub, "
        "owner/name:split (default: the WordNet demo)",
        file=True,
    )
    valid: str | tuple[str, ...] | None = option(
        None, "validation rows (default with --train: every 20th training row)", file=True
    )
    test: str | tuple[str, ...] | None = option(
        None, "test rows (default with --train: the validation rows)", file=True
    )
    unlabeled: str | None = option(
        None, "plain text of the domain, UTF-8 .txt, learned before the rows (see --unlabeled-share)", file=True
    )
    columns: str | None = option(None, "names of columns, such as prompt=question,completion=answer")
    bad_rows: str = option("error", "stop at rows that cannot be read, or skip and count them", ("error", "skip"))
    allow_overlap: bool = option(False, "go on where test rows, or their prompts, are training rows too", free=True)
    learn: str = option(
        "assistant",
        "what is learned of messages: every turn of the assistant, the last one, or all tokens of the row",
        ("assistant", "last", "all"),
    )
    max_length: int | None = option(None, "longest row in tokens (default: the model's context)", positive=True)
    long: str = option(
        "error",
        "what becomes of longer rows: stop, skip them, or cut the left of their prompt",
        ("error", "skip", "cut"),
    )


@dataclass(frozen=True, kw_only=True)
class Init(Settings):
    title = "adapters"
    init: str = option(
        "kaiming",
        "how A begins; eva takes the leading singular vectors of the inputs, which scoring collects",
        ("kaiming", "gaussian", "orthogonal", "eva"),
    )


@dataclass(frozen=True, kw_only=True)
class Choice(Init, Seed):
    """What is to be chosen. Scoring needs it too: it stops when the choice is sure, and keeps EVA's vectors for it."""

    title = "placement"
    rule: str = option("plop", "{rules}, or module types and names with commas")
    k: int = option(3, "number of module types that {rules_with_k} choose", positive=True)
    rank: int = option(16, "LoRA rank", positive=True)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(Choice, Backend):
    """What is scored, and how."""

    title = "scoring"
    score_prompts: int = option(200, "score at most this many training rows", positive=True)
    confidence: float = option(
        0.95, "stop scoring once the k lowest types are this sure (0: score every row); also that of intervals", below=1
    )
    score_tokens: str = option(
        "all",
        "score only these tokens; roles need rows of messages",
        ("all", "prompt", "completion", "system", "user", "assistant", "tool"),
    )
    skip_first: bool = option(False, "leave out the first token of each row, where attention sinks")
    baseline: str = option("closed-form", "how the denominator of NFN is computed", ("closed-form", "monte-carlo"))
    compat: str | None = option(None, "official: score exactly as the code of PLoP's authors does", ("official",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat and (self.score_tokens != "all" or self.skip_first):
            raise ConfigError(
                "--compat official scores every token: leave out --score-tokens and --skip-first, or --compat"
            )


@dataclass(frozen=True, kw_only=True)
class PlaceSettings(Choice):
    """Which modules get adapters, and how large these are."""

    alpha: float = option(32.0, "LoRA alpha; the update is scaled by alpha / rank", positive=True)
    budget: str | None = option(
        None,
        "size of all adapters, instead of --rank: parameters (2.5M), bytes of float32 (10MB, 8MiB) or match:RULE:rRANK; "
        "empty: none",
        empty=True,
    )
    ranks: str = option(
        "equal", "share a budget out as equal ranks, or as ranks proportional to 1 / NFN", ("equal", "proportional")
    )
    granularity: str = option(
        "type", "choose whole module types, or (experimental, needs --budget) single modules", ("type", "module")
    )
    cap: int | None = option(None, "with --granularity module: most modules of one type; 0: any number")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, usual in ("granularity", "type"), ("ranks", "equal"):
            if (value := getattr(self, name)) != usual and not self.budget:
                raise ConfigError(f"{name} {value!r} needs a budget: give --budget, or --{name} {usual}")
        if self.cap and self.granularity == "type":
            raise ConfigError(
                f"cap {self.cap}: limits the modules of a type, which needs --granularity module; 0 for none"
            )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Init, Seed, Backend):
    """What is trained: adapters of some kind, or all weights."""

    rslora: bool = option(False, "scale the update by alpha / sqrt(rank) instead of alpha / rank")
    full: bool = option(
        False, "train all weights instead of adapters, to compare with (use a lower --lr, such as 2e-5)"
    )


@dataclass(frozen=True, kw_only=True)
class StepSettings(MemorySettings):
    """What the memory and time of a training step depend on."""

    title = "training"
    batch_tokens: int | None = option(
        None, "padded tokens in a micro-batch (default: 1024 or the longest row; 160 on the demo data)", positive=True
    )
    batch_rows: int | None = option(
        None, "rows in a micro-batch, at most (default: as many as --batch-tokens takes; fewer on little data)",
        positive=True,
    )  # fmt: skip
    accumulate: int = option(1, "micro-batches in a step, weighted by their label tokens", positive=True)
    packing: bool = option(False, "fill each micro-batch with one row of whole examples that cannot see each other")
    dropout: float = option(0.0, "LoRA dropout", below=1)
    dora: bool = option(False, "train the length of each row of the adapted weights, too (DoRA)")
    ema: float = option(
        0.0, "keep and validate a moving average of the adapters with this decay; 0: keep the adapters", below=1
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepSettings, Seed):
    """How adapters, or whatever requires a gradient, are trained. Raises ConfigError for impossible values.

    >>> config = pf.TrainConfig(lr=2e-4, max_steps=100)
    """

    lr: float = option(1e-3, "peak learning rate of AdamW", positive=True, below=1e38)
    schedule: str = option("cosine", "course of the learning rate after the warmup", ("cosine", "linear", "constant"))
    warmup: float = option(0.1, "share of the steps over which the learning rate rises", below=1)
    lora_plus: float = option(1.0, "learning rate of B over that of A (LoRA+ proposes 16)", positive=True)
    weight_decay: float = option(0.0, "AdamW's weight decay on the adapters")
    clip: float = option(1.0, "clip gradients to this norm; 0: no clipping")
    neftune: float = option(0.0, "add NEFTune's uniform noise to the embeddings, with this alpha; 0: none")
    max_steps: int | None = option(
        None, "training steps, instead of --epochs (default: as --epochs; 60 on the demo data)", positive=True
    )
    epochs: float | None = option(
        None,
        "passes over the training rows, such as 3 or 0.5 (default: 1; on little data as many as make about 60 steps, at "
        "most 10)",
        positive=True,
    )
    eval_every: int | None = option(
        None,
        "steps between two looks at the validation loss (default: 30, or an epoch where that is shorter and --max-steps is "
        "not given)",
        positive=True,
    )
    eval_rows: int = option(128, "validation rows in a look (the first ones)", positive=True)
    patience: int = option(3, "stop after this many looks without a lower validation loss", positive=True)
    unlabeled_share: float = option(
        0.0,
        "share of the micro-batches that hold --unlabeled text; 0: one pass over it before the labelled rows",
        below=1,
    )
    nonfinite: str = option("stop", "stop at, or skip, a step whose loss or gradient is not finite", ("stop", "skip"))
    save_every: int | None = option(
        None, "steps between two checkpoints (default: as --eval-every)", positive=True, free=True
    )
    keep: int = option(2, "newest checkpoints to keep while training", positive=True, free=True)
    compile: bool = option(False, "compile each block with torch.compile: slow to start, then faster")
    liger: bool = option(False, "use liger-kernel's norm, SwiGLU and RoPE in place of plopfast's (GPU)")
    log_to: str = option("none", "log to tensorboard, wandb or both (with a comma), beside metrics.jsonl", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps and self.epochs:
            raise ConfigError(
                f"max_steps {self.max_steps} and epochs {self.epochs:g} both say how long to train: leave one of them out"
            )
        if self.mlp_rows and self.compile:
            raise ConfigError(
                "mlp_rows and compile exclude each other: torch.compile cannot trace a product that is computed again in the "
                "backward pass; leave one out"
            )
        if self.packing and self.neftune:
            raise ConfigError(
                "packing and neftune exclude each other: the noise is scaled to the length of a row, and packed rows have "
                "no single length; leave one out"
            )


@dataclass(frozen=True, kw_only=True)
class TrialSettings(Settings):
    """What a trial compares."""

    title = "trial"
    arms: str = option("plop,plop-inverse,attn,mlp,all", "placements to compare: {arms}")
    lrs: str = option(
        "5e-4,1e-3,2e-3",
        "learning rates that each arm tries; of several, more follow while the best is at the edge, and two seeds choose",
    )
    seeds: str = option("0,1,2", "seeds of each arm, three at least")
    finalists: int | None = option(
        None,
        "arms that get every seed; before each further seed, the worse half of the others is dropped",
        positive=True,
    )


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Settings):
    """How long a search goes on."""

    title = "search"
    search_trials: int = option(20, "combinations to try", positive=True, free=True)


@dataclass(frozen=True, kw_only=True)
class RunConfig(
    ModelSettings,
    DataSettings,
    ScoreSettings,
    PlaceSettings,
    AdapterSettings,
    TrainConfig,
    EvalSettings,
    TrialSettings,
    SearchSettings,
    ShapeSettings,
    FitSettings,
    GRPOSettings,
    GenerateSettings,
    RankSettings,
):
    """Every setting of a run, flat, as options and config.json name them; the properties are its groups.

    >>> config = pf.RunConfig(train="rows.jsonl", rank=8)
    >>> config.placing.rank
    8

    Raises ConfigError for impossible values, and for settings that contradict each other.
    """

    @property
    def scoring(self) -> ScoreSettings:
        return self._part(ScoreSettings)

    @property
    def placing(self) -> PlaceSettings:
        return self._part(PlaceSettings)

    @property
    def training(self) -> TrainConfig:
        return self._part(TrainConfig)

    def _part(self, group: type[Group]) -> Group:
        return group(**{item.name: getattr(self, item.name) for item in dataclasses.fields(group)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full and self.parallel == "fsdp":
            raise ConfigError("--parallel fsdp spreads frozen weights, --full trains them: leave one of them out")
        if self.quantize and self.parallel == "fsdp":
            raise ConfigError("--parallel fsdp spreads dense weights, --quantize keeps codes: leave one of them out")
        if self.fit and self.parallel == "fsdp":
            raise ConfigError("--fit counts what one device holds, --parallel fsdp spreads it: leave one of them out")
        if self.mlp_rows and self.parallel == "fsdp":
            raise ConfigError(
                "--mlp-rows computes MLPs again when --parallel fsdp may have given their weights back: leave one of them out"
            )
        if self.embedding == "cpu" and (self.full or self.parallel == "fsdp"):
            other = "--full trains the embedding, too" if self.full else "--parallel fsdp has it on each device"
            raise ConfigError(f"--embedding cpu keeps a frozen embedding in CPU memory, {other}: leave one of them out")
        if self.full and self.quantize:
            raise ConfigError("--quantize freezes weights as codes, --full trains them: leave one of them out")
        if self.stream:
            odd = {"--full": self.full, "--compile": self.compile, "--parallel fsdp": self.parallel == "fsdp"}
            if given := [name for name, value in odd.items() if value]:
                raise ConfigError(
                    f"--stream keeps frozen weights elsewhere, and {given[0]} needs them in place: leave one of them out"
                )
        if self.full:
            plain = {"lora_plus": 1.0, "dropout": 0.0, "rslora": False, "dora": False, "init": "kaiming"}
            given = [f"--{name.replace('_', '-')}" for name, value in plain.items() if getattr(self, name) != value]
            if given:
                raise ConfigError(
                    f"--full trains no adapters, so {', '.join(given)} cannot apply: leave one of them out"
                )
        if self.unlabeled_share and not self.unlabeled:
            raise ConfigError("unlabeled_share needs --unlabeled FILE.txt")


_FIELDS = dataclasses.fields(RunConfig)
TYPES: dict[str, Any] = {item.name: item.type for item in _FIELDS}
FREE = {item.name for item in _FIELDS if item.metadata["free"]}  # may change at --resume
FILES = tuple(item.name for item in _FIELDS if item.metadata["file"])
ROWS = tuple(name for name in FILES if tuple[str, ...] in get_args(TYPES[name]))  # those of rows: one or several
