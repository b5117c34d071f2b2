"""Merging, with a measurement of what it changed: the logits of the merged and of the adapted model on a few tokens."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..models.running import device_of, evaluating
from ..support.errors import AdapterError
from .layer import merge

TOKENS = 32
# Measured on random Llama, GPT-2, Gemma 3 and Qwen2 models and on SmolLM2-135M, with alpha up to 100,000 times the rank:
# at most 3e-6 in float32 and float64 (sums are float32), 0.08 in float16 and 0.09 in bfloat16 (0.0024 and 0.018 on SmolLM2).
BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.16, torch.bfloat16: 0.2}


def merge_checked(model: nn.Module, token_ids: Sequence[int] | None = None, *, into: str | None = None) -> float:
    """Merges the adapters into the model, in place, and returns how far the logits moved: ||merged - adapted|| / ||adapted||.

    `token_ids` is one row; by default, `TOKENS` ids from all over the vocabulary. `into` as for `merge`; a model that is
    quantised anew moves by any amount, which is for the caller to judge. Raises AdapterError where logits are not
    finite or moved by more than the dtype's bound in `BOUNDS`; the model is then of no use. A model in bfloat16 moves
    most, as each merged weight is rounded: load it in float32 to merge it more exactly.
    """
    dtype, device = next(model.parameters()).dtype, device_of(model)
    if any(type(m).__module__.startswith("bitsandbytes") for m in model.modules()):
        dtype = torch.bfloat16  # which its products are rounded to, or more: on a CPU, and by int8 activations
    if token_ids is None:
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        token_ids = torch.linspace(0, vocabulary - 1, min(TOKENS, vocabulary)).long().tolist()
    ids = torch.tensor([list(token_ids)], device=device)

    def logits() -> torch.Tensor:
        with torch.no_grad(), evaluating(model):
            return model(input_ids=ids, use_cache=False).logits.double()

    adapted = logits()
    if not adapted.isfinite().all():
        raise AdapterError("the adapted model's logits are NaN or infinite: not merged; check the adapter's alpha")
    merge(model, into=into)
    merged = logits()
    drift = ((merged - adapted).norm() / adapted.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
    bound = BOUNDS[dtype] if into != "quantized" else math.inf
    if not drift <= bound:  # NaN too
        raise AdapterError(
            f"merging moved the logits by {drift:.2g} of their norm, more than {bound:g}, the bound for {dtype}: the merged "
            "model would not be the adapted one; merge in float32 (--dtype float32), and check the adapter's alpha"
        )
    return drift
