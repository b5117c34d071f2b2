"""Settings of reinforcement learning, and which rewards are code."""

from dataclasses import dataclass

from .errors import ConfigError
from .generate_settings import Sampling
from .options import option

LR = 2e-4  # where nobody chose one: that of supervised training, 1e-3, destroys models here
BUILT_IN = ("exact", "number", "regex", "json")  # the rewards of integrations/rewards.py


def names_code(reward: str | None) -> bool:
    """Whether a reward is `module:function` or `file.py:function`, which a settings file alone must not run.

    >>> names_code("number:0.01"), names_code("scoring.py:grade")
    (False, True)
    """
    return reward is not None and reward.partition(":")[0] not in BUILT_IN


def drawn_at(temperature: float | None) -> float:
    """The temperature at which completions are drawn. Raises ConfigError for 0, at which those of a prompt are all alike."""
    if temperature == 0:
        raise ConfigError(
            "temperature: expected a number above 0, got 0: completions of a prompt are compared, and would all be alike"
        )
    return 1.0 if temperature is None else temperature


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(Sampling):
    """How completions are drawn and rewarded. Raises ConfigError for impossible values."""

    title = "reinforcement learning"
    reward: str | None = option(
        None,
        "what completions are rewarded for: exact, number[:TOLERANCE], regex:PATTERN, json:SCHEMA.json, or your function, "
        "FILE.py:FUNCTION or MODULE:FUNCTION (that only on the command line, never in a settings file alone)",
    )
    generations: int = option(8, "completions of each prompt, whose rewards are compared; two at least", positive=True)
    prompts: int = option(4, "prompts in a step", positive=True)
    completion_length: int = option(256, "longest completion in tokens", positive=True)
    beta: float = option(0.0, "weight of the KL divergence from the base model; 0: not computed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generations < 2:
            raise ConfigError(
                "generations: expected two at least, got 1: a completion is rewarded by comparison with others of its prompt"
            )
