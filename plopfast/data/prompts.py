"""Prompts without answers, as trainers that sample the answers themselves take them (TRL's GRPO)."""

import contextlib
from collections.abc import Sequence
from typing import Any

from ..support.errors import DataError
from .encoding import Encoder
from .example import Example
from .notices import Notices
from .rows import Row
from .template import Template


class Prompts:
    """Tokenises prompts, text or messages, as the model reads them before it answers: messages through the chat template, up to
    where the assistant begins. `watch` is a context for all of them: a template must not run for ever."""

    def __init__(self, tokenizer: Any) -> None:
        self.encoder = Encoder(tokenizer)
        self._template = Template(tokenizer) if getattr(tokenizer, "chat_template", None) else None
        self.watch: Any = self._template.watch if self._template else contextlib.nullcontext()

    def tokens(self, prompt: Any, tools: Any = None) -> list[int]:
        """Raises ValueError for messages without a chat template, or that it refuses."""
        if isinstance(prompt, str):
            (tokens,) = self.encoder.encode([prompt])
            return tokens if tokens[: len(self.encoder.front)] == self.encoder.front else self.encoder.front + tokens
        if self._template is None:
            raise ValueError("messages need a tokenizer with a chat template; use a prompt of plain text")
        return self.encoder.encode([self._template.opened(prompt, {"tools": tools} if tools else {})])[0]


def tokenize_prompts(rows: Sequence[Row], tokenizer: Any, max_length: int | None, notices: Notices) -> list[Example]:
    """Turn rows of a `prompt`, text or messages, into one Example each, of which nothing is learned.

    Of a prompt of more than `max_length` tokens the last ones are kept, and `notices` counts it. Raises DataError for messages
    without a chat template, or that it refuses.
    """
    prompts, examples = Prompts(tokenizer), []
    with prompts.watch:
        for where, row in rows:
            try:
                tokens = prompts.tokens(row["prompt"], row.get("tools"))
            except ValueError as error:
                raise DataError(f"{where}: {error}") from None
            if max_length is not None and len(tokens) > max_length:
                notices.add(f"cut to {max_length} tokens, from the left of the prompt", where)
                tokens = tokens[-max_length:]
            examples.append(Example(prompts.encoder.shared(tokens), (), None, None, where))
    return examples
