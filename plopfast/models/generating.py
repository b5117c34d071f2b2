"""Answers of a model to prompts, drawn by transformers' own `generate`.

Prompts of like length share a batch. They are padded on the left, so that each one's next token comes at the end of its row;
a model for which that changes the answers, as it has a state that runs through the padding, gets prompts of one length in a
batch. Of the model's generation_config only the end-of-text tokens count: it may hold somebody's sampling settings, and what
is drawn here should follow from the arguments alone.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..support.errors import ConfigError, DataError, ModelError
from ..support.generate_settings import GenerateSettings
from ..support.progress import bar
from .running import context_length, device_of, evaluating, text_setting

BATCH_TOKENS = (
    8192  # of prompts and answers in a batch: their keys and values are kept (a quarter GiB to 1 GiB, mostly)
)


# given the numbers of a batch's prompts (none: any prompts), what it is run in
Choose = Callable[[Sequence[int]], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Answer:
    """An answer: its text, its tokens without the one that ended it, and whether it ended by itself, not by the limit."""

    text: str
    tokens: tuple[int, ...]
    ended: bool


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 256, temperature: float = 0.0,
    top_p: float = 1.0, seed: int = 0, batch_tokens: int = BATCH_TOKENS, stream: Callable[[str], None] | None = None,
    progress: bool = False, choose: Choose | None = None, kinds: Sequence[Any] = (),
) -> list[Answer]:  # fmt: skip
    """Answers prompts, each a list of tokens, and returns the answers in the order of the prompts.

    At `temperature` 0 each token is the likeliest one; above it tokens are drawn, with `top_p` from the likeliest ones alone,
    by `seed`: the same prompts get the same answers, on the same machine. An answer has at most `max_new_tokens` tokens, and
    no more than the model's context has room for. `batch_tokens` bounds a batch: its rows times its longest prompt and answer.
    `stream` is called with each new piece of text of a single prompt's answer. A batch is run in `choose(its prompts' numbers)`, which
    may give each row an adapter of its own; prompts of one of `kinds` then lie next to each other in it.

    The model, its mode and configurations, and torch's random state are as before afterwards. Raises ConfigError for
    impossible settings, DataError for a prompt that is empty or leaves no room, and ModelError for a model that generates no
    text, or whose logits are not numbers.

    >>> generate(model, tokenizer, [tokenizer("The sky is")["input_ids"]], max_new_tokens=8)[0].text
    ' blue'
    """
    check_sampling(max_new_tokens, temperature, top_p)
    if stream and len(prompts) != 1:
        raise ConfigError(f"stream: expected a single prompt, whose answer is shown as it is made, got {len(prompts)}")
    if not callable(getattr(model, "generate", None)):
        raise ModelError(f"{type(model).__name__} generates no text: load it as a causal language model")
    context = _context_of(model)
    check_room(prompts, context)
    limits = [min(max_new_tokens, (context or math.inf) - len(prompt)) for prompt in prompts]
    device, found = device_of(model), dict[int, Answer]()
    drawing = (
        {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0} if temperature else {}
    )
    choose = choose or (lambda _: contextlib.nullcontext())
    with evaluating(model), _own_random(device, seed), bar("answers", len(prompts), "prompts", progress) as meter:
        maker = _Maker(model, tokenizer, device, {"do_sample": False, **drawing})
        with choose(()):
            mixed = len({*map(len, prompts)}) > 1 and batch_tokens > 1 and maker.pads_left()
        for batch in batches(list(map(len, prompts)), list(map(int, limits)), batch_tokens, mixed):
            if kinds:
                batch.sort(key=lambda i: str(kinds[i]))
            with choose(batch):
                answers = maker.answers([prompts[i] for i in batch], int(limits[batch[0]]), stream)
            found |= zip(batch, answers, strict=True)
            meter.update(len(batch))
    return [found[i] for i in range(len(prompts))]


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises ConfigError for settings that cannot be, or without effect."""
    GenerateSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    if temperature == 0 and top_p != 1:
        raise ConfigError(
            f"top_p {top_p:g}: at temperature 0 nothing is drawn, so it has no effect: give a temperature above 0, or leave it out"
        )


def check_room(prompts: Sequence[Sequence[int]], context: int | None, names: Sequence[str] = ()) -> None:
    """Raises DataError for a prompt without tokens, and one after which the model's context has no room for an answer.

    `names` says where the prompts are from.
    """
    for number, prompt in enumerate(prompts):
        name = names[number] if names else f"prompt {number + 1}"
        if not prompt:
            raise DataError(f"{name}: no tokens; expected one at least")
        if context is not None and 0 < context <= len(prompt):  # -1 is none, too
            raise DataError(
                f"{name}: the prompt has {len(prompt):,} tokens, and the model's context of {context:,} leaves no room for an "
                "answer: shorten it"
            )


def batches(
    lengths: Sequence[int], limits: Sequence[int], batch_tokens: int, mixed: bool = True
) -> Iterator[list[int]]:
    """Yields the numbers of the prompts in each batch, by length. Answers in a batch have one limit; without `mixed`, prompts
    have one length. A prompt that is too long for `batch_tokens` is alone.

    >>> list(batches([9, 2, 3], [5, 5, 5], batch_tokens=16))
    [[1, 2], [0]]
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-limits[i], lengths[i])):
        full = (len(batch) + 1) * (lengths[i] + limits[i]) > batch_tokens
        if batch and (full or limits[i] != limits[batch[0]] or (lengths[i] != lengths[batch[0]] and not mixed)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _context_of(model: nn.Module) -> int | None:
    """The most tokens of prompt and answer together, or None; some configurations say -1 for that."""
    context = context_length(model)
    return context if context and context > 0 else None


@contextlib.contextmanager
def _own_random(device: torch.device, seed: int) -> Iterator[None]:
    """Seeds torch's own draws while it lasts: transformers takes no generator."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Maker:
    """Calls transformers' `generate` for batches."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, drawing: dict[str, Any]) -> None:
        self._model, self._tokenizer, self._device = model, tokenizer, device
        self.ends = ends_of_text(model, tokenizer)
        padding = tokenizer.pad_token_id
        self._padding = padding if padding is not None else min(self.ends, default=0)
        self._drawing = drawing

    def answers(
        self, prompts: Sequence[Sequence[int]], limit: int, stream: Callable[[str], None] | None = None
    ) -> list[Answer]:
        """The answers to prompts, which are one batch."""
        more = {"streamer": _Pieces(self._tokenizer, self.ends, stream)} if stream else {}
        made = self._call(
            prompts, **more, **self._drawing, max_new_tokens=limit, eos_token_id=sorted(self.ends) or None
        )
        return [self._answer(row) for row in made[:, max(map(len, prompts)) :].tolist()]

    def _answer(self, row: list[int]) -> Answer:
        end = next((i for i, token in enumerate(row) if token in self.ends), len(row))
        tokens = row[:end]
        return Answer(text_of(self._tokenizer, tokens), tuple(tokens), end < len(row))

    def pads_left(self) -> bool:
        """Whether padding on the left leaves the next two tokens' logits as they are (the second one comes from the cache); warns where
        it does not."""
        most = min(text_setting(self._model, "vocab_size") or len(self._tokenizer), 256)
        length = min(6, (_context_of(self._model) or 7) - 1)
        short, long = ([(i * 7 + 5) % most for i in range(n)] for n in (max(1, length - 3), length))

        def logits(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
            made = self._call(
                prompts, do_sample=False, max_new_tokens=2, output_logits=True, return_dict_in_generate=True
            )
            return torch.stack([step[0] for step in made.logits]).float()

        alone, padded = logits([short]), logits([short, long])
        if bool((padded - alone).norm() <= (1e-3 if self._model.dtype == torch.float32 else 0.05) * alone.norm()):
            return True
        warnings.warn(
            f"{type(self._model).__name__} answers otherwise after padding on the left: only prompts of one length share a batch, "
            "which is slower",
            stacklevel=4,
        )
        return False

    def _call(self, prompts: Sequence[Sequence[int]], **settings: Any) -> Any:
        from transformers import GenerationConfig
        from transformers.generation import LogitsProcessorList

        longest, pad = max(map(len, prompts)), self._padding
        ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        streamer = {"streamer": settings.pop("streamer")} if "streamer" in settings else {}
        config = GenerationConfig(**settings, use_cache=True, pad_token_id=pad)
        before = self._model.generation_config
        self._model.generation_config = GenerationConfig()  # whose values would take the place of those not given
        try:
            return self._model.generate(
                input_ids=torch.tensor(ids, device=self._device), attention_mask=torch.tensor(mask, device=self._device),
                generation_config=config, logits_processor=LogitsProcessorList([_check_logits]), **streamer,
            )  # fmt: skip
        finally:
            self._model.generation_config = before


def ends_of_text(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation_config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id} - {None}


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of an answer, without special tokens and otherwise as it is."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _check_logits(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if bool(logits.isnan().any()):
        raise ModelError("the model's logits are NaN: its weights are damaged or overflow; try --dtype float32")
    return logits


class _Pieces:
    """A streamer of transformers' `generate`: hands the text of one row on, as far as no further token changes it."""

    def __init__(self, tokenizer: Any, ends: set[int], stream: Callable[[str], None]) -> None:
        self._tokenizer, self._ends, self._stream = tokenizer, ends, stream
        self._tokens: list[int] | None = None  # until the prompt has come
        self._shown = ""

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt at first, and then one token after the other."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += [token for token in value.flatten().tolist() if token not in self._ends]
        text = text_of(self._tokenizer, self._tokens)
        if not text.endswith("\ufffd"):  # else a character whose other bytes are in the next tokens
            self._show(text)

    def end(self) -> None:
        """Shows what is left."""
        self._show(text_of(self._tokenizer, self._tokens or []))

    def _show(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self._stream(text[len(self._shown) :])
            self._shown = text
