"""The label loss of a causal language model, without logits for more than a chunk of tokens at a time.

    z = c tanh(m h W^T / c);  loss = sum over label tokens of logsumexp(z) - z[target]
    dh = m (1 - (z / c)^2) (softmax(z) - onehot) W                   m multiplier, c soft cap (infinite: none)

The hidden states at positions whose next token has a label are gathered before the output head is applied. Loss and
gradient are formed together, chunk by chunk, while the logits of the chunk are there. So logits are computed once, and
never held for more than a chunk of tokens (as in Wijmans et al., "Cut Your Losses", arXiv 2411.09009, without its custom
kernel).
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data.rows import IGNORE
from ..lora.layer import LoRALinear
from ..models.frozen import frozen_of
from ..models.running import body, evaluating, output_head, run_for_logits

CHUNK_ELEMENTS = {"cpu": 1 << 25}  # logits held at once: 128 MiB in float32; an eighth of it takes 25 % longer
SHORT_ROW = 128
GPU_CHUNK_ELEMENTS = 1 << 27  # 512 MiB, so that the products stay large


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: z = cap tanh(multiplier (h W^T + bias) / cap)."""

    module: nn.Module
    multiplier: float = 1.0
    cap: float | None = None

    @property
    def weight_VH(self) -> torch.Tensor:
        return frozen_of(self.module).weight_NK

    def logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Returns logits [n, vocabulary] in float32 for hidden states [n, hidden]."""
        z_nV = nn.functional.linear(hidden_nH, self.weight_VH, self.module.bias).float()  # type: ignore[arg-type]
        if self.multiplier != 1.0:
            z_nV *= self.multiplier
        return z_nV if self.cap is None else z_nV.div_(self.cap).tanh_().mul_(self.cap)


def head_of(model: nn.Module) -> Head | None:
    """Returns the model's output head where plopfast knows what happens to its logits, else None."""
    module, config = output_head(model), getattr(model, "config", None)
    if not isinstance(module, nn.Linear) or isinstance(module, LoRALinear):
        return None
    names = ("logit_scale", "lm_head_multiplier", "logits_scaling")  # Cohere's, Falcon-H1's, Granite's
    cohere, falcon, granite = (getattr(config, name, None) or 1.0 for name in names)
    return Head(module, cohere * falcon * (1.0 / granite), getattr(config, "final_logit_softcapping", None))


def positions(labels: torch.Tensor) -> torch.Tensor:
    """Returns where the next token has a label: bool [rows, tokens - 1]."""
    return labels[:, 1:] != IGNORE


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns what the model is run on: all columns but the last. Nothing is predicted from that one, and no token before
    it sees it (it is a twentieth of the work on rows of 20 tokens). Rows are padded on the right, where causal attention
    cannot look, so no mask is needed, and none is built. Packed rows have position_ids that start again, from which
    transformers makes their mask."""
    return {key: batch[key][:, :-1] for key in ("input_ids", "position_ids") if key in batch}


def attention_for(ids: torch.Tensor, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Returns a context for plain products, for short rows in half precision on the CPU; else torch chooses.

    There, torch 2.13's flash attention takes 3 times as long at 40 tokens and 1.5 times at 120, forward and backward (8
    rows of 9 heads of 64, 2 cores).
    """
    short = ids.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and ids.shape[1] <= SHORT_ROW
    return sdpa_kernel(SDPBackend.MATH) if short else contextlib.nullcontext()


class Objective(nn.Module):
    """The summed label loss of a batch. It is a module, so that torch's distributed wrappers can enclose it.

    `chunked` says whether never more than a chunk of logits is held; where it is false, `why` gives the reason.
    """

    def __init__(self, model: nn.Module, *, recomputed: bool = False) -> None:
        super().__init__()
        self.model = model
        self.recomputed = recomputed  # then the backward pass runs blocks too, and must choose the same attention
        self.head = head_of(model)
        self.why = "" if self.head else "the output head is not a plain linear module"
        if self.head and not self._agrees():
            self.head, self.why = None, f"{type(model).__name__} treats its logits in a way that plopfast does not know"

    @property
    def chunked(self) -> bool:
        return self.head is not None

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """Returns the sum over the label tokens of `batch` (as data.collate makes it), 0-d float32. Where the labels have no
        values to read (see estimate.py), "at" gives their places: index tensors of rows and columns."""
        where = batch["at"] if "at" in batch else positions(batch["labels"])
        targets_n = batch["labels"][:, 1:][where]
        ids, dtype = batch["input_ids"], self.model.dtype
        with contextlib.nullcontext() if self.recomputed else attention_for(ids, dtype):  # type: ignore[arg-type]
            if self.head is None:
                logits_nV = run_for_logits(self.model, inputs_of(batch), where)
                return nn.functional.cross_entropy(logits_nV.float(), targets_n, reduction="sum")
            hidden_nH = body(self.model)(**inputs_of(batch), use_cache=False)[0][where]
        tensors: list[Any] = [hidden_nH, self.head.weight_VH, self.head.module.bias]
        if not torch.is_grad_enabled():  # which needs_input_grad does not tell
            tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
        return _ChunkedCrossEntropy.apply(*tensors, targets_n, self.head)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Returns whether body and head, run by hand, give the model's own logits."""
        assert self.head is not None
        weight = self.head.weight_VH
        ids = torch.arange(1, 9, device=weight.device).view(2, 4) % len(weight)
        with evaluating(self.model):
            theirs = self.model(input_ids=ids, use_cache=False).logits.float()
            hidden = body(self.model)(input_ids=ids, use_cache=False)[0]
        if hidden.shape[-1] != weight.shape[1]:
            return False
        ours = self.head.logits(hidden.reshape(-1, hidden.shape[-1])).view_as(theirs)
        tolerance = 1e-5 if weight.dtype == torch.float32 else 0.02
        return bool((ours - theirs).norm() <= tolerance * theirs.norm())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_nH, w_VH, bias_V, targets_n, head: Head):
        need_h, need_w, need_bias = ctx.needs_input_grad[:3]
        dh_nH = torch.empty_like(h_nH) if need_h else None
        dw_VH = torch.zeros_like(w_VH, dtype=torch.float32) if need_w else None
        dbias_V = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias else None
        elements = CHUNK_ELEMENTS.get(h_nH.device.type, GPU_CHUNK_ELEMENTS)
        rows = max(1, elements // w_VH.shape[0])
        total = h_nH.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(h_nH), rows):
            h, targets = h_nH[begin : begin + rows], targets_n[begin : begin + rows, None]
            z = head.logits(h)
            logp = z.log_softmax(-1)
            total -= logp.gather(1, targets).sum()
            if not (need_h or need_w or need_bias):
                continue
            dz = logp.exp_()
            dz.scatter_add_(1, targets, dz.new_full((1, 1), -1.0).expand_as(targets))
            if head.cap is not None:
                dz.mul_(z.div_(head.cap).square_().neg_().add_(1.0))
            if head.multiplier != 1.0:
                dz.mul_(head.multiplier)
            low = dz.to(h.dtype)
            if dh_nH is not None:
                torch.mm(low, w_VH, out=dh_nH[begin : begin + rows])
            if dw_VH is not None:
                dw_VH += low.T @ h
            if dbias_V is not None:
                dbias_V += dz.sum(0)
        ctx.save_for_backward(dh_nH, dw_VH, dbias_V)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total):
        dh_nH, dw_VH, dbias_V = (None if g is None else g * d_total for g in ctx.saved_tensors)
        return dh_nH, dw_VH, dbias_V, None, None
