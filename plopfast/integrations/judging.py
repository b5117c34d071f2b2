"""A reward at work: it is called for completions of rows, and what it returns is checked."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..data.tasks import Prompt
from ..models.running import evaluating
from ..support.errors import ConfigError, TrainingError, shown
from .rewards import BuiltIn, Reward

AT_ONCE = 32  # prompts whose completions are computed together


@dataclass(frozen=True)
class Judged:
    """A completion and its reward."""

    text: str
    reward: float


class Judge:
    """Calls a reward for completions of prompts, and checks what it returns.

    Raises ConfigError for what cannot be called with the columns of any row.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.name: str = (
            reward.name if isinstance(reward, BuiltIn) else getattr(reward, "__name__", type(reward).__name__)
        )
        if not callable(reward) or inspect.iscoroutinefunction(reward):
            raise ConfigError(
                f"reward: expected the name of one that is included, or a plain function, got {shown(reward)}"
            )
        if not isinstance(reward, BuiltIn):
            kinds = [one.kind for one in inspect.signature(reward).parameters.values()]
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                raise ConfigError(
                    f"reward: {self.name} must take whatever columns there are: write def {self.name}(completions, **columns)"
                )

    def check(self, row: Mapping[str, Any]) -> None:
        """Raises ValueError for a row that an included reward cannot judge."""
        if isinstance(self.reward, BuiltIn):
            self.reward.check(row)

    def __call__(self, rows: Sequence[Prompt], completions: Sequence[Any], **more: Any) -> list[float | None]:
        """The reward of each completion; None where the function says that it does not apply.

        Raises TrainingError for another number of rewards, and for one that is no finite number.
        """
        names = dict.fromkeys(name for row in rows for name in row.columns)
        columns = {name: [row.columns.get(name) for row in rows] for name in names}
        given = {"prompts": [row.prompt for row in rows], "completions": list(completions)}
        found = list(self.reward(**{**columns, **more, **given}))
        if len(found) != len(rows):
            raise TrainingError(f"the reward {self.name} returned {len(found)} numbers for {len(rows)} completions")
        for value, row in zip(found, rows, strict=True):
            number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            if value is not None and not (isinstance(number, int | float) and math.isfinite(number)):
                raise TrainingError(
                    f"the reward {self.name} returned {shown(value)} for a completion of {row.where}: expected a finite number"
                )
        return [None if value is None else float(value) for value in found]


@torch.no_grad()
def measure(model: Any, tokenizer: Any, rows: Sequence[Prompt], judge: Judge, length: int) -> Iterator[Judged]:
    """Yields the most likely completion (greedy, at most `length` tokens) of each prompt, and its reward.

    A reward that does not apply counts as 0.
    """
    generation = getattr(model, "get_base_model", lambda: model)().generation_config
    ends = generation.eos_token_id
    own = tokenizer.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), own} - {None}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else own
    config = GenerationConfig(
        do_sample=False, max_new_tokens=length, pad_token_id=padding, eos_token_id=sorted(stops) or None
    )
    device = next(model.parameters()).device
    with evaluating(model):
        for begin in range(0, len(rows), AT_ONCE):
            some = rows[begin : begin + AT_ONCE]
            longest = max(len(row.tokens) for row in some)
            ids = [[padding or 0] * (longest - len(row.tokens)) + list(row.tokens) for row in some]
            mask = [[0] * (longest - len(row.tokens)) + [1] * len(row.tokens) for row in some]
            made = model.generate(
                input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
            )[:, longest:]  # fmt: skip
            texts = tokenizer.batch_decode(made, skip_special_tokens=True)
            rewards = judge(some, [as_completion(row, text) for row, text in zip(some, texts, strict=True)])
            yield from (Judged(text, reward or 0.0) for text, reward in zip(texts, rewards, strict=True))


def as_completion(row: Prompt, text: str) -> Any:
    """A completion as a reward gets it: a text, or a message where the prompt is messages."""
    return text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
