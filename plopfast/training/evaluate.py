"""Loss and accuracy of a model on held-out examples."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..data.example import Example, Span
from ..data.trees import Question
from ..support.errors import DataError, TrainingError
from .intervals import of_shares, wilson
from .likelihoods import Found, likelihoods

MAX_CHOICES = 32


@dataclass(frozen=True)
class Metrics:
    """How good a model is. `loss` is the mean negative log-likelihood of a label token, in nats; `metric` names the kind of
    `accuracy` (see `evaluate`), whose 95 % interval is `accuracy_low` to `accuracy_high`; `tokens` are the label tokens.
    `right` says how right each example was: numbers whose mean is the accuracy, 0 or 1 except for "token" accuracy, where
    longer examples weigh more."""

    loss: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    metric: str
    examples: int
    tokens: int
    seconds: float
    right: list[float] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Returns all but `right`, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "right"}


def in_words(summary: Mapping[str, Any], rows: str) -> str:
    """Says in a line what `Metrics.summary` holds; `rows` names the kind of rows, such as "test". Summaries that were kept
    before there were intervals lack theirs.

    >>> in_words({"loss": 0.21, "accuracy": 0.88, "metric": "choice", "examples": 770}, "test")
    'loss 0.2100, accuracy 0.8800 (choice, 770 test rows)'
    """
    bounds = ""
    if {"accuracy_low", "accuracy_high"} <= summary.keys():
        bounds = f"95% interval {summary['accuracy_low']:.4f} to {summary['accuracy_high']:.4f}; "
    of = f"{summary['examples']} {rows} row{'s' * (summary['examples'] != 1)}"
    return f"loss {summary['loss']:.4f}, accuracy {summary['accuracy']:.4f} ({bounds}{summary['metric']}, {of})"


def choices_of(examples: Sequence[Example]) -> list[list[int]] | None:
    """Returns the tokens of each answer where the task is a choice, else None. A choice has 2 to 32 distinct completions,
    each used at least four times on average, and none of them begins another one."""
    texts = sorted({e.completion for e in examples if e.completion is not None})
    if any(e.completion is None for e in examples) or not 2 <= len(texts) <= min(MAX_CHOICES, len(examples) // 4):
        return None
    answers = {(e.completion, _answer(e)) for e in examples}
    if len(answers) != len(texts):
        return None  # an answer's tokens depend on the prompt
    choices = [list(tokens) for _, tokens in sorted(answers)]
    prefixes = [a == b[: len(a)] for a in choices for b in choices if a is not b]
    return None if any(prefixes) or not all(choices) else choices


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    choices: list[list[int]] | None = None,
    batch_tokens: int = 512,
    progress: str = "",
) -> Metrics:
    """Evaluates a model: loss over all label tokens, and accuracy.

    With `choices` (token lists, see `choices_of`) the accuracy is "choice": the share of examples whose own completion is
    the likeliest of the choices. Without, it is "exact-match" for examples with an answer (the share of examples whose
    every answer token is the likeliest one) and "token" for plain text (the share of label tokens). Of several turns, the
    last one is the answer; closing markup is not part of it. `progress` is a bar's label, empty for none.

    What rows and choices have in common is run once; where the model does not allow it, a warning says why. On several
    ranks, call it on each of them: each runs a share of the rows, and all return the same. Raises TrainingError for a loss
    that is not finite, and DataError where there is no row.
    """
    if not examples:
        raise DataError("no rows to evaluate on: give at least one")
    began = time.perf_counter()
    questions = [_question(example, choices or []) for example in examples]
    found = likelihoods(model, questions, batch_tokens, progress)
    owns = [found.of(i, 0) for i in range(len(examples))]
    logprobs = [value for own, _ in owns for value in own]
    loss = -math.fsum(logprobs) / len(logprobs) if all(map(math.isfinite, logprobs)) else math.nan
    if not math.isfinite(loss):
        raise TrainingError("the evaluation loss is NaN or infinite: the model's weights are damaged or overflow")
    bests = [_of_the_answer(*one) for one in zip(examples, questions, (best for _, best in owns), strict=True)]
    hits, lengths = [int(sum(best)) for best in bests], [len(best) for best in bests]
    if choices:
        metric = "choice"
        right = [float(_chose_own(example, choices, found, i)) for i, example in enumerate(examples)]
    elif all(e.answer for e in examples):
        metric, right = "exact-match", [float(all(best)) for best in bests]
    else:
        metric, right = "token", [n * len(examples) / max(sum(lengths), 1) for n in hits]
    accuracy, seconds = sum(right) / len(examples), time.perf_counter() - began
    low, high = of_shares(hits, lengths) if metric == "token" else wilson(accuracy, len(examples))
    return Metrics(loss, accuracy, low, high, metric, len(examples), len(logprobs), seconds, right)


def _question(example: Example, choices: Sequence[Sequence[int]]) -> Question:
    """Returns what is asked about a row: its labels along its own path, then each choice after its prompt. The last token of
    a path is predicted and not run."""
    tokens, start = example.tokens, example.start
    own = tuple((at - 1, tokens[at]) for begin, end in example.learned for at in range(max(begin, 1), end))
    likely = tuple(tuple((at - 1, token) for at, token in enumerate(choice, start) if at) for choice in choices)
    return Question(tokens[:start], (tokens[start:-1], *(tuple(c[:-1]) for c in choices)), (own, *likely))


def _answer_of(example: Example) -> Span:
    """Returns the span that accuracy is measured on: the answer (what closes it, where it is empty), or all of a plain text's
    last learned part."""
    begin, end = example.answer or example.learned[-1]
    return (begin, end) if begin < end else (begin, next((end for _, end in example.learned if end > begin), begin))


def _answer(example: Example) -> tuple[int, ...]:
    begin, end = _answer_of(example)
    return example.tokens[begin:end]


def _of_the_answer(example: Example, question: Question, best: list[float]) -> list[float]:
    """Returns the part of `best`, which is of all labels, that belongs to the answer."""
    begin, end = _answer_of(example)
    return [hit for (place, _), hit in zip(question.reads[0], best, strict=True) if begin <= place + 1 < end]


def _chose_own(example: Example, choices: Sequence[Sequence[int]], found: Found, number: int) -> bool:
    """Whether the likeliest of the choices is the example's own."""
    sums = [math.fsum(found.of(number, path)[0]) for path in range(1, len(choices) + 1)]
    likeliest = tuple(choices[sums.index(max(sums))])
    return example.tokens[example.start : example.start + len(likeliest)] == likeliest
