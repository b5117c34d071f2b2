"""Normalized Feature Norms, streamed out of plain forward passes.

    NFN(W, z) = ||W z|| / E||W z~||,   z~ = ||z|| g / ||g||,  g ~ N(0, I)

Hayou, Ghosh, Yu, "PLoP", arXiv 2506.20629. The norms are unsquared and leave out the bias. NFN is averaged over tokens
and then, for a module type, over layers. The expectation has the closed form ||z|| ||W||_F / sqrt(n_in), the root of the
exact second moment. On the authors' published models it lies at most 0.2 % per type above the Monte Carlo mean.

Cost above the forward pass: ||z|| once for modules that share an input, ||W||_F once, and ||W z||, which comes out of the
module's own product where Triton runs and from one read of its output elsewhere. There is no gradient, no kept activation,
no further matrix product, and no wait for the device inside the loop. The forward pass itself leaves out the output head,
all that follows the last scored module, the key-value cache and most of the padding.

A scoring reads top to bottom: `score` -> `Scoring.run`; prompts.py prepares the rows, passes.py runs the model, sums.py adds
up the norms, stopping.py decides when there are enough.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..data.batches import group_by_length
from ..lora.layer import every_adapter
from ..models.exclusions import left_out
from ..models.experts import ExpertInfo, weights_of
from ..models.linears import LinearInfo
from ..models.running import body, device_of, evaluating, text_setting
from ..support import ranks
from ..support.errors import ConfigError, DataError, ModelError
from ..support.progress import bar
from .baselines import denominators, expert_denominators
from .eva import InputSketch
from .official import score_official
from .passes import PassEnd, run_pass, scored
from .prompts import Row, rows_of
from .report import ExpertScores, ModuleScore, NFNReport, lonely_note, types_of, unseen_note
from .stopping import Decision, decide, next_look
from .sums import NFNState

WINDOW_ROWS = 256  # rows gathered before they are sorted by length and batched anew
MIN_BATCH_TOKENS = 384


def score(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    tokens: str = "all",
    skip_bos: bool = True,
    include_head: bool = False,
    baseline: str = "closed-form",
    mc_samples: int = 1024,
    seed: int = 0,
    compat: str | None = None,
    confidence: float | None = None,
    k: int = 3,
    inverse: bool = False,
    eva_rank: int | None = None,
    batch_tokens: int | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> NFNReport:
    """Returns the NFN of every linear module in the repeated layers, from forward passes alone (arXiv 2506.20629, eq. 2).

    `batches`: dicts of `input_ids` and `attention_mask` [rows, tokens], as a Hugging Face tokenizer returns them;
    `data.batches_of` makes them from rows. `labels` (-100 on the prompt) are needed where `tokens` is "prompt" or
    "completion". `counted` [rows, tokens] is 0 for tokens to leave out. Padding never counts. Rows are sorted by length
    within windows and batched anew, `batch_tokens` a batch (default: the largest batch that comes, at least 384). On
    several ranks all call it with the same batches, each runs its share, and all get the report of a single process.

    `skip_bos` leaves out a leading beginning-of-text token. `include_head` also runs and scores the output head.
    `baseline`: "closed-form", or "monte-carlo" with `mc_samples` unit vectors for each module, drawn with `seed`.
    `compat="official"` follows the authors' code instead (official.py). `backend`: see `lora_linear`.

    `confidence`: scoring looks after 16, 32, 64, ... prompts and ends once the `k` lowest types (highest, if `inverse`) are
    decided with that confidence (stopping.py). Batches should come in random order. `report.decision` tells how it ended.
    None: every batch is scored. `eva_rank`: the same passes also give that many EVA vectors of each module's inputs
    (`report.eva`, for `inject(init="eva")`), from a sketch drawn with `seed`.

    Raises ModelError for a model without linear modules and for NaN or infinity, naming module, batch and row; DataError
    for batches that cannot be scored; ConfigError for unknown options.

    >>> report = pf.score(model, batches)  # each a dict of input_ids and attention_mask [rows, tokens]
    >>> print(report.table())
    NFN by module type
    module type ...
    """
    options = Options(
        tokens=tokens, skip_bos=skip_bos, include_head=include_head, baseline=baseline, mc_samples=mc_samples, seed=seed,
        compat=compat, confidence=confidence, k=k, inverse=inverse, eva_rank=eva_rank, batch_tokens=batch_tokens,
        backend=backend,
    )  # fmt: skip
    if every_adapter(model):
        raise ModelError("the model has LoRA adapters; NFN is a score of its own weights: unload(model) first")
    began = time.perf_counter()
    with evaluating(model), torch.no_grad(), bar("score", _prompts_of_a_rank(batches), "prompts", progress) as meter:
        if compat:
            report = score_official(model, batches, seed, meter)
        else:
            bos = text_setting(model, "bos_token_id") if skip_bos else None
            report = Scoring(model, options).run(rows_of(batches, tokens, bos), meter)
    report.notes += left_out(model, scored=report.scores)
    report.model, report.seconds = getattr(model, "name_or_path", ""), time.perf_counter() - began
    return report


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `score`, checked. Raises ConfigError for values that cannot be."""

    tokens: str
    skip_bos: bool
    include_head: bool
    baseline: str
    mc_samples: int
    seed: int
    compat: str | None
    confidence: float | None
    k: int
    inverse: bool
    eva_rank: int | None
    batch_tokens: int | None
    backend: str

    def __post_init__(self) -> None:
        if self.tokens not in ("all", "prompt", "completion"):
            raise ConfigError(f"tokens: expected all, prompt or completion, got {self.tokens!r}")
        if self.baseline not in ("closed-form", "monte-carlo"):
            raise ConfigError(f"baseline: expected closed-form or monte-carlo, got {self.baseline!r}")
        if self.compat not in (None, "official"):
            raise ConfigError(f"compat: expected official or nothing, got {self.compat!r}")
        how = (self.tokens, self.skip_bos, self.include_head, self.baseline)
        if self.compat and how != ("all", True, False, "closed-form"):
            raise ConfigError("compat='official' has its own tokens and baseline: leave those options out")
        if self.compat and self.confidence is not None:
            raise ConfigError("compat='official' keeps nothing of single prompts: leave out confidence")
        if self.compat and self.eva_rank is not None:
            raise ConfigError("compat='official' counts padding, EVA does not: leave out compat or eva_rank (init eva)")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise ConfigError(f"confidence: expected a number above 0 and below 1, got {self.confidence}")

    def for_report(self) -> dict[str, Any]:
        """Returns what the report's `settings` keep of the options."""
        kept = ["baseline", "tokens", "skip_bos"]
        if self.confidence is not None:
            kept += ["confidence", "k"]
        if self.eva_rank is not None:
            kept += ["eva_rank", "seed"]
        if self.baseline == "monte-carlo":
            kept += ["mc_samples", "seed"]
        return {name: getattr(self, name) for name in kept}


def _prompts_of_a_rank(batches: Iterable[Mapping[str, Any]]) -> int | None:
    """How many prompts this rank scores at most, for the progress bar; None where that is not known."""
    known: Any = batches if isinstance(batches, list) else ()
    prompts = sum(len(batch.get("input_ids", ())) for batch in known)
    return -(-prompts // ranks.size()) if prompts else None


class Scoring:
    """One scoring: window after window of rows, until they end or the k types are decided."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.options, self.device = options, device_of(model)
        self.infos = weights_of(model, options.include_head)
        linears = [info for info in self.infos if isinstance(info, LinearInfo)]
        experts = [info for info in self.infos if isinstance(info, ExpertInfo)]
        self.sketch = None if options.eva_rank is None else InputSketch(options.eva_rank, linears, options.seed)
        how = options.baseline, options.mc_samples, options.seed
        below = denominators(linears, *how).to(self.device)
        self.state = NFNState(torch.cat([below, below.new_ones(len(experts))]), options.backend, self.sketch)
        for index, info in enumerate(experts, len(linears)):
            self.state.of_experts(index, expert_denominators(info, *how).to(self.device))
        self.end = PassEnd(model, len(self.infos))
        self.runner = model if options.include_head else body(model)
        self.without_cache = {"use_cache": False} if hasattr(model, "config") else {}
        self.order: list[Row] = []  # the rows scored so far, in the order in which they were run
        self.tokens = 0
        self.looks: list[int] = []
        self.decision: Decision | None = None

    def run(self, rows: Iterator[Row], meter: Any) -> NFNReport:
        with scored(self.infos, self.state, self.end):
            while window := list(islice(rows, self._window_size())):
                self._forward(window, meter)
                if self._look_says_stop():
                    break
        return self._report()

    def _window_size(self) -> int:
        """A window ends at the next look, if any."""
        if self.options.confidence is None:
            return WINDOW_ROWS
        return min(WINDOW_ROWS, next_look(len(self.order)) - len(self.order))

    def _forward(self, window: Sequence[Row], meter: Any) -> None:
        """Runs a window of rows, batched anew by length."""
        budget = self.options.batch_tokens or max(MIN_BATCH_TOKENS, max(row.room for row in window))
        groups = group_by_length([len(row.tokens) for row in window], budget)
        begins = [len(self.order) + n for n in accumulate(map(len, groups), initial=0)]
        self.order += [window[i] for group in groups for i in group]
        self.tokens += sum(int(row.counted.sum()) for row in window)  # still on the CPU
        for index, mine in ranks.share(len(groups)):
            rows = self.order[begins[index] : begins[index + 1]]
            ids = pad_sequence([row.tokens for row in rows], batch_first=True)
            mask = pad_sequence([torch.ones_like(row.tokens) for row in rows], batch_first=True)
            counted = pad_sequence([row.counted for row in rows], batch_first=True)
            self.state.open(counted.to(self.device) & mine, begins[index])
            self.end.open()
            there = self.device
            run_pass(self.runner, input_ids=ids.to(there), attention_mask=mask.to(there), **self.without_cache)
            self.end.close()
            self.state.close()
            meter.update(len(rows))

    def _look_says_stop(self) -> bool:
        """Looks at the scores so far, if it is time for that; True where scoring can end."""
        prompts = len(self.order)
        if self.options.confidence is None or prompts != next_look(prompts - 1):
            return False
        stats = self._as_they_came(self.state.table(prompts))
        # where a value is not finite, the report names the module and the row
        return not bool(stats.isfinite().all()) or self._decide(stats).decided

    def _decide(self, stats: torch.Tensor) -> Decision:
        how = self.options
        assert how.confidence is not None
        self.looks.append(len(self.order))
        seen = seen_in(stats[1])
        types = types_of([self.infos[i] for i in seen])
        self.decision = decide(stats[:, seen], types, how.k, how.confidence, self.looks, how.inverse)
        return self.decision

    def _as_they_came(self, table: torch.Tensor) -> torch.Tensor:
        """Sums and counts [2, modules, prompts] of a table [3, modules, prompts], prompts in their order of arrival."""
        return table[[0, 2]][:, :, torch.tensor([row.number for row in self.order]).argsort()]

    def _report(self) -> NFNReport:
        if not self.tokens:
            raise DataError("there is no token to score: the batches are empty, or the options leave every token out")
        if self.sketch and self.tokens < self.sketch.rank:
            raise DataError(
                f"eva_rank {self.sketch.rank}: expected at most {self.tokens}, the tokens scored; score more prompts"
            )
        prompts = len(self.order)
        table = self.state.table(prompts)
        stats, scores = self._as_they_came(table), _module_scores(table, self.infos, self.order)
        seen = seen_in(stats[1])
        if self.options.confidence is not None and self.looks[-1:] != [prompts]:
            self._decide(stats)  # the rows ended before the next look
        settings = self.options.for_report()
        report = NFNReport(scores, self.tokens, prompts, 0.0, settings=settings, prompt_stats=stats[:, seen])
        report.decision = self.decision
        report.notes += unseen_note([info for i, info in enumerate(self.infos) if i not in set(seen)])
        report.experts = {self.infos[i].name: _of_each(table) for i, table in self.state.experts.items() if i in seen}
        report.notes += lonely_note(report)
        if self.sketch:
            report.eva, report.eva_ratios = self.sketch.vectors()
        return report


def _of_each(table: torch.Tensor) -> ExpertScores:
    """The scores of a layer's experts, of their sums and counts [2, E] on this rank."""
    sums, counts = ranks.total(table.cpu()).tolist()
    return ExpertScores([s / n if n else None for s, n in zip(sums, counts, strict=True)], [int(n) for n in counts])


def seen_in(counts: torch.Tensor) -> list[int]:
    """The modules that saw a token, of the counts [modules, prompts]."""
    return counts.any(1).nonzero().flatten().tolist()


def _module_scores(
    table: torch.Tensor, infos: Sequence[LinearInfo | ExpertInfo], order: Sequence[Row]
) -> dict[str, ModuleScore]:
    """The scores of a table [3, modules, prompts], of the modules that saw a token. Raises ModelError for NaN and infinity,
    and where no module saw one."""
    sums, squares, counts = table
    squares, counts = squares.sum(1), counts.sum(1)
    bad = (~sums.isfinite()).nonzero()
    if len(bad):
        module, prompt = bad[0].tolist()
        raise ModelError(
            f"{infos[module].name}: NaN or infinity in batch {order[prompt].batch}, row {order[prompt].row} (the first "
            f"module of {len(set(bad[:, 0].tolist()))} affected); try dtype bfloat16 or float32, or leave the row out"
        )
    seen = seen_in(table[2])
    if not seen:
        raise ModelError(f"{infos[0].name}: never saw a token that counts, and nor did any other linear module")
    result = {}
    for i, info in ((i, infos[i]) for i in seen):
        mean = float(sums[i].sum() / counts[i])
        std = math.sqrt(max(0.0, float(squares[i] / counts[i]) - mean**2))
        shape = info.n_in, info.n_out, getattr(info, "experts", 1)
        result[info.name] = ModuleScore(mean, std, int(counts[i]), info.type, info.layer, *shape)
    return result
