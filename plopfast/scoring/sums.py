"""The running sums of NFN: the norms of a batch's inputs and outputs are added up on the device."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from ..lora.ops import row_norms
from ..models.routed import Route
from ..support import ranks
from ..support.errors import ModelError
from .eva import InputSketch


class NFNState:
    """Sums the token ratios ||W z|| / (||z|| denominator) of each module and prompt, on the device.

    `hook(index, name, bias)` returns a forward hook for a module; `take` is for norms that are known already. `open(counted,
    first)` and `close()` enclose the forward pass of one batch: its prompts are numbered from `first` on, and `counted`
    [rows, tokens] is True for the tokens that count. `sketch`, if given, sees the inputs too. `denominators`: [modules]
    float32.
    """

    def __init__(self, denominators: torch.Tensor, backend: str = "auto", sketch: InputSketch | None = None) -> None:
        self.backend, self.sketch = backend, sketch
        self.scale = 1.0 / denominators  # [modules]
        self.parts: list[tuple[int, torch.Tensor]] = []  # (first, [sums, squares, counts] x modules x rows) of a batch
        self._first = 0
        self._counted = torch.empty(0, 0)
        # layout -> (module, norms of its input and output) of each call in this batch
        self._calls: defaultdict[tuple[int, bool], list[tuple[int, torch.Tensor, torch.Tensor]]] = defaultdict(list)
        self._routed: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []  # (module, rows, ratios, valid)
        self.experts: dict[int, torch.Tensor] = {}  # module -> sums and counts of its experts [2, E] float64
        self._expert_scales: dict[int, torch.Tensor] = {}
        self._input: torch.Tensor | None = None  # the last module's input, and its norms
        self._input_norm = torch.empty(0)

    def hook(self, index: int, name: str, bias: torch.Tensor | None) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            y_norm = row_norms(output, bias, backend=self.backend)  # without the bias: NFN concerns W alone
            self.take(index, name, args[0], y_norm)

        return record

    def take(self, index: int, name: str, x: torch.Tensor, y_norm: torch.Tensor) -> None:
        """Takes the norms ||W x|| [...] of a module's call with the input x [..., n_in]."""
        if x is not self._input:  # q, k, v share one input tensor, and so do gate and up
            self._input, self._input_norm = x, row_norms(x, backend=self.backend)
            if self.sketch is not None:
                counted = self._spread(*self._layout(name, self._input_norm))
                self.sketch.add(name, x, self._input_norm, counted)
        elif self.sketch is not None:
            self.sketch.share(name)
        self._calls[self._layout(name, y_norm)].append((index, self._input_norm, y_norm))

    def of_experts(self, index: int, denominators_E: torch.Tensor) -> None:
        """Says that a module is the weight of so many experts, and what each one's norm is for a random input."""
        self._expert_scales[index] = 1.0 / denominators_E
        self.experts[index] = torch.zeros(2, len(denominators_E), dtype=torch.float64, device=denominators_E.device)

    def take_routed(self, index: int, name: str, x_SK: torch.Tensor, y_norm_S: torch.Tensor, route: Route) -> None:
        """Takes the norms of the weights of experts, for rows that are sorted by expert."""
        rows, tokens = self._counted.shape
        if len(x_SK) % max(rows * tokens, 1) or len(route.tokens) != len(x_SK):
            raise ModelError(
                f"{name}: {len(x_SK)} routed inputs do not fit the batch's {rows} rows x {tokens} tokens, so padding cannot be "
                "told apart: this model lays tokens out in a way of its own, which plopfast does not score"
            )
        x_norm_S, counted_S = row_norms(x_SK, backend=self.backend), self._counted.flatten()[route.tokens]
        valid_S = counted_S & (x_norm_S != 0)  # Llama 4 sets the inputs of other experts to zero
        scale_S = self._expert_scales[index][route.experts]
        ratio_S = torch.where(valid_S, y_norm_S / x_norm_S * scale_S, 0.0)
        self._routed.append((index, route.tokens // tokens, ratio_S, valid_S))
        for total_E, value_S in zip(self.experts[index], (ratio_S, valid_S), strict=True):
            total_E.index_add_(0, route.experts, value_S.double())

    def _layout(self, name: str, norms: torch.Tensor) -> tuple[int, bool]:
        """Returns how a module's norms lie against the batch's [rows, tokens]: (norms per token, tokens innermost)."""
        rows, tokens = self._counted.shape
        shape = norms.shape
        if shape[:2] == (rows, tokens):
            return math.prod(shape[2:]), False
        if shape == (rows * tokens,):
            return 1, False
        if len(shape) == 3 and (shape[0], shape[2]) == (rows, tokens):  # [rows, heads, tokens]
            return shape[1], True
        raise ModelError(
            f"{name}: its inputs {list(shape)} cannot be matched with the batch's {rows} rows x {tokens} tokens, so padding "
            "cannot be told apart: this model lays tokens out in a way of its own, or routes them, which plopfast does not score"
        )

    def _spread(self, extra: int, inner: bool) -> torch.Tensor:
        """Returns `counted` for a module's norms: [rows, tokens * extra]."""
        return self._counted.repeat(1, extra) if inner else self._counted.repeat_interleave(extra, 1)

    def open(self, counted: torch.Tensor, first: int = 0) -> None:
        """Begins a batch."""
        self._counted, self._first = counted, first
        self._calls.clear()
        self._routed.clear()

    def close(self) -> None:
        """Ends a batch: adds its norms to the sums, with one set of operations for all modules of a shape."""
        rows = self._counted.shape[0]
        part = self.scale.new_zeros(3, len(self.scale), rows)
        sums, squares, counts = part
        for layout, calls in self._calls.items():
            counted = self._spread(*layout)
            index = torch.tensor([i for i, _, _ in calls], device=sums.device)
            x_CRT = torch.stack([x_norm.reshape(rows, -1).to(sums.device) for _, x_norm, _ in calls])
            y_CRT = torch.stack([y_norm.reshape(rows, -1).to(sums.device) for _, _, y_norm in calls])
            valid = counted & (x_CRT != 0)  # a zero input has no direction; NaN stays, to be found at the end
            ratio = torch.where(valid, y_CRT / x_CRT * self.scale[index, None, None], 0.0)
            sums.index_add_(0, index, ratio.sum(-1))
            counts.index_add_(0, index, valid.sum(-1, dtype=counts.dtype))
            squares.index_add_(0, index, ratio.square_().sum(-1))
        for i, row_S, ratio_S, valid_S in self._routed:
            sums[i].index_add_(0, row_S, ratio_S)
            counts[i].index_add_(0, row_S, valid_S.to(counts.dtype))
            squares[i].index_add_(0, row_S, ratio_S.square())
        self.parts.append((self._first, part))
        self._input = None

    def table(self, prompts: int) -> torch.Tensor:
        """Returns sums, squares and counts of all ranks' batches: [3, modules, prompts] float64.

        The result does not depend on the number of ranks: each prompt is one rank's, and the others add zeros to it.
        """
        table = torch.zeros(3, len(self.scale), prompts, dtype=torch.float64)
        for first, part in self.parts:
            table[:, :, first : first + part.shape[2]] = part
        return ranks.total(table)
