"""Rows that branch: what several questions have in common is run once.

A question asks for log-probabilities along paths: a prompt followed by one of several tails, such as the choices of an
answer. A row holds a tree of tokens, each after its parent. A token's position is its depth, and it sees its ancestors
alone. So a token gets what a row of its ancestors would give it, and nothing is computed twice:

    prompt 5 6, tails 7 8 and 7 9      tokens 5 6 7 8 9, parents -1 0 1 2 2, positions 0 1 2 3 3

The usual row is a chain: a tree without a branch, for which causal attention needs no mask. The alternative to a tree is a
cache of the prompt's keys and values for each batch. It serves one level of branches, and each model's cache has its own
form.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .batches import group_by_length

WIDTH = 128  # tokens of a row; wider rows of the demo task share 3 % more, and cost more in attention
WIDEST = 2048  # rows of long prompts that begin alike; a mask takes 16 MiB in float32

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about one example. `reads[k]` belongs to the path `prompt + tails[k]`: each (place, token) in it asks for
    the log-probability of `token` after the path's tokens up to `place`."""

    prompt: Tokens
    tails: tuple[Tokens, ...]
    reads: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def deepest(self) -> int:
        """The number of tokens of the longest path."""
        return len(self.prompt) + max(map(len, self.tails))


@dataclass(frozen=True, slots=True)
class Row:
    """A tree of tokens, and what is read of it: (question, path, node of each read). A chain has no `parents`: each token's
    is the one before it. A parent of -1 is none."""

    tokens: Sequence[int]
    asked: list[tuple[int, int, list[int]]]
    parents: Sequence[int] | None = None


class _Tree:
    """A row while it grows."""

    def __init__(self, first: Question) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.asked: list[tuple[int, int, list[int]]] = []
        self._children: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        more = self._more(first)
        self._most = max(WIDTH, more, min(2 * more, WIDEST))

    def has_room(self, question: Question) -> bool:
        return len(self.tokens) + self._more(question) <= self._most

    def add(self, number: int, question: Question) -> None:
        stem = self._walk(-1, question.prompt)
        for path, tail in enumerate(question.tails):
            nodes = stem + self._walk(stem[-1] if stem else -1, tail)
            self.asked.append((number, path, [nodes[place] for place, _ in question.reads[path]]))

    def row(self) -> Row:
        branches = any(parent != node - 1 for node, parent in enumerate(self.parents))
        return Row(self.tokens, self.asked, self.parents if branches else None)

    def _more(self, question: Question) -> int:
        """Returns how many tokens a question would add, or a few more."""
        known, node = 0, -1
        for token in question.prompt:
            if (node := self._children.get((node, token), -2)) == -2:
                break
            known += 1
        return len(question.prompt) - known + sum(map(len, set(question.tails)))

    def _walk(self, node: int, tokens: Tokens) -> list[int]:
        nodes = []
        for token in tokens:
            if (child := self._children.get((node, token))) is None:
                child = self._children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
            nodes.append(node := child)
        return nodes


def trees(questions: Sequence[Question]) -> list[Row]:
    """Returns rows that share all they can. Questions that begin alike become neighbours, and a row takes the next one until
    it holds `WIDTH` tokens, or up to `WIDEST` if that is no more than twice its first question."""
    rows: list[Row] = []
    tree = None
    for number in sorted(range(len(questions)), key=lambda n: (questions[n].prompt, questions[n].tails)):
        if tree is None or not tree.has_room(questions[number]):
            rows += [tree.row()] if tree else []
            tree = _Tree(questions[number])
        tree.add(number, questions[number])
    return [*rows, tree.row()] if tree else []


def chains(questions: Sequence[Question]) -> list[Row]:
    """Returns rows without branches: each path of a question runs on its own, unless a longer one begins with it."""
    rows = []
    for number, question in enumerate(questions):
        tails = question.tails
        own: list[tuple[Row, Tokens]] = []
        for path in sorted(range(len(tails)), key=lambda path: -len(tails[path])):
            places = [place for place, _ in question.reads[path]]
            row = next((row for row, tail in own if tail[: len(tails[path])] == tails[path]), None)
            if row is None:
                own.append((row := Row(question.prompt + tails[path], []), tails[path]))
            row.asked.append((number, path, places))
        rows += [row for row, _ in own]
    return rows


def grouped(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Returns groups of rows of similar length, whose padded size is at most `budget` tokens (see group_by_length)."""
    return [[rows[i] for i in group] for group in group_by_length([len(row.tokens) for row in rows], budget)]


def padded_size(groups: Sequence[Sequence[Row]]) -> int:
    """Returns how many tokens a model is run on, padding included."""
    return sum(len(group) * max(len(row.tokens) for row in group) for group in groups)


def inputs_of_rows(rows: Sequence[Row], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns `input_ids` [rows, longest], padded on the right. If any row branches, `position_ids` too, and as
    `attention_mask` [rows, 1, longest, longest] what is added to attention's logits: 0 for ancestors, else the lowest number
    of `dtype`."""
    longest = max(len(row.tokens) for row in rows)
    inputs = {"input_ids": _padded([row.tokens for row in rows], longest)}
    if any(row.parents for row in rows):
        parents = [row.parents or range(-1, len(row.tokens) - 1) for row in rows]
        sees = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
        for at, row in enumerate(parents):
            for node, parent in enumerate(row):
                if parent >= 0:
                    sees[at, node] |= sees[at, parent]
        inputs["position_ids"] = sees.sum(-1) - 1  # a token's depth is the number of its ancestors
        lowest = torch.finfo(dtype).min
        inputs["attention_mask"] = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, lowest).unsqueeze(1)
    return inputs


def _padded(rows: Sequence[Sequence[int]], longest: int) -> torch.Tensor:
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
