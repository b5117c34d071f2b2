"""Settings of evaluation, beside its rows: what else a training must not spoil."""

from dataclasses import dataclass

from .options import Settings, option


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Settings):
    """What is measured before and after training, besides the test rows."""

    title = "evaluation"
    general: str | None = option(
        None,
        "plain text far from the task, UTF-8 .txt, whose loss shows forgetting (default: Python's own help texts)",
        file=True,
    )
    must_keep: str | None = option(
        None,
        "prompts with answers that training must not spoil, refusals too: rows as --train takes them; exit code 1 names what was lost",
        file=True,
    )
