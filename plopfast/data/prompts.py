"""Rows of prompts alone, as trainers that sample the answers themselves take them (TRL's GRPO)."""

import contextlib
from collections.abc import Sequence
from typing import Any

from ..support.errors import DataError
from .encoding import Encoder
from .example import Example
from .notices import Notices
from .rows import Row
from .template import REFUSED, Template


def tokenize_prompts(rows: Sequence[Row], tokenizer: Any, max_length: int | None, notices: Notices) -> list[Example]:
    """Turn rows of a `prompt`, text or messages, into one Example each, of which nothing is learned.

    A prompt is tokenised as the model reads it before it answers: messages through the chat template, up to where the
    assistant begins. Of a prompt of more than `max_length` tokens the last ones are kept, and `notices` counts it.

    Raises DataError for messages without a chat template, or that it refuses, and for a prompt without a token.
    """
    encoder = Encoder(tokenizer)
    template = Template(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    examples = []
    with template.watch if template else contextlib.nullcontext():
        for where, row in rows:
            tokens = _tokens(where, row, encoder, template)
            if max_length is not None and len(tokens) > max_length:
                notices.add(f"cut to {max_length} tokens, from the left of the prompt", where)
                tokens = tokens[-max_length:]
            examples.append(Example(encoder.shared(tokens), (), None, None, where))
    return examples


def _tokens(where: str, row: dict[str, Any], encoder: Encoder, template: Template | None) -> list[int]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        (tokens,) = encoder.encode([prompt])
        return tokens if tokens[: len(encoder.front)] == encoder.front else encoder.front + tokens
    if template is None:
        raise DataError(f"{where}: messages need a tokenizer with a chat template; use a prompt of plain text")
    variables = {"tools": row["tools"]} if row.get("tools") else {}
    text = template.text_or_none(prompt, variables, generate=True)
    if text is None:
        raise DataError(f"{where}: {REFUSED}")
    return encoder.encode([text])[0]
