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


@dataclass(frozen=True, slots=True)
class Judged:
    """How one example was judged. `right`: 0 or 1, except for "token" accuracy, where longer examples weigh more. `nats`: the
    negative log-likelihood of its `tokens` label tokens. `answered`: the number of the likeliest choice. `chance`: the probability
    of the right answer, of a choice among the choices; None for plain text."""

    right: float
    nats: float
    tokens: int
    answered: int | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Metrics:
    """How good a model is. `loss` is the mean negative log-likelihood of a label token, in nats: of those in answers
    (`answer_loss`) and of those that end a turn (`end_loss`), None where there are none. `metric` names the kind of `accuracy` (see
    `evaluate`), whose 95 % interval is `accuracy_low` to `accuracy_high`; `tokens` are the label tokens. The mean of `rows`' `right`
    is the accuracy."""

    loss: float
    answer_loss: float | None
    end_loss: float | None
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    metric: str
    examples: int
    tokens: int
    seconds: float
    rows: list[Judged] = field(repr=False)

    @property
    def right(self) -> list[float]:
        """How right each example was."""
        return [row.right for row in self.rows]

    def summary(self) -> dict[str, Any]:
        """Returns all but `rows`, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "rows"}


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
    parts = ""
    if (
        summary.get("answer_loss") is not None and summary.get("end_loss") is not None
    ):  # a base may never end its answers
        parts = f" (answers {summary['answer_loss']:.4f}, their ends {summary['end_loss']:.4f})"
    return f"loss {summary['loss']:.4f}{parts}, accuracy {summary['accuracy']:.4f} ({bounds}{summary['metric']}, {of})"


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
    in_answer = [_of_the_answer(*one) for one in zip(examples, questions, (own for own, _ in owns), strict=True)]
    hits, lengths = [int(sum(best)) for best in bests], [len(best) for best in bests]
    answered: Sequence[int | None] = [None] * len(examples)
    chances: Sequence[float | None] = [math.exp(math.fsum(own)) for own in in_answer]
    right: Sequence[float]
    if choices:
        metric = "choice"
        answered, chances, right = zip(*(_chosen(e, choices, found, i) for i, e in enumerate(examples)), strict=True)
    elif all(e.answer for e in examples):
        metric, right = "exact-match", [float(all(best)) for best in bests]
    else:
        metric, right = "token", [n * len(examples) / max(sum(lengths), 1) for n in hits]
        chances = [None] * len(examples)
    accuracy = sum(right) / len(examples)
    low, high = of_shares(hits, lengths) if metric == "token" else wilson(accuracy, len(examples))
    nats, counts = [-math.fsum(own) for own, _ in owns], [len(own) for own, _ in owns]
    rows = [Judged(*one) for one in zip(right, nats, counts, answered, chances, strict=True)]
    answer_loss, end_loss = _parts_of_the_loss(examples, questions, [own for own, _ in owns])
    return Metrics(
        loss,
        answer_loss,
        end_loss,
        accuracy,
        low,
        high,
        metric,
        len(examples),
        len(logprobs),
        time.perf_counter() - began,
        rows,
    )


def _parts_of_the_loss(
    examples: Sequence[Example], questions: Sequence[Question], owns: Sequence[list[float]]
) -> tuple[float | None, float | None]:
    """Returns the mean loss of the tokens in answers, and of those after them, which end the turn."""
    spans = [(q, own, e.answer) for q, own, e in zip(questions, owns, examples, strict=True) if e.answer]
    answers = [value for q, own, (begin, end) in spans for value in _between(q, own, begin, end)]
    ends = [value for q, own, (_, end) in spans for value in _between(q, own, end)]
    answer_loss, end_loss = (-math.fsum(part) / len(part) if part else None for part in (answers, ends))
    return answer_loss, end_loss


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


def _of_the_answer(example: Example, question: Question, values: list[float]) -> list[float]:
    """Returns the part of `values`, one for each label, that belongs to the answer."""
    return _between(question, values, *_answer_of(example))


def _between(question: Question, values: list[float], begin: int, end: float = math.inf) -> list[float]:
    """Returns the part of `values`, one for each label, that belongs to the tokens from `begin` up to `end`."""
    return [value for (place, _), value in zip(question.reads[0], values, strict=True) if begin <= place + 1 < end]


def _chosen(example: Example, choices: Sequence[Sequence[int]], found: Found, number: int) -> tuple[int, float, float]:
    """Returns the likeliest choice, the probability of the example's own among the choices, and whether both are the same."""
    sums = [math.fsum(found.of(number, path)[0]) for path in range(1, len(choices) + 1)]
    likeliest, start = sums.index(max(sums)), example.start
    own = [i for i, choice in enumerate(choices) if example.tokens[start : start + len(choice)] == tuple(choice)]
    if not own:  # an answer that is no choice
        return likeliest, 0.0, 0.0
    chance = 1 / math.fsum(math.exp(min(value - sums[own[0]], 700)) for value in sums)
    return likeliest, chance, float(likeliest == own[0])
