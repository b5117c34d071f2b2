"""Controls of a score: random tokens, the same words in random order, and a model that has learned nothing.

If a score reflects the task, it changes under them. If it stays the same, it reflects something else.
"""

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ..data.example import Example, Span
from ..models.running import device_of
from ..support import memory
from ..support.errors import ConfigError, DataError, ModelError, first_line


def random_tokens(examples: Sequence[Example], tokenizer: Any, seed: int = 0) -> list[Example]:
    """Returns the rows with every ordinary token replaced by one drawn uniformly from the tokenizer's ordinary tokens.

    Special tokens (begin and end of text, a chat template's marks) stay, so lengths, labels and roles stay too. Raises
    ConfigError without a tokenizer, DataError where all tokens of the tokenizer, or of the rows, are special.
    """
    special = _special(tokenizer)
    ordinary = sorted(set(tokenizer.get_vocab().values()) - special)
    if not ordinary:
        raise DataError("random tokens: none can be drawn, the tokenizer's vocabulary holds special tokens only")
    if all(token in special for example in examples for token in example.tokens):
        raise DataError(f"random tokens: all tokens of the {len(examples)} rows are special, nothing could be replaced")
    rng = random.Random(seed)
    return [replace(e, tokens=tuple(t if t in special else rng.choice(ordinary) for t in e.tokens)) for e in examples]


def shuffled_words(
    examples: Sequence[Example], tokenizer: Any, seed: int = 0, max_length: int | None = None
) -> list[Example]:
    """Returns the rows decoded, with their words in random order, and tokenised again.

    White space separates words. It stays in place, and so do special tokens. A word stays in its part of the row (prompt
    or completion, and role), so token masks keep their meaning. Another order can take more tokens: a row is cut off at
    `max_length`. Raises ConfigError without a tokenizer, DataError where no row has two different words in one part.
    """
    special, rng = _special(tokenizer), random.Random(seed)
    shuffled, changeable = [], False
    for example in examples:
        tokens: list[int] = []
        learned: list[Span] = []
        roles: list[str] = []
        kinds = _kinds(example, special)
        for (labelled, role, is_special), pairs in groupby(zip(kinds, example.tokens, strict=True), itemgetter(0)):
            part = [token for _, token in pairs]
            if not is_special:
                part, several = _shuffled(part, tokenizer, rng)
                changeable |= several
            if labelled and part:
                begin = learned.pop()[0] if learned and learned[-1][1] == len(tokens) else max(len(tokens), 1)
                learned.append((begin, len(tokens) + len(part)))
            tokens += part
            roles += [role] * len(part)
        new = Example(tuple(tokens), tuple(learned), None, None, example.where, tuple(roles) if example.roles else None)
        shuffled.append(new.truncated(max_length or len(tokens)))
    if not changeable:
        raise DataError(
            f"shuffled words: none of the {len(examples)} rows has two different words (white space separates words)"
        )
    return shuffled


def _shuffled(part: list[int], tokenizer: Any, rng: random.Random) -> tuple[list[int], bool]:
    """The tokens of a part of a row with its words in random order, and whether it has two different words."""
    text = tokenizer.decode(part, clean_up_tokenization_spaces=False)
    pieces = re.split(r"(\s+)", text)  # words at even places, white space at odd ones
    words = [word for word in pieces[::2] if word]
    several = len(set(words)) > 1
    rng.shuffle(words)
    pieces[::2] = [words.pop() if word else "" for word in pieces[::2]]
    return list(tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]), several


def _special(tokenizer: Any) -> set[int]:
    if tokenizer is None:
        raise ConfigError("random tokens and shuffled words need the model's tokenizer, got none")
    added = getattr(tokenizer, "added_tokens_decoder", {})  # with the reserved ones, which no setting names
    return set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def _kinds(example: Example, special: set[int]) -> list[tuple[bool, str, bool]]:
    """What each token is: (whether it belongs to the labelled part, its role, whether it is special)."""
    roles = example.roles or ("",) * len(example.tokens)
    learned = example.is_learned()
    if not example.has_prompt:
        learned[0] = True  # the first token of plain text has no label, but belongs with the rest
    return [
        (labelled, role, token in special) for labelled, role, token in zip(learned, roles, example.tokens, strict=True)
    ]


def random_model(model: nn.Module, seed: int = 0) -> nn.Module:
    """Returns a randomly initialised model of the same class, configuration, dtype and device, in evaluation mode.

    torch's generators, the CPU's and the device's, are left as they were. Raises ModelError where transformers cannot
    build the model from `model.config`, or there is no memory for the model's parameters a second time.
    """
    config, device = getattr(model, "config", None), device_of(model)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no transformers configuration to build a random model from")
    import transformers

    need_mib, free_mib = sum(p.nbytes for p in model.parameters()) / 2**20, memory.free_mib(device)
    if need_mib > free_mib:
        raise ModelError(f"a random model takes {need_mib:.0f} MiB, {free_mib:.0f} MiB are free on {device}")
    dtype = next(p.dtype for p in model.parameters())
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(seed)
            random = transformers.AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=False
            )
            return random.eval()
    except Exception as error:  # out of memory, or what the model's own code raises
        raise ModelError(
            f"a random {type(model).__name__} cannot be built: {first_line(error) or type(error).__name__}"
        ) from error
