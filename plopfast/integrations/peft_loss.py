"""The label loss of a causal language model in other people's trainers, without logits for all positions.

    model.forward = LossForward(model)
    ...
    del model.forward

It stands in for the model's forward only while the model trains and is given labels, as the Hugging Face Trainer does.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..models.cross_entropy import chunked_cross_entropy
from ..models.frozen import is_sharded
from ..models.running import body, evaluating, text_setting
from ..support.errors import ModelError
from ..training.loss import Head, Objective, head_of, positions
from .peft_layers import are_plain, computed_in

# what the body takes as the model does; with any other argument that says something, the model's own forward is called
TAKEN = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "cache_position"}
TAKEN |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}  # of rows without padding
OURS = {"labels", "num_items_in_batch", "use_cache"}


class LossOutput(CausalLMOutputWithPast):
    """An output whose logits are made when somebody reads them, from the hidden states."""

    def __getattribute__(self, name: str) -> Any:
        made_by = vars(self).get("_plopfast_logits") if name == "logits" else None
        return super().__getattribute__(name) if made_by is None else made_by()


class _Signature:
    """That of the module's own forward: the Trainer chooses a data set's columns by it, and `generate` its arguments."""

    def __get__(self, forward: Any, kind: type) -> inspect.Signature:
        if forward is None:
            raise AttributeError("the class has the one of __init__")
        return inspect.signature(type(forward.module).forward.__get__(forward.module))


class LossForward:
    """A forward of `module` with the label loss by chunks of logits. It takes and returns what the module's own does; loss and
    gradients are the same."""

    __signature__ = _Signature()

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self.module.training and (head := self._head(kwargs)) is not None:
            return self.loss_of(head, kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _head(self, given: dict[str, Any]) -> Head | None:
        """The output head, where the loss of these arguments can be computed by chunks."""
        labels = given.get("labels")
        if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or torch.compiler.is_compiling():
            return None
        if any(given[name] is not None for name in given.keys() - TAKEN - OURS):
            return None
        if text_setting(self.module, "output_router_logits"):  # the loss has a term for them
            return None
        head = head_of(self.module)
        if head is None or is_sharded(head.weight_VH) or not are_plain(head.module):
            return None
        return head

    def loss_of(self, head: Head, given: dict[str, Any]) -> LossOutput:
        """The loss as ForCausalLMLoss has it: the mean over the labels, or their sum divided by num_items_in_batch."""
        labels, items = given["labels"], given.get("num_items_in_batch")
        passed = {name: value for name, value in given.items() if name in TAKEN}
        hidden = body(self.module)(**passed, use_cache=False)[0]
        labels = labels.to(hidden.device)
        where = positions(labels)
        targets_n = labels[:, 1:][where]
        dtype, _ = computed_in(hidden)
        weight, bias = head.weight_VH.to(dtype), head.bias_V
        bias = bias if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden_nH = hidden[:, :-1][where].to(dtype)
            total = chunked_cross_entropy(hidden_nH, weight, targets_n, bias, multiplier=head.multiplier, cap=head.cap)
        if isinstance(items, torch.Tensor):
            items = items.to(total.device)
        output = LossOutput(loss=total / (len(targets_n) if items is None else items))
        vars(output)["_plopfast_logits"] = lambda: head.logits(hidden).to(hidden.dtype)
        return output


def why_not(model: Any) -> str:
    """Why `model` cannot have a LossForward, or "". It runs the model on two short rows."""
    if "forward" in vars(model):
        function = getattr(model.forward, "__func__", model.forward)
        return f"its forward was replaced, by {getattr(function, '__globals__', {}).get('__name__') or type(function).__name__}"
    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return f"{type(model).__name__} has a loss of its own"
    try:
        objective = Objective(model)
    except ModelError as error:
        return str(error)
    if objective.head is None:
        return objective.why
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]], device=next(model.parameters()).device)
    with evaluating(model), torch.no_grad():
        theirs = model(input_ids=ids, labels=ids, use_cache=False).loss
        ours: Any = LossForward(model).loss_of(objective.head, {"input_ids": ids, "labels": ids}).loss
    within = 1e-5 if model.dtype == torch.float32 else 0.02
    return (
        "" if bool(abs(ours - theirs) <= within * abs(theirs)) else f"{type(model).__name__} adds something to its loss"
    )
