"""Merging; and merging with a measurement of what it changed: the logits of the merged and of the adapted model on a few tokens."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..models.frozen import QuantizedWeight, sharers, streamed_in
from ..models.quantized_experts import make_dense
from ..models.routed import QuantizedExpertWeight
from ..models.running import device_of, evaluating
from ..support.errors import AdapterError
from .experts import ExpertLoRA, merge_codes
from .injection import take_out
from .layer import LoRALinear, adapters, replace_module
from .many import adapter_names
from .replaced import keep_values

TOKENS = 32
# Measured on random Llama, GPT-2, Gemma 3 and Qwen2 models and on SmolLM2-135M, with alpha up to 100,000 times the rank:
# at most 3e-6 in float32 and float64 (sums are float32), 0.08 in float16 and 0.09 in bfloat16 (0.0024 and 0.018 on SmolLM2).
BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.16, torch.bfloat16: 0.2}


def merge(model: nn.Module, *, into: str | None = None) -> list[str]:
    """Adds each update to its frozen weight and puts the plain modules back; returns their names.

    Quantised weights take no update in place, so for them say `into`: "dense" makes all of the model's quantised modules
    dense, "quantized" those with an update quantised anew, which rounds W and its update to codes.

    `merge_checked` compares the logits, too. Raises AdapterError, before anything is changed, where a weight is shared, and
    for quantised weights without `into`. After an exception half way, such as Ctrl-C, each module is either merged or as it
    was, so the model computes the same; another call merges the rest.

    >>> names = pf.inject(model, pf.place(pf.score(model, batches), rule="attn", rank=4))
    >>> pf.merge(model) == names  # plain modules again, with the sum in their weights
    True
    """
    merged = adapters(model)
    if names := adapter_names(model):
        raise AdapterError(
            f"the model has adapters with names ({', '.join(names)}): merge_adapter(model, name) puts one into the weights for a while; "
            "to merge one for good, unload(model) and load it without a name"
        )
    if streamed := streamed_in(model):
        raise AdapterError(
            f"{streamed[0].removesuffix('.base')} is streamed, and the host's copy takes no update: unstream(model) first, or "
            "load the model without --stream"
        )
    for name, others in sharers(model, [n for n, m in merged.items() if isinstance(m, LoRALinear)]).items():
        raise AdapterError(f"{name} shares its weight with {' and '.join(others)}: merging would change these too")
    if into not in (None, "dense", "quantized"):
        raise AdapterError(f'merge: expected into="dense" or into="quantized", got {into!r}')
    if into is None and (codes := {name: m.frozen.kind for name, m in merged.items() if m.frozen.kind != "dense"}):
        name, kind = next(iter(codes.items()))
        raise AdapterError(
            f'{name} has {kind} weights, which take no update in place: merge(model, into="dense"), or into="quantized", which '
            "rounds the sum to codes"
        )
    for name, module in merged.items():
        if isinstance(module.frozen, QuantizedWeight):
            replace_module(model, name, module.frozen.merged(module.delta_NK(), dense=into == "dense"))
            continue
        if isinstance(module.frozen, QuantizedExpertWeight):
            merge_codes(model, name, module, dense=into == "dense")
            continue
        before = module.frozen.stored.detach().clone()
        try:
            module.frozen.add_(module.delta_NK if isinstance(module, ExpertLoRA) else module.delta_NK())
            take_out(model, name, module)
        except BaseException:
            if name in adapters(model):
                module.frozen.stored.detach().copy_(before)
            raise
    keep_values(model)
    if into == "dense":
        make_dense(model)
    return list(merged)


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
