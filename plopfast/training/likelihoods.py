"""Log-probabilities that questions ask for, with as few tokens run as the model allows, on all ranks together.

The rows are trees (see data/trees.py) where those save enough tokens. Not every model can run them: some ignore the mask or
the positions, or carry a state from token to token. So the first rows are run both ways. Where the ways disagree, all rows
are run without branches, and a warning says so.
"""

import inspect
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ..data.trees import Question, Row, chains, grouped, inputs_of_rows, padded_size, trees
from ..models.running import device_of, evaluating, run_for_logits
from ..support import ranks
from ..support.progress import bar

SAVES = 0.8  # trees are taken where they, and the check, leave at most this share of the tokens; 0.89 gained no time
SAMPLE = 3  # questions that are run both ways, beside the longest
# of the log-probabilities' root mean square, for each of them; the default model's differ by 2e-6, 0.004 and 0.04
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
MASKED = ("sdpa", "eager")  # attention that takes a mask of one's own
MOST = 8192  # tokens of a path in a tree: its mask takes 256 MiB in float32
LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers that follow a mask


class Found:
    """Answers to questions: `logprobs` and `best` (whether the token is the likeliest, 0 or 1) of every read, float64 [reads]
    on the CPU. Each read is answered once, so that ranks add up what they have found."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.begins: list[list[int]] = []
        count = 0
        for question in questions:
            self.begins.append([])
            for reads in question.reads:
                self.begins[-1].append(count)
                count += len(reads)
        self.values = torch.zeros(2, count, dtype=torch.float64)

    def of(self, number: int, path: int) -> tuple[list[float], list[float]]:
        """Returns (logprobs, best) of the reads of one path."""
        begin = self.begins[number][path]
        logprobs, best = self.values[:, begin : begin + len(self.questions[number].reads[path])].tolist()
        return logprobs, best

    def take(self, model: nn.Module, rows: Sequence[Row], counts: bool = True) -> None:
        """Runs rows and keeps what they answer, unless it does not count."""
        places: list[tuple[int, int]] = []
        targets: list[int] = []
        into: list[int] = []
        for at, row in enumerate(rows):
            for number, path, nodes in row.asked:
                places += [(at, node) for node in nodes]
                targets += [token for _, token in self.questions[number].reads[path]]
                begin = self.begins[number][path]
                into += range(begin, begin + len(nodes))
        device = device_of(model)
        inputs = inputs_of_rows(rows, _dtype_of(model))
        where = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        order = {place: at for at, place in enumerate(sorted(set(places)))}  # that of the logits
        where[tuple(torch.tensor(list(order), dtype=torch.long).view(-1, 2).T)] = True
        logits_nV = run_for_logits(model, {k: v.to(device) for k, v in inputs.items()}, where.to(device)).float()
        numbers = [[order[place] for place in places], targets]
        at_r, target_r = torch.tensor(numbers, dtype=torch.long, device=device)
        logprob_r = logits_nV[at_r, target_r] - logits_nV.logsumexp(-1)[at_r]
        best_r = logits_nV.argmax(-1)[at_r] == target_r
        if counts:
            self.values[:, into] = torch.stack([logprob_r.double(), best_r.double()]).cpu()


def likelihoods(
    model: nn.Module, questions: Sequence[Question], batch_tokens: int, progress: str = "", plain: bool = False
) -> Found:
    """Answers every question, each rank a share of the rows, and returns the same `Found` on every rank.

    `plain` keeps to rows without branches. `progress` is a bar's label; the bar counts questions.
    """
    found = Found(questions)
    with torch.no_grad(), evaluating(model):
        groups = grouped(chains(questions), batch_tokens)
        if not plain:
            groups = _branched(model, questions, groups, batch_tokens)
        mine = ranks.share(len(groups))
        done = [sum(path == 0 for row in groups[index] for _, path, _ in row.asked) for index, _ in mine]
        with bar(progress, sum(done), "rows", bool(progress)) as meter:
            for (index, counts), rows in zip(mine, done, strict=True):
                found.take(model, groups[index], counts)
                meter.update(rows)
    if ranks.size() > 1:
        found.values = torch.stack([ranks.total(row) for row in found.values])
    return found


def _branched(
    model: nn.Module, questions: Sequence[Question], groups: list[list[Row]], batch_tokens: int
) -> list[list[Row]]:
    """Returns groups of trees in place of the plain `groups`, where they save enough and the model can run them."""
    rows = trees(questions)
    branched = grouped(rows, batch_tokens)
    deepest = max(range(len(questions)), key=lambda number: questions[number].deepest)
    neighbours = [number for row in rows for number in dict.fromkeys(number for number, _, _ in row.asked)]
    sample = [questions[number] for number in dict.fromkeys([deepest, *neighbours[:SAMPLE]])]
    ways = [grouped(make(sample), batch_tokens) for make in (chains, trees)]
    if padded_size(branched) + sum(map(padded_size, ways)) > SAVES * padded_size(groups):
        return groups
    why = _why_not(model, questions[deepest].deepest) or _disagreement(model, sample, ways)
    if ranks.largest(int(bool(why))):  # all ranks run the same rows
        if ranks.is_main():
            why = why or "another rank finds that they give other numbers"
            warnings.warn(f"evaluation runs each row and choice on its own, which takes longer: {why}", stacklevel=4)
        return groups
    return branched


def _why_not(model: nn.Module, deepest: int) -> str:
    """Returns why a model is known to be unable to run trees, or nothing."""
    config, name = getattr(model, "config", None), type(model).__name__
    if getattr(model, "_is_stateful", False):
        return f"{name} carries a state from token to token, which cannot branch"
    taken = inspect.signature(model.forward).parameters
    if "position_ids" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return f"{name} takes no position_ids"
    if odd := sorted(set(getattr(config, "layer_types", None) or ()) - LAYERS):
        return f"{name} has {odd[0]} layers, which follow no mask"
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if attention not in MASKED:
        return f'its attention "{attention}" takes no mask of trees; load it with attn_implementation="sdpa"'
    if deepest > MOST:
        return f"the longest row has {deepest} tokens, too many for a mask"
    windows = [getattr(config, key, None) or deepest for key in ("sliding_window", "attention_chunk_size")]
    if min(windows) < deepest:
        return f"its attention reaches {min(windows)} tokens back, and the longest row has {deepest}"
    return ""


def _disagreement(model: nn.Module, sample: list[Question], ways: list[list[list[Row]]]) -> str:
    """Runs a sample plainly and as trees, and returns what disagrees, or nothing."""
    plain, branched = Found(sample), Found(sample)
    for group in ways[0]:
        plain.take(model, group)
    failure = ""
    try:
        for group in ways[1]:
            branched.take(model, group)
    except (TypeError, ValueError, RuntimeError) as error:  # each model refuses a mask in its own way
        if isinstance(error, torch.OutOfMemoryError) or ranks.is_loss(error):
            raise
        failure = f"{type(model).__name__} refuses rows that branch ({str(error).splitlines()[0]})"
    one, two = (found.values[0].nan_to_num(0.0, 0.0, 0.0) for found in (plain, branched))
    allowed = TOLERANCES[_dtype_of(model)]
    apart = float((one - two).abs().max() / one.square().mean().sqrt().clamp_min(1e-30))
    if failure or apart <= allowed:
        return failure
    name = type(model).__name__
    return f"{name} computes other log-probabilities in rows that branch (they differ by {apart:.1g} of their size)"


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
