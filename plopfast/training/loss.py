"""The label loss of a causal language model, without logits for more than a chunk of tokens at a time.

The hidden states at positions whose next token has a label are gathered before the output head is applied;
models/cross_entropy.py takes them chunk by chunk.
"""

import contextlib
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data.rows import IGNORE
from ..lora.layer import LoRALinear
from ..lora.many import ManyLoRA
from ..models.cross_entropy import chunked_cross_entropy
from ..models.frozen import frozen_of
from ..models.quantized import QuantizedLinear
from ..models.running import body, evaluating, first_logits, output_head, run_for_logits

SHORT_ROW = 128


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: z = cap tanh(multiplier (h W^T + bias) / cap)."""

    module: nn.Module
    multiplier: float = 1.0
    cap: float | None = None

    @property
    def weight_VH(self) -> Any:
        return frozen_of(self.module).weight_NK

    @property
    def bias_V(self) -> torch.Tensor | None:
        return cast(torch.Tensor | None, self.module.bias)

    def logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Returns logits [n, vocabulary] in float32 for hidden states [n, hidden]."""
        z_nV = self.module(hidden_nH).float()
        if self.multiplier != 1.0:
            z_nV *= self.multiplier
        return z_nV if self.cap is None else z_nV.div_(self.cap).tanh_().mul_(self.cap)


def head_of(model: nn.Module) -> Head | None:
    """Returns the model's output head where plopfast knows what happens to its logits, else None."""
    module, config = output_head(model), getattr(model, "config", None)
    if isinstance(module, LoRALinear) or not isinstance(module, nn.Linear | QuantizedLinear):
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

    `chunked` says whether never more than a chunk of logits is held; where it is false, `why` gives the reason. It is found
    out by running the model; a model without values cannot be run, and takes the reason of another of its family, or "".
    """

    def __init__(self, model: nn.Module, *, recomputed: bool = False, why: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.recomputed = recomputed  # then the backward pass runs blocks too, and must choose the same attention
        self.head = head_of(model)
        self.why = "" if self.head else "the output head is not a plain linear module"
        if self.head and why:
            self.head, self.why = None, why
        elif why is None and not self._agrees(*first_logits(model)):
            self.head, self.why = None, f"{type(model).__name__} treats its logits in a way that plopfast does not know"

    @property
    def chunked(self) -> bool:
        return self.head is not None

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """Returns the sum over the label tokens of `batch` (as data.collate makes it), 0-d float32. Where the labels have no
        values to read (see estimate.py), "at" gives their places: index tensors of rows and columns. "parts", numbers of label
        tokens that follow one another in row order, gives the sum of each instead [parts]."""
        where = batch["at"] if "at" in batch else positions(batch["labels"])
        targets_n = batch["labels"][:, 1:][where]
        ids, dtype, parts = batch["input_ids"], self.model.dtype, batch.get("parts")
        with contextlib.nullcontext() if self.recomputed else attention_for(ids, dtype):  # type: ignore[arg-type]
            if self.head is None:
                # which adapter a token takes is known of whole rows alone
                if isinstance(output_head(self.model), ManyLoRA):
                    logits_nV = self.model(**inputs_of(batch), use_cache=False).logits[where]
                else:
                    logits_nV = run_for_logits(self.model, inputs_of(batch), where)
                if parts is None:
                    return nn.functional.cross_entropy(logits_nV.float(), targets_n, reduction="sum")
                losses_n = nn.functional.cross_entropy(logits_nV.float(), targets_n, reduction="none")
                return torch.stack([part.sum() for part in losses_n.split(parts)])
            hidden_nH = body(self.model)(**inputs_of(batch), use_cache=False)[0][where]
        head = self.head
        return chunked_cross_entropy(
            hidden_nH, head.weight_VH, targets_n, head.bias_V, multiplier=head.multiplier, cap=head.cap, parts=parts
        )

    @torch.no_grad()
    def _agrees(self, ids: torch.Tensor, theirs: torch.Tensor) -> bool:
        """Returns whether body and head, run by hand, give the model's own logits; True where there is no head to compare."""
        if self.head is None:
            return True
        weight = self.head.weight_VH
        with evaluating(self.model):
            hidden = body(self.model)(input_ids=ids, use_cache=False)[0]
        if hidden.shape[-1] != weight.shape[1]:
            return False
        ours = self.head.logits(hidden.reshape(-1, hidden.shape[-1])).view_as(theirs)
        tolerance = 1e-5 if weight.dtype == torch.float32 else 0.02
        return bool((ours - theirs).norm() <= tolerance * theirs.norm())
