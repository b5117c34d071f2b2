"""What the report reads of an evaluation: eval.json and eval_rows.jsonl; and of search.json."""

from typing import Any

from typing_extensions import NotRequired, TypedDict

from ..support.schema import Count

Loss = float | None


class Tested(TypedDict):
    loss: float
    accuracy: float
    metric: str
    examples: Count
    tokens: Count
    accuracy_low: NotRequired[float]
    accuracy_high: NotRequired[float]
    answer_loss: NotRequired[Loss]
    end_loss: NotRequired[Loss]


class Gain(TypedDict):
    """The accuracy of the tuned model minus the base model's, with an interval paired by row."""

    difference: float
    low: float
    high: float


class General(TypedDict):
    """The loss on general text before and after."""

    file: str
    tokens: Count
    before: float
    after: float


class Sample(TypedDict):
    row: Count
    prompt: str
    expected: str
    before: str
    after: str
    right_before: bool
    right_after: bool


class Lost(TypedDict):
    where: str
    prompt: str
    expected: str
    answer: str


class MustKeep(TypedDict):
    """Answers that had to stay right."""

    file: str
    prompts: Count
    kept: Count
    lost: list[Lost]
    wrong_before: Count


class Eval(TypedDict):
    base: Tested
    tuned: Tested
    rows: NotRequired[str]
    gain: NotRequired[Gain]
    general: NotRequired[General]
    samples: NotRequired[list[Sample]]
    must_keep: NotRequired[MustKeep]


class Answer(TypedDict):
    """How a model did on a row. `answered`: the likeliest of the choices; `chance`: the probability of the right answer."""

    right: float
    answered: NotRequired[str | None]
    chance: NotRequired[float | None]


class Judged(TypedDict):
    """A line of eval_rows.jsonl: a row that was judged."""

    row: Count
    where: str
    prompt: str
    expected: str | None
    before: Answer
    after: Answer


class Trial(TypedDict):
    """A trial of a search."""

    number: Count
    params: dict[str, Any]
    state: str
    valid_loss: float | None
    steps: NotRequired[Count | None]
    seconds: NotRequired[float | None]
    why: NotRequired[str | None]


class Search(TypedDict):
    """`best`: the number of the best trial; None before one was trained to its end."""

    best: Count | None
    trials: list[Trial]
