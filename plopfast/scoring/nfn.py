"""Normalized Feature Norms, streamed out of plain forward passes.

    NFN(W, z) = ||W z|| / E||W z~||,   z~ = ||z|| g / ||g||,  g ~ N(0, I)

Hayou, Ghosh, Yu, "PLoP", arXiv 2506.20629. Unsquared norms, without the bias, averaged over tokens and then, for a
module type, over layers. The expectation has the closed form ||z|| ||W||_F / sqrt(n_in), the root of the exact second
moment, which lies at most 0.2 % per type above the Monte Carlo mean on the authors' published models.

Cost above the forward pass: one read of each output, ||z|| once per shared input, ||W||_F once. No gradient, no kept
activation, no further matrix product, no wait for the device inside the loop; and the output head, the key-value cache
and most of the padding of the forward pass itself are left out.
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
from ..data.rows import IGNORE
from ..lora.layer import adapters
from ..lora.ops import row_norms
from ..models.frozen import whole
from ..models.linears import LinearInfo, linear_modules
from ..models.running import body, device_of
from ..support import ranks
from ..support.errors import ConfigError, DataError, ModelError
from ..support.progress import bar
from .eva import InputSketch
from .hooks import _hooked
from .official import _score_official
from .report import ModuleScore, NFNReport, types_of
from .stopping import decide, next_look

WINDOW_ROWS = 256  # rows gathered before they are sorted by length and batched anew
MIN_BATCH_TOKENS = 384


class NFNState:
    """Running sums of the token ratios ||W z|| / (||z|| denominator), per module and prompt, on the device.

    `hook(index, name, bias)` is put on a module; `open(counted, first)` and `close()` enclose the forward pass of one batch
    of the prompts from number `first` on, where `counted` [rows, tokens] is True for the tokens that count. `sketch`, if
    given, takes the inputs too.
    """

    def __init__(self, denominators: torch.Tensor, backend: str = "auto", sketch: InputSketch | None = None) -> None:
        self.backend, self.sketch = backend, sketch
        self.scale = 1.0 / denominators  # [modules]
        self.parts: list[tuple[int, torch.Tensor]] = []  # (first, [sums, squares, counts] x modules x rows) of a batch
        self._first = 0
        self._counted: torch.Tensor | None = None
        self._calls: list[tuple[int, torch.Tensor, torch.Tensor, int, bool]] = []
        self._input: torch.Tensor | None = None  # the last module's input, and its norms
        self._input_norm = torch.empty(0)

    def hook(self, index: int, name: str, bias: torch.Tensor | None) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            x = args[0]
            if x is not self._input:  # q, k, v share one input tensor, and so do gate and up
                self._input, self._input_norm = x, row_norms(x, backend=self.backend)
                if self.sketch is not None:
                    counted = self._spread(*self._layout(name, self._input_norm))
                    self.sketch.add(name, x, self._input_norm, counted)
            elif self.sketch is not None:
                self.sketch.share(name)
            y_norm = row_norms(output, bias, backend=self.backend)  # without the bias: NFN concerns W alone
            self._calls.append((index, self._input_norm, y_norm, *self._layout(name, y_norm)))

        return record

    def _layout(self, name: str, norms: torch.Tensor) -> tuple[int, bool]:
        """How a module's rows lie against the batch's [rows, tokens]: (norms per token, tokens innermost)."""
        assert self._counted is not None
        rows, tokens = self._counted.shape
        shape = norms.shape
        if shape[:2] == (rows, tokens):
            return math.prod(shape[2:]), False
        if shape == (rows * tokens,):
            return 1, False
        if len(shape) == 3 and (shape[0], shape[2]) == (rows, tokens):  # [rows, heads, tokens]
            return shape[1], True
        raise ModelError(
            f"{name}: its inputs {list(shape)} cannot be matched with the batch's {rows} rows x {tokens} tokens, so "
            "padding cannot be told apart (routed experts are not supported yet)"
        )

    def _spread(self, extra: int, inner: bool) -> torch.Tensor:
        """`counted` for a module's rows: [rows, tokens * extra]."""
        assert self._counted is not None
        return self._counted.repeat(1, extra) if inner else self._counted.repeat_interleave(extra, 1)

    def open(self, counted: torch.Tensor, first: int = 0) -> None:
        self._counted, self._first = counted, first
        self._calls = []

    def close(self) -> None:
        """Folds the batch's norms into the sums: one set of operations for all modules of a shape."""
        assert self._counted is not None
        rows = self._counted.shape[0]
        part = self.scale.new_zeros(3, len(self.scale), rows)
        sums, squares, counts = part
        groups: dict[tuple[int, bool], list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        for i, x_norm, y_norm, extra, inner in self._calls:
            groups.setdefault((extra, inner), []).append((i, x_norm.reshape(rows, -1), y_norm.reshape(rows, -1)))
        for (extra, inner), calls in groups.items():
            counted = self._spread(extra, inner)
            index = torch.tensor([call[0] for call in calls], device=self.scale.device)
            x_CRT = torch.stack([call[1].to(sums.device) for call in calls])
            y_CRT = torch.stack([call[2].to(sums.device) for call in calls])
            valid = counted & (x_CRT != 0)  # a zero input has no direction; NaN stays valid, to be found at the end
            ratio = torch.where(valid, y_CRT / x_CRT * self.scale[index, None, None], 0.0)
            sums.index_add_(0, index, ratio.sum(-1))
            counts.index_add_(0, index, valid.sum(-1, dtype=counts.dtype))
            squares.index_add_(0, index, ratio.square_().sum(-1))
        self.parts.append((self._first, part))
        self._counted = self._input = None
        self._calls = []

    def table(self, prompts: int) -> torch.Tensor:
        """Sums, squares and counts of all ranks' batches: [3, modules, prompts] float64. A prompt is one rank's alone, so
        that the others only add zeros to it, and the result does not depend on the number of ranks."""
        table = torch.zeros(3, len(self.scale), prompts, dtype=torch.float64)
        for first, part in self.parts:
            table[:, :, first : first + part.shape[2]] = part
        return ranks.total(table)


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
    """NFN of every linear module in the repeated layers, from forward passes alone (arXiv 2506.20629, equation 2).

    `batches`: dicts as a Hugging Face tokenizer returns them: `input_ids` and `attention_mask` [rows, tokens], with
    `labels` (-100 on the prompt) where `tokens` is "prompt" or "completion", and `counted` [rows, tokens] (0 for tokens to
    leave out; `data.batches_of` makes it) where only some are to count. Padding never counts; rows are batched anew by
    length within windows, `batch_tokens` a batch (default: the largest batch that comes, at least 384). On several ranks
    (all of them call it, with the same batches) each runs its share, and all get the same report as one process.

    `skip_bos` leaves out a leading beginning-of-text token. `include_head` also runs and scores the output head.
    `baseline`: "closed-form", or "monte-carlo" with `mc_samples` seeded draws of a unit vector for each module (its
    mean does not depend on z). `compat="official"` follows the authors' code instead: see `_score_official`. `backend`:
    what takes the norms, as in `lora_linear`.

    `confidence`: scoring ends at the first look, after 16, 32, 64, ... prompts, at which the `k` lowest types (highest, if
    `inverse`) are decided with that confidence (see confidence.py); the batches should come in random order, and
    `report.decision` tells how it ended. None: every batch is scored.

    `eva_rank`: also take that many EVA vectors of each module's inputs from the same passes (`report.eva`, for
    `inject(init="eva")`); `seed` draws their sketch.

    Raises ModelError for a model without linear modules and for NaN or infinity, naming module, batch and row; DataError
    for batches that cannot be scored; ConfigError for unknown options.
    """
    if tokens not in ("all", "prompt", "completion"):
        raise ConfigError(f"tokens: expected all, prompt or completion, got {tokens!r}")
    if baseline not in ("closed-form", "monte-carlo"):
        raise ConfigError(f"baseline: expected closed-form or monte-carlo, got {baseline!r}")
    if compat not in (None, "official"):
        raise ConfigError(f"compat: expected official or nothing, got {compat!r}")
    if compat and (tokens, skip_bos, include_head, baseline) != ("all", True, False, "closed-form"):
        raise ConfigError("compat='official' has its own tokens and baseline: leave those options out")
    if compat and confidence is not None:
        raise ConfigError("compat='official' keeps nothing of single prompts: leave out confidence")
    if confidence is not None and not 0 < confidence < 1:
        raise ConfigError(f"confidence: expected a number above 0 and below 1, got {confidence}")
    if compat and eva_rank is not None:
        raise ConfigError("compat='official' counts padding, EVA does not: leave out compat, or eva_rank (init 'eva')")
    if adapters(model):
        raise ModelError("the model has LoRA adapters; NFN is a score of its own weights: unload(model) first")
    began = time.perf_counter()
    training = model.training
    model.eval()
    try:
        known: Any = batches if isinstance(batches, list) else ()
        prompts = sum(len(batch.get("input_ids", ())) for batch in known) or None
        with torch.no_grad(), bar("score", prompts and -(-prompts // ranks.size()), "prompts", progress) as meter:
            if compat == "official":
                report = _score_official(model, batches, seed, meter)
            else:
                bos = getattr(getattr(model, "config", None), "bos_token_id", None) if skip_bos else None
                rows = _rows(batches, tokens, bos)
                denominators = _closed_form if baseline == "closed-form" else _monte_carlo(mc_samples, seed)
                eva = None if eva_rank is None else (eva_rank, seed)
                stop = None if confidence is None else Stop(k, confidence, inverse)
                report = _score(model, rows, denominators, include_head, batch_tokens, backend, meter, eva, stop)
                report.settings = {"baseline": baseline, "tokens": tokens, "skip_bos": skip_bos}
                if stop:
                    report.settings |= {"confidence": confidence, "k": k}
                if eva:
                    report.settings |= {"eva_rank": eva_rank, "seed": seed}
                if baseline == "monte-carlo":
                    report.settings |= {"mc_samples": mc_samples, "seed": seed}
    finally:
        model.train(training)
    report.model = getattr(model, "name_or_path", "")
    report.seconds = time.perf_counter() - began
    return report


@dataclass(frozen=True)
class _Row:
    tokens: torch.Tensor  # [tokens] int64, without padding
    counted: torch.Tensor  # [tokens] bool
    number: int  # as it came
    batch: int
    row: int
    room: int  # padded size of the batch it came in


@dataclass(frozen=True)
class Stop:
    """When scoring may end before its rows do: see `decide`."""

    k: int
    confidence: float
    inverse: bool


def _rows(batches: Iterable[Mapping[str, Any]], which: str, bos: int | None) -> Iterator[_Row]:
    number = 0
    for index, batch in enumerate(batches):
        unknown = set(batch) - {"input_ids", "attention_mask", "labels", "counted", "token_type_ids"}
        if unknown or "input_ids" not in batch:
            raise DataError(f"batch {index}: expected input_ids, attention_mask and labels, got {sorted(batch)}")
        if which != "all" and "labels" not in batch:
            raise DataError(f"batch {index}: scoring {which} tokens needs labels (-100 on the prompt)")
        ids = [torch.as_tensor(row).cpu() for row in batch["input_ids"]]
        masks = [
            torch.as_tensor(row).cpu().bool() for row in batch.get("attention_mask", [torch.ones_like(i) for i in ids])
        ]
        room = sum(len(row) for row in ids)
        for row, (tokens, mask) in enumerate(zip(ids, masks, strict=True)):
            counted = torch.ones_like(tokens, dtype=torch.bool)
            if "counted" in batch:
                counted = torch.as_tensor(batch["counted"][row]).cpu().bool()
            if which != "all":
                counted = counted & ((torch.as_tensor(batch["labels"][row]).cpu() != IGNORE) == (which == "completion"))
            tokens, counted = tokens[mask], counted[mask]
            if bos is not None and len(tokens) and tokens[0] == bos:
                counted[0] = False
            if counted.any():
                yield _Row(tokens, counted, number, index, row, room)
                number += 1


def _score(
    model: nn.Module,
    rows: Iterator[_Row],
    denominators: Any,
    include_head: bool,
    batch_tokens: int | None,
    backend: str,
    meter: Any,
    eva: tuple[int, int] | None = None,
    stop: Stop | None = None,
) -> NFNReport:
    infos = linear_modules(model, include_head)
    device = device_of(model)
    sketch = InputSketch(eva[0], infos, eva[1]) if eva else None
    state = NFNState(_checked(denominators(infos), infos).to(device), backend, sketch)
    runner = model if include_head else body(model)
    options = {"use_cache": False} if hasattr(model, "config") else {}
    hooks = [state.hook(i, info.name, whole(getattr(info.module, "bias", None))) for i, info in enumerate(infos)]
    types = types_of(infos)
    order: list[_Row] = []
    looks: list[int] = []
    decision = None
    tokens = 0

    def window_of_rows() -> list[_Row]:
        return list(islice(rows, min(WINDOW_ROWS, next_look(len(order)) - len(order)) if stop else WINDOW_ROWS))

    with _hooked(infos, hooks):
        while window := window_of_rows():
            budget = batch_tokens or max(MIN_BATCH_TOKENS, max(row.room for row in window))
            groups = group_by_length([len(row.tokens) for row in window], budget)
            begins = [len(order) + n for n in accumulate(map(len, groups), initial=0)]
            order += [window[i] for group in groups for i in group]
            tokens += sum(int(row.counted.sum()) for row in window)  # still on the CPU
            for index, mine in ranks.share(len(groups)):
                chosen = order[begins[index] : begins[index + 1]]
                ids = pad_sequence([row.tokens for row in chosen], batch_first=True)
                mask = pad_sequence([torch.ones_like(row.tokens) for row in chosen], batch_first=True)
                counted = pad_sequence([row.counted for row in chosen], batch_first=True)
                state.open(counted.to(device) & mine, begins[index])
                runner(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
                state.close()
                meter.update(len(chosen))
            if stop and len(order) == next_look(len(order) - 1):
                looks.append(len(order))
                stats = _as_they_came(state.table(len(order)), order)
                if not stats.isfinite().all():
                    break  # _collect names the module and the row
                decision = decide(stats, types, stop.k, stop.confidence, looks, stop.inverse)
                if decision.decided:
                    break
    if not tokens:
        raise DataError("there is no token to score: the batches are empty, or the options leave every token out")
    if sketch and tokens < sketch.rank:
        raise DataError(f"eva_rank {sketch.rank}: expected at most {tokens}, the tokens scored; score more prompts")
    table = state.table(len(order))
    stats = _as_they_came(table, order)
    report = NFNReport(_collect(table, infos, order), tokens, len(order), 0.0, prompt_stats=stats)
    if stop and looks[-1:] != [len(order)]:
        decision = decide(stats, types, stop.k, stop.confidence, [*looks, len(order)], stop.inverse)
    report.decision = decision
    if sketch:
        report.eva, report.eva_ratios = sketch.vectors()
    return report


def _closed_form(infos: Sequence[LinearInfo]) -> torch.Tensor:
    """||W||_F / sqrt(n_in) for each module: E||W u|| of a random unit vector u, up to the gap in nfn's docstring."""
    first = infos[0].frozen.device
    return torch.stack([i.frozen.frobenius().to(first) / i.n_in**0.5 for i in infos])


def _monte_carlo(samples: int, seed: int) -> Any:
    def denominators(infos: Sequence[LinearInfo]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([_mean_random_norm(info, samples, generator) for info in infos])

    return denominators


def _mean_random_norm(info: LinearInfo, samples: int, generator: torch.Generator) -> torch.Tensor:
    g = torch.randn(samples, info.n_in, generator=generator)  # on the CPU: the same draws on every device
    w_NK = info.frozen.dequantize()
    unit = (g / g.norm(dim=1, keepdim=True)).to(w_NK.device)
    return (unit @ w_NK.float().T).norm(dim=1).mean().cpu()


def _checked(denominators: torch.Tensor, infos: Sequence[LinearInfo]) -> torch.Tensor:
    for info, value in zip(infos, denominators.tolist(), strict=True):
        if not math.isfinite(value):
            raise ModelError(f"{info.name}: the weight holds NaN or infinity; is the model file damaged?")
        if value == 0:
            raise ModelError(f"{info.name}: the weight is all zeros; was the model initialised?")
    return denominators


def _as_they_came(table: torch.Tensor, order: Sequence[_Row]) -> torch.Tensor:
    """Sums and counts [2, modules, prompts] of a table [3, modules, prompts] whose prompts lie in `order`."""
    return table[[0, 2]][:, :, torch.tensor([row.number for row in order]).argsort()]


def _collect(table: torch.Tensor, infos: Sequence[LinearInfo], order: Sequence[_Row]) -> dict[str, ModuleScore]:
    sums, squares, counts = table  # [modules, prompts] each
    squares, counts = squares.sum(1), counts.sum(1)
    bad = (~sums.isfinite()).nonzero()
    if len(bad):
        module, prompt = bad[0].tolist()
        raise ModelError(
            f"{infos[module].name}: NaN or infinity in batch {order[prompt].batch}, row {order[prompt].row} (the first "
            f"module of {len(set(bad[:, 0].tolist()))} affected); try dtype bfloat16 or float32, or leave the row out"
        )
    result = {}
    for i, info in enumerate(infos):
        if not counts[i]:
            raise ModelError(f"{info.name}: never saw a token that counts; is the module unused in the forward pass?")
        mean = float(sums[i].sum() / counts[i])
        std = math.sqrt(max(0.0, float(squares[i] / counts[i]) - mean**2))
        result[info.name] = ModuleScore(mean, std, int(counts[i]), info.type, info.layer, info.n_in, info.n_out)
    return result
