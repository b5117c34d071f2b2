"""Settings of answers: how tokens are drawn, and how many."""

from dataclasses import dataclass

from .options import Settings, option


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How each next token is drawn, in answers and in the completions of reinforcement learning."""

    title = "sampling"
    temperature: float | None = option(
        None,
        "temperature at which tokens are drawn; 0 takes the likeliest one, which only generate does (default: 0 in generate, 1 "
        "in grpo)",
    )


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(Sampling):
    """How answers are made. Raises ConfigError for impossible values."""

    max_new_tokens: int = option(256, "longest answer in tokens", positive=True, free=True)
    top_p: float = option(
        1.0, "draw from the likeliest tokens alone that have this share of the probability together", positive=True,
        most=1, free=True,
    )  # fmt: skip
