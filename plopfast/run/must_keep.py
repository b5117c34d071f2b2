"""Answers that training must not spoil: facts, formats, refusals. What was right before and is wrong after is lost.

A row is a prompt (text or messages) with its answer, as `--train` takes them, or with `"answer"`, a text or a list of which one
is enough; `"never"` names what must not be in the answer. An answer is right if it holds one of these texts as whole words,
whatever its case and spacing: a model that is tuned may say the same in other words around it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.formats import is_messages
from ..data.tasks import Prompt, prompts_of, read_prompts
from ..models.generating import check_room
from ..support.errors import DataError, shown

TOKENS = 128  # of an answer, at most
SHOWN = 3  # places of answers that were wrong before
EXPECTED = (
    'expected a row like {"prompt": "...", "answer": "text" or ["one", "or another"]}, {"prompt", "completion"} or '
    '{"messages": [..., the answer]}'
)


@dataclass(frozen=True)
class MustKeep:
    """A prompt, texts of which its answer must hold one, and texts that it must not hold."""

    prompt: Prompt
    wanted: tuple[str, ...]
    never: tuple[str, ...] = ()

    def is_right(self, answer: str) -> bool:
        """Whether the answer holds one of the wanted texts as whole words, and none of the others."""
        spoilt = any(_holds(answer, text) for text in self.never)
        return not spoilt and any(_holds(answer, text) for text in self.wanted)

    @property
    def expected(self) -> str:
        """For people: "I cannot or I can't, and never Step 1"."""
        return " or ".join(self.wanted) + (f", and never {' or '.join(self.never)}" if self.never else "")


def read_must_keep(file: str, tokenizer: Any, context: int | None) -> list[MustKeep]:
    """Reads and tokenises the rows of a file. Raises DataError, with the line, for a row that is none."""
    parts = [(where, *_parts(where, row)) for where, row in read_prompts(file)]
    prompts = prompts_of([(where, {"prompt": prompt}) for where, prompt, *_ in parts], tokenizer)
    check_room([prompt.tokens for prompt in prompts], context, [prompt.where for prompt in prompts])
    return [MustKeep(prompt, *texts) for prompt, (_, _, *texts) in zip(prompts, parts, strict=True)]


def judged(rows: Sequence[MustKeep], before: Sequence[str], after: Sequence[str], file: str) -> dict[str, Any]:
    """What eval.json holds of the answers before and after: how many were kept, which are lost, which were wrong before."""
    kept, lost, wrong = 0, [], []
    for row, was, now in zip(rows, before, after, strict=True):
        if not row.is_right(was):
            wrong.append(row.prompt.where)
        elif row.is_right(now):
            kept += 1
        else:
            lost.append({"where": row.prompt.where, "prompt": row.prompt.text, "expected": row.expected, "answer": now})
    return {
        "file": file, "prompts": len(rows), "kept": kept, "lost": lost, "wrong_before": len(wrong), "where_wrong": wrong[:SHOWN],
    }  # fmt: skip


def in_words(value: dict[str, Any]) -> list[str]:
    """Says what `judged` found, in a line each."""
    right = value["kept"] + len(value["lost"])
    found = [f"{value['prompts']} answers to keep: {right} right before, {len(value['lost'])} of these lost"]
    if wrong := value["where_wrong"]:
        more = value["wrong_before"] - len(wrong)
        found.append(
            f"not counted, as they were wrong before training: {', '.join(wrong)}{f' and {more} more' if more else ''}"
        )
    for one in value["lost"]:
        asked = " ".join(one["prompt"].split())
        said = " ".join(one["answer"].split()) or "nothing"
        found.append(
            f"LOST {one['where']}: {shown(asked)}: expected {shown(one['expected'], str)}, got {shown(said, str, 100)}"
        )
    return found


def _parts(where: str, row: dict[str, Any]) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """The prompt of a row, the wanted texts and the others."""
    prompt, wanted = row.get("prompt"), row.get("answer", row.get("completion"))
    if prompt is None and is_messages(row.get("messages")) and row["messages"][-1]["role"] == "assistant":
        *prompt, last = row["messages"]
        wanted = row.get("answer", last["content"])
    if isinstance(wanted, list) and is_messages(wanted):
        wanted = wanted[-1]["content"]
    texts, never = _texts(wanted), _texts(row.get("never", []))
    if prompt is None or not texts or never is None:
        raise DataError(f"{where}: {EXPECTED}, got the keys {sorted(row)}")
    return prompt, texts, never


def _texts(value: Any) -> tuple[str, ...] | None:
    """A text or a list of texts, none of them empty; None for anything else."""
    values = [value] if isinstance(value, str) else value
    right = isinstance(values, list) and all(isinstance(text, str) and text.strip() for text in values)
    return tuple(text.strip() for text in values) if right else None


def _holds(answer: str, text: str) -> bool:
    answer, text = (" ".join(one.casefold().split()) for one in (answer, text))
    before, after = (r"(?<!\w)" if text[0].isalnum() else "", r"(?!\w)" if text[-1].isalnum() else "")
    return re.search(before + re.escape(text) + after, answer) is not None
