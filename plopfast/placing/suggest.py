"""Where adapters belong, in one call: for a script whose trainer is PEFT, TRL or Hugging Face's own."""

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..data.example import Example
from ..data.given import Given, draw
from ..data.labels import tokenize
from ..data.notices import Notices
from ..data.prompts import tokenize_prompts
from ..lora.placement import Placement
from ..models.running import context_length
from ..scoring.report import NFNReport
from ..support import machine, ranks
from ..support.config import DataSettings, PlaceSettings, ScoreSettings
from ..support.errors import ConfigError, ModelError
from .by_settings import check_rule, placed, scored


def suggest(
    model: nn.Module,
    rows: Any,
    tokenizer: Any,
    k: int = 3,
    rank: int = 16,
    *,
    alpha: float = 32.0,
    rule: str = "plop",
    budget: str | None = None,
    score_prompts: int = 200,
    max_length: int | None = None,
    seed: int = 0,
) -> Placement:
    """Scores the model on rows, places adapters, prints what was decided, and returns the placement.

        placement = pf.suggest(model, dataset, tokenizer)
        trainer = SFTTrainer(model, peft_config=placement.lora_config(model), train_dataset=dataset)

    `rows`: a list or a Hugging Face data set of dicts, rows as `read_rows` returns them, or the path of a file that it
    reads. They are of any kind that it knows (prompt and completion as text or messages, messages, instruction and output,
    text), or all of them a `prompt` alone, as for GRPO. At most `score_prompts` of them are drawn with `seed`, and fewer are
    scored where the choice is sure before. Without a length (an IterableDataset) the first ones are taken. Rows of more than
    `max_length` tokens (default: the model's context) are cut from the left of their prompt.

    What is scored is what `plopfast score` scores, with its defaults. `k`, `rank`, `alpha`, `rule` and `budget` are as in
    `place`; `rule` may be module types with commas. It takes forward passes alone, and the model and the tokenizer stay as
    they are: modes, `requires_grad`, hooks, padding side. On several ranks all call it with the same rows.

    Raises DataError for no rows and for rows that cannot be used; ModelError for a model that PEFT has wrapped, for one
    that cannot be scored and for a tokenizer of another model; ConfigError and PlacementError for impossible options.

    >>> placement = pf.suggest(model, rows, tokenizer, k=2, rank=4)
    scored: 16 of 20 rows (prompt and completion as text), ...
    >>> len(placement.types)
    2
    """
    choice: dict[str, Any] = {"k": k, "rank": rank, "rule": rule, "seed": seed}
    scoring = ScoreSettings(score_prompts=score_prompts, **choice)  # checked before anything is read
    placing = PlaceSettings(alpha=alpha, budget=budget, **choice)
    DataSettings(max_length=max_length)
    if _is_wrapped(model):
        raise ModelError(
            "the model has PEFT's adapters, and where they belong is asked of the model without any: give the model from "
            "before get_peft_model, or what peft_model.unload() returns, which drops the adapters"
        )
    if not hasattr(tokenizer, "eos_token_id"):
        raise ConfigError(
            f"tokenizer: expected a Hugging Face tokenizer, got {type(tokenizer).__name__}; of a processor give its .tokenizer"
        )
    check_rule(placing, lambda: model)
    began = time.perf_counter()
    given, notices = draw(rows, score_prompts, seed), Notices()
    limits = [n for n in (max_length, context_length(model)) if n]
    examples = _examples(given, tokenizer, min(limits, default=None), notices)
    _check_numbers(model, examples)
    report = scored(model, examples, scoring)
    placement = placed(report, placing)
    if ranks.is_main() and not machine.launch().rank:  # of a script that has not joined its ranks yet
        read = f"scored: {_read(given, report)}, {time.perf_counter() - began:.1f} s"
        print(*notices.lines(), *report.notes, read, placement, sep="\n", flush=True)
    return placement


def _examples(given: Given, tokenizer: Any, limit: int | None, notices: Notices) -> list[Example]:
    if given.prompts:
        return tokenize_prompts(given.rows, tokenizer, limit, notices)
    return tokenize(given.rows, tokenizer, limit, long="cut", notices=notices)


def _read(given: Given, report: NFNReport) -> str:
    """What was read, in words."""
    of = f"the first {len(given.rows):,} rows" if given.total is None else f"{given.total:,} rows"
    return f"{report.prompts:,} of {of} ({given.kinds}), {report.tokens:,} tokens, forward passes alone"


def _check_numbers(model: nn.Module, examples: Sequence[Example]) -> None:
    """Raises ModelError for tokens that the model's embedding lacks: a GPU would die of one."""
    get = getattr(model, "get_input_embeddings", None)
    rows = getattr(get() if get else None, "num_embeddings", None)
    highest = max(max(example.tokens, default=0) for example in examples)
    if rows is not None and highest >= rows:
        raise ModelError(
            f"the tokenizer gives token {highest}, and the model's embedding has {rows} rows: give the model's own "
            "tokenizer, or model.resize_token_embeddings(len(tokenizer)) first"
        )


def _is_wrapped(model: nn.Module) -> bool:
    """Whether PEFT's modules are in the model. It need not be installed."""
    return any(kind.__module__.startswith("peft.") for module in model.modules() for kind in type(module).__mro__)
