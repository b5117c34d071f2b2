"""Loss and accuracy of a model on held-out examples; logits are computed only where they are read."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..data.batches import collate, group_by_length
from ..data.example import Example
from ..models.running import device_of, evaluating, run_for_logits
from ..support.errors import DataError, TrainingError
from ..support.progress import bar
from .intervals import of_shares, wilson
from .loss import inputs_of, positions

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


def label_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (losses [n], logits [n, vocabulary], where [rows, tokens - 1]) for the n positions whose next token has a
    label, which `where` marks."""
    where = positions(batch["labels"])
    logits = run_for_logits(model, inputs_of(batch), where)
    targets = batch["labels"][:, 1:][where]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none"), logits, where


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


@torch.no_grad()
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
    last one is the answer; closing markup is not part of it. `progress` is a bar's label, empty for none. Raises
    TrainingError for a loss that is not finite, and DataError where there is no row.
    """
    if not examples:
        raise DataError("no rows to evaluate on: give at least one")
    began = time.perf_counter()
    sequences = _sequences(examples, choices or [])
    loss, count = 0.0, 0
    hits, exact = [0] * len(examples), [False] * len(examples)
    ranking: list[dict[tuple[int, ...], float]] = [{} for _ in examples]
    with evaluating(model), bar(progress, len(sequences), "rows", bool(progress)) as meter:
        for group in group_by_length([len(e.tokens) for _, e in sequences], batch_tokens):
            run = [sequences[i][1] for i in group]
            batch = collate(run, device_of(model))
            losses, logits, where = label_loss(model, batch)
            logprobs = logits.float().log_softmax(-1) if choices else logits
            parts = (t.split(where.sum(1).tolist()) for t in (losses, logprobs, logits.argmax(-1)))
            for i, row_losses, row_logprobs, row_best in zip(group, *parts, strict=True):
                index, example = sequences[i]
                first, labels = _from_the_answer(example)
                if i < len(examples):
                    loss += float(row_losses.sum())
                    count += len(row_losses)
                    own = torch.tensor(_answer(example), dtype=torch.long)
                    hit = row_best[first : first + len(own)].cpu() == own
                    hits[i], exact[i] = int(hit.sum()), bool(hit.all())
                for choice in map(tuple, choices or []):
                    if choice[:-1] == labels[: len(choice) - 1]:
                        ranking[index][choice] = sum(
                            float(row_logprobs[first + s, token]) for s, token in enumerate(choice)
                        )
            meter.update(len(group))
    if not math.isfinite(loss):
        raise TrainingError("the evaluation loss is NaN or infinite: the model's weights are damaged or overflow")
    if choices:
        metric, right = "choice", [float(_chose_own(e, r)) for e, r in zip(examples, ranking, strict=True)]
    elif all(e.answer for e in examples):
        metric, right = "exact-match", [float(all_right) for all_right in exact]
    else:
        lengths = [len(_answer(e)) for e in examples]
        tokens = sum(lengths)
        metric, right = "token", [n * len(examples) / max(tokens, 1) for n in hits]
    accuracy, seconds = sum(right) / len(examples), time.perf_counter() - began
    low, high = of_shares(hits, lengths) if metric == "token" else wilson(accuracy, len(examples))
    return Metrics(loss / count, accuracy, low, high, metric, len(examples), count, seconds, right)


def _sequences(examples: Sequence[Example], choices: list[list[int]]) -> list[tuple[int, Example]]:
    """Returns what is run: every example, and again with each other way in which a choice of several tokens can begin."""
    sequences = list(enumerate(examples))
    for begin in {tuple(choice[:-1]) for choice in choices} - {()}:
        sequences += [
            (i, Example.after_prompt((*e.tokens[: e.start], *begin, 0), e.start))  # the last token is never read
            for i, e in enumerate(examples)
            if e.tokens[e.start : e.start + len(begin)] != begin
        ]
    return sequences


def _from_the_answer(example: Example) -> tuple[int, tuple[int, ...]]:
    """Returns how many labels come before the answer, and the labels from its beginning to the end of its turn."""
    start = example.start
    before = sum(max(0, min(end, start) - begin) for begin, end in example.learned)
    return before, example.tokens[start : next((end for _, end in example.learned if end > start), start)]


def _answer(example: Example) -> tuple[int, ...]:
    """Returns the tokens that accuracy is measured on: the answer's (what closes it, where it is empty), or all of a plain
    text's labels."""
    begin, end = example.answer or example.learned[-1]
    return example.tokens[begin:end] or _from_the_answer(example)[1]


def _chose_own(example: Example, ranking: dict[tuple[int, ...], float]) -> bool:
    likeliest = max(ranking, key=lambda choice: ranking[choice])
    return example.tokens[example.start : example.start + len(likeliest)] == likeliest
