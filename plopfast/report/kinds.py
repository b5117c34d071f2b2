"""What the report, and the commands that go on with a folder, read of each JSON file; `schema.checked` compares.

A file may hold more. `NotRequired` fields are missing in files of earlier versions.
"""

from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen
from typing_extensions import NotRequired, TypedDict

from ..support import files
from ..support.schema import Count, NotNegative, Size, checked
from .kinds_eval import Eval, Judged, Search, Tested

Words = list[str]
Some = MinLen(1)


class Training(TypedDict, total=False):
    tokens: Count
    validation: str | None
    unmoved: dict[str, Count]
    steps: Count
    best_step: Count
    stopped: str
    padding: float
    rows_seen: Count
    clipped: Count


class OfAJob(TypedDict):
    folder: str
    error: NotRequired[str]
    types: NotRequired[Words]
    parameters: NotRequired[Count]
    steps: NotRequired[Count]
    valid_loss: NotRequired[float | None]
    before: NotRequired[Tested]
    after: NotRequired[Tested]


class Multi(TypedDict):
    jobs: dict[str, OfAJob]


class Metric(TypedDict):
    step: Count
    loss: NotRequired[float | None]
    valid_loss: NotRequired[float | None]
    lr: NotRequired[float | None]
    grad_norm: NotRequired[float | None]
    tokens: NotRequired[Count | None]
    seconds: NotRequired[float | None]


class Completion(TypedDict):
    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float


class GRPO(TypedDict):
    reward: str
    steps: Count
    test_prompts: Count
    mean_before: NotRequired[float]
    mean_after: NotRequired[float]
    samples: list[Completion]
    notes: Words


class Rewarded(TypedDict):
    step: Count
    reward: float | None
    length: NotRequired[float | None]
    entropy: NotRequired[float | None]
    kl: NotRequired[float | None]


class Picked(TypedDict):
    what: str
    pick: Words
    tau: float | None
    types: dict[str, float]


class Criterion(TypedDict):
    name: str
    pick: Words
    chooses: str
    tau: float | None
    seconds: NotNegative
    cost: float | None
    extra_mib: float | None
    needs: str
    source: str


class Stable(TypedDict):
    what: str
    repeats: Count
    tau: float
    tau_low: float
    same_pick: float


class Missing(TypedDict):
    kind: str
    what: str
    why: str


class Audit(TypedDict):
    verdict: str
    prompts: Count
    pick: Words
    types: dict[str, float]
    criteria: list[Criterion]
    controls: list[Picked]
    tokens: list[Picked]
    stability: list[Stable]
    missing: NotRequired[list[Missing]]
    scored_tokens: NotRequired[Count]


class Choice(TypedDict):
    name: str
    types: Words
    parameters: Count
    weights_mib: float
    adapters_mib: float
    activations_mib: float
    logits_mib: float
    total_mib: float
    tflops_per_step: float
    memory_of_full: float
    flops_of_full: float


class Estimate(TypedDict):
    batch_tokens: Count
    rows: float
    row_tokens: Count
    accumulate: Count
    device: str
    dtype: str
    choices: Annotated[list[Choice], Some]


class Versus(TypedDict):
    difference: float
    low: float
    high: float
    p_corrected: float
    verdict: str


class Seed(TypedDict):
    general_loss: NotRequired[float | None]


class Arm(TypedDict):
    name: str
    types: Words
    parameters: Count
    rank_low: Count | None
    rank_high: Count | None
    lr: float
    runs: Annotated[list[Seed], Some]
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    general_loss: NotRequired[float | None]
    forgetting: float | None
    seconds: NotNegative
    peak_mib: NotNegative
    versus: Versus | None


class Dropped(TypedDict):
    """An arm of a trial that did not get all seeds."""

    name: str
    types: Words
    lr: float
    runs: Annotated[list[Seed], Some]
    accuracy: float
    loss: float


class Ranking(TypedDict):
    types: dict[str, float]
    chooses: str


class Source(TypedDict):
    file: str
    sha256: str


class Text(TypedDict):
    file: str
    sha256: str
    tokens: Count


class Base(TypedDict):
    accuracy: float
    loss: float
    general_loss: NotRequired[float | None]


class Trial(TypedDict):
    confidence: float
    reference: str
    base: Base
    arms: Annotated[list[Arm], Some]
    dropped: NotRequired[list[Dropped]]
    same: NotRequired[dict[str, str]]
    criteria: NotRequired[dict[str, Ranking]]
    test: str
    metric: str
    test_rows: Count
    seeds: list[Count]
    seconds: NotNegative
    command: str
    general: Text
    data: dict[str, Source | list[Source]]
    versions: dict[str, str]
    machine: str


Percentiles = TypedDict("Percentiles", {"50%": Count, "95%": Count})


class Split(TypedDict):
    split: str
    rows: Count
    tokens: Size
    learned: Count
    shortest: Count
    longest: Count
    percentiles: Percentiles
    histogram: Annotated[list[tuple[Count, Count]], Some]
    notes: Words
    where: str
    row: list[tuple[str, bool]]


class Data(TypedDict):
    splits: Annotated[list[Split], Some]
    overlap: Words


class Config(TypedDict, total=False):
    settings: dict[str, Any]
    data: dict[str, Source | list[Source]]
    versions: dict[str, str]
    machine: str


class Result(TypedDict):
    """result.json of one training of a trial; of a training that failed, `valid_loss` is None."""

    seed: Count
    lr: float
    valid_loss: float | None
    seconds: NotNegative
    peak_mib: NotNegative
    tokens_per_s: NotNegative
    error: NotRequired[str]


class Test(Base):
    """test.json of one training of a trial."""

    metric: str
    right: Annotated[list[NotNegative], Some]
    nats: NotRequired[list[NotNegative]]
    tokens: NotRequired[list[Count]]
    seconds: NotNegative


KINDS: dict[str, Any] = {
    "eval": Eval,
    "training": Training,
    "audit": Audit,
    "estimate": Estimate,
    "grpo": GRPO,
    "multi": Multi,
    "trial": Trial,
    "data": Data,
    "config": Config,
    "result": Result,
    "test": Test,
    "inputs": dict[str, Any],
    "criteria": dict[str, dict[str, float]],
    "search": Search,
}


LINES: dict[str, Any] = {"metrics": Metric, "rewards": Rewarded, "eval_rows": Judged}  # a value a line


def read(path: Path, made_by: str) -> Any:
    """Returns what a file named in `KINDS`, or a .jsonl file named in `LINES`, holds. Raises FileError where a field does not fit."""
    remedy = f"make it anew with {made_by} --overwrite"
    if path.suffix == ".jsonl":
        return [_whole(LINES[path.stem], value, path, remedy) for value in files.read_json_lines(path, made_by)]
    return _whole(KINDS[path.stem], files.read_json(path, made_by), path, remedy)


def _whole(kind: Any, value: Any, path: Path, remedy: str) -> Any:
    """The value with the fields that `kind` lacks, too."""
    checked(kind, value, path, remedy, more=True)
    return value
