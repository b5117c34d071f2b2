"""Turns rows into tokens, and marks the tokens that the model learns."""

from collections.abc import Sequence
from typing import Any

from ..support.errors import DataError
from .example import Example
from .rows import format_of


def tokenize(
    rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Any, max_length: int | None = None, roles: bool = False
) -> list[Example]:
    """Turn rows, as `read_jsonl` returns them, into one Example each.

    An end-of-text token follows each completion or text. With `roles`, the tokens of messages also carry their role.
    Nothing is truncated: raises DataError for a row longer than `max_length` tokens, for a row of fewer than two tokens,
    and for messages where the tokenizer's chat template is missing or refuses them.

        examples = tokenize(read_jsonl("train.jsonl"), tokenizer, max_length=model.config.max_position_embeddings)
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
        examples.append(Example.after_prompt(tokens, max(start, 1), completion, where, told, closing=1))
    return examples


def _roles(row: dict[str, Any], tokens: list[int], tokenizer: Any) -> tuple[str, ...] | None:
    """Return the role of each token. A message's tokens are the ones that the chat template adds for it, with its markup.

    None if the row has no messages, or if the template rewrites earlier messages, so that their tokens cannot be told apart.
    """
    if format_of(row) not in ("chat", "messages"):
        return None
    messages = row["messages"] if format_of(row) == "messages" else [*row["prompt"], *row["completion"]]
    roles: list[str] = []
    for number, message in enumerate(messages, 1):
        upto = _template(tokenizer, messages[:number], False)
        if upto != tokens[: len(upto)]:
            return None
        roles += [message["role"]] * (len(upto) - len(roles))
    return tuple(roles)


def _tokens(where: str, row: dict[str, Any], tokenizer: Any) -> tuple[list[int], int, str | None]:
    """Return a row's tokens, where the learned ones start, and its completion if that is plain text."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    kind = format_of(row)
    if kind == "text":
        return [*tokenizer(row["text"])["input_ids"], *end], 0, None
    if kind == "pair":
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        answer = _completion_tokens(tokenizer, row["prompt"], row["completion"])
        return [*prompt, *answer, *end], len(prompt), row["completion"]
    messages = row["messages"] if kind == "messages" else [*row["prompt"], *row["completion"]]
    asked = len(messages) - 1 if kind == "messages" else len(row["prompt"])
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: messages need a tokenizer with a chat template; use prompt/completion text")
    try:
        prompt = _template(tokenizer, messages[:asked], True) if asked else []
        whole = _template(tokenizer, messages, False)
    except Exception as error:  # a template is the model authors' program and can raise anything
        raise DataError(f"{where}: the model's chat template refuses this row ({error})") from error
    if whole[: len(prompt)] != prompt:
        raise DataError(f"{where}: the chat template does not keep the prompt as a prefix; use prompt/completion text")
    return whole, len(prompt), None


def _template(tokenizer: Any, messages: list[dict[str, Any]], generate: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _completion_tokens(tokenizer: Any, prompt: str, completion: str) -> list[int]:
    """Return the completion's tokens as they follow the prompt.

    They come from the joint text if that starts with the prompt's own tokens: sentencepiece would add a space to a
    completion that stands alone. Otherwise the completion is tokenised on its own.
    """
    head = list(tokenizer(prompt)["input_ids"])
    whole = list(tokenizer(prompt + completion)["input_ids"])
    if len(whole) > len(head) and whole[: len(head)] == head:
        return whole[len(head) :]
    return list(tokenizer(completion, add_special_tokens=False)["input_ids"])
