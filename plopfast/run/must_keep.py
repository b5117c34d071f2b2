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
        return any(_holds(answer, text) for text in self.wanted) and not any(
            _holds(answer, text) for text in self.never
        )

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
    """What eval.json holds of the answers before and after: how many were right, and which are lost."""
    right = [[row.is_right(answer) for row, answer in zip(rows, of, strict=True)] for of in (before, after)]
    lost = [
        {"where": row.prompt.where, "prompt": row.prompt.text, "expected": row.expected, "answer": answer}
        for row, answer, was, is_ in zip(rows, after, *right, strict=True)
        if was and not is_
    ]
    return {
        "file": file, "prompts": len(rows), "right_before": sum(right[0]), "right_after": sum(right[1]), "lost": lost,
        "wrong_before": [row.prompt.where for row, was in zip(rows, right[0], strict=True) if not was],
    }  # fmt: skip


def in_words(value: dict[str, Any]) -> list[str]:
    """Says what `judged` found, in a line each."""
    found = [
        f"{value['prompts']} answers to keep: {value['right_before']} right before, {len(value['lost'])} of these lost"
    ]
    if wrong := value["wrong_before"]:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        found.append(f"not counted, as they were wrong before training: {', '.join(wrong[:3])}{more}")
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
