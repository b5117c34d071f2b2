"""A conversation with the base or an adapter. It reads a run folder, and writes none."""

from collections.abc import Callable
from typing import Any

from ..data.prompts import Prompts
from ..models.generating import check_room, generate
from ..support.errors import ConfigError, DataError
from .run import Run

HELP = "/reset begins anew, /system TEXT sets the system message, /exit or Ctrl-D ends"


class Chat:
    """The messages so far, and who answers. Raises ConfigError where the tokenizer has no chat template."""

    def __init__(self, run: Run, model: Any) -> None:
        if not getattr(run.tokenizer, "chat_template", None):
            raise ConfigError(
                f"{model.name_or_path} has no chat template, so it takes no turns: plopfast generate --prompt TEXT continues a text"
            )
        self.run, self.model = run, model
        self.messages: list[dict[str, str]] = []
        self.system: list[dict[str, str]] = []

    def command(self, line: str) -> str | None:
        """What a line that begins with "/" does, in words; None where it ends the conversation."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit", "/bye"):
            return None
        if word == "/reset":
            self.messages = []
            return "begun anew"
        if word == "/system":
            self.messages, self.system = [], [{"role": "system", "content": rest}] if rest.strip() else []
            return f"begun anew, {'with this' if self.system else 'without a'} system message"
        return HELP

    def answer(self, text: str, stream: Callable[[str], None] | None = None) -> tuple[str, list[str]]:
        """The answer to a further message of the user, and what is to be said of it: turns that were left out as the
        context is full, or an answer that was cut."""
        config, notes = self.run.config, []
        self.messages.append({"role": "user", "content": text})
        try:
            tokens = self._tokens()
            dropped = 0
            while not self._fits(tokens) and len(self.messages) > 1:  # the oldest question and its answer
                del self.messages[:2]
                dropped += 1
                tokens = self._tokens()
            check_room([tokens], self.run.context, ["the message"])
            found = generate(
                self.model, self.run.tokenizer, [tokens], max_new_tokens=config.max_new_tokens,
                temperature=config.temperature or 0.0, top_p=config.top_p, seed=config.seed + len(self.messages), stream=stream,
            )[0]  # fmt: skip
        except DataError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": found.text})
        if dropped:
            notes.append(
                f"the context is full: the first {dropped} question{'s' * (dropped > 1)} and answers are forgotten"
            )
        if not found.ended:
            notes.append(f"the answer was cut at {len(found.tokens)} tokens: see --max-new-tokens")
        return found.text, notes

    def _tokens(self) -> list[int]:
        prompts = Prompts(self.run.tokenizer)
        try:
            with prompts.watch:
                return prompts.tokens([*self.system, *self.messages])
        except ValueError as error:
            raise DataError(f"the chat template refuses these messages: {error}") from None

    def _fits(self, tokens: list[int]) -> bool:
        """Whether there is room for an answer, too: a short one at least."""
        context = self.run.context
        return not context or context < 0 or len(tokens) + min(self.run.config.max_new_tokens, context // 4) <= context
