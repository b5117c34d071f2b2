"""Rows to tokens, and which of them the model learns."""

from collections.abc import Sequence
from typing import Any

from ..support.errors import DataError
from .rows import Example, _format


def tokenize(
    rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Any, max_length: int | None = None, roles: bool = False
) -> list[Example]:
    """Examples with an end-of-text token after each completion or text. With `roles`, the tokens of messages know theirs.

    Raises DataError for a row longer than `max_length` tokens (nothing is truncated silently).
    """
    examples = []
    for where, row in rows:
        tokens, start, completion = _tokens(where, row, tokenizer)
        if max_length is not None and len(tokens) > max_length:
            part = "prompt" if start >= max_length else "row"
            raise DataError(
                f"{where}: the {part} has {len(tokens)} tokens, the limit is {max_length}: shorten or split it"
            )
        if len(tokens) < 2:
            raise DataError(f"{where}: only {len(tokens)} token; there is nothing to learn from it")
        told = _roles(row, tokens, tokenizer) if roles else None
        examples.append(Example(tuple(tokens), max(start, 1), completion, where, told))
    return examples


def _roles(row: dict[str, Any], tokens: list[int], tokenizer: Any) -> tuple[str, ...] | None:
    """Each token's role: a message's tokens are those that the chat template adds for it, its markup included. None where
    the row is no messages, or the template rewrites earlier ones, so that they cannot be told apart."""
    if _format(row) not in ("chat", "messages"):
        return None
    messages = row["messages"] if _format(row) == "messages" else [*row["prompt"], *row["completion"]]
    roles: list[str] = []
    for number, message in enumerate(messages, 1):
        upto = _template(tokenizer, messages[:number], False)
        if upto != tokens[: len(upto)]:
            return None
        roles += [message["role"]] * (len(upto) - len(roles))
    return tuple(roles)


def _tokens(where: str, row: dict[str, Any], tokenizer: Any) -> tuple[list[int], int, str | None]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    kind = _format(row)
    if kind == "text":
        return [*tokenizer(row["text"])["input_ids"], *end], 0, None
    if kind == "pair":
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        answer = completion_tokens(tokenizer, row["prompt"], row["completion"])
        return [*prompt, *answer, *end], len(prompt), row["completion"]
    messages = row["messages"] if kind == "messages" else [*row["prompt"], *row["completion"]]
    asked = len(messages) - 1 if kind == "messages" else len(row["prompt"])
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: messages need a tokenizer with a chat template; use prompt/completion text")
    try:
        prompt = _template(tokenizer, messages[:asked], True) if asked else []
        whole = _template(tokenizer, messages, False)
    except Exception as error:  # templates are programs of the model's authors, and raise what they like
        raise DataError(f"{where}: the model's chat template refuses this row ({error})") from error
    if whole[: len(prompt)] != prompt:
        raise DataError(f"{where}: the chat template does not keep the prompt as a prefix; use prompt/completion text")
    return whole, len(prompt), None


def _template(tokenizer: Any, messages: list[dict[str, Any]], generate: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def completion_tokens(tokenizer: Any, prompt: str, completion: str) -> list[int]:
    """The completion's tokens as they follow the prompt: taken from the joint text where that keeps the prompt's
    tokens (sentencepiece would add a space to the completion alone), else tokenised on their own."""
    head = list(tokenizer(prompt)["input_ids"])
    whole = list(tokenizer(prompt + completion)["input_ids"])
    if len(whole) > len(head) and whole[: len(head)] == head:
        return whole[len(head) :]
    return list(tokenizer(completion, add_special_tokens=False)["input_ids"])
