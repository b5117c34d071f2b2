"""PEFT models in other people's trainers, on plopfast's operations: in place, and undone in place.

    model = peft.get_peft_model(model, placement.lora_config(model))
    print(pf.accelerate(model))
    trainer = transformers.Trainer(model, ...)          # or TRL's; nothing else changes
    pf.restore(model)

Parameters, their names and what PEFT writes stay as they are.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ..lora.shared import readers
from ..models.frozen import is_sharded
from ..models.lean import LeanMLP, LeanNorm, lean_modules
from ..support.errors import AdapterError, ConfigError, shown


@dataclass
class Report:
    """What `accelerate` did, by the modules' names. `linears`: LoRA layers that compute by plopfast's operations. `shared`:
    those of them that read one input and compute together. `norms`: norms and gated MLPs that keep less for the backward
    pass. `loss`: whether the label loss is made without logits for all positions. `left`: what stayed as it was, and why."""

    linears: list[str] = field(default_factory=list)
    shared: list[list[str]] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    loss: bool = False
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"accelerated: {len(self.linears)} LoRA layers ({sum(map(len, self.shared))} of them in {len(self.shared)} groups that "
            f"read one input), {len(self.norms)} norms and gated MLPs, the loss {'by chunks' if self.loss else 'as before'}"
        ]
        for why, count in Counter(self.left.values()).items():
            names = [name for name, reason in self.left.items() if reason == why]
            lines.append(f"left as it was: {names[0]}{f' and {count - 1} more' * (count > 1)}: {why}")
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    *,
    linears: bool = True,
    norms: bool = True,
    shared: bool = True,
    loss: Literal["auto"] | bool = "auto",
) -> Report:
    """Puts plopfast's operations behind a PEFT model's own modules, in place; returns what was changed and what was left.

    `linears`: each of PEFT's LoRA layers (dense, Conv1D, bitsandbytes' 4 and 8 bits) gets a subclass that computes the frozen
    product and the update in one operation. `shared`: layers that read one input compute together. `norms`: RMS norms and
    gated MLPs keep less for the backward pass. `loss`: the label loss is computed without logits for all positions while the
    model trains and is given labels (Hugging Face Trainer); "auto" leaves a forward that somebody else put there, as TRL
    does, and True then raises.

    Outputs and gradients are PEFT's, to rounding; with dropout the masks are others. Whatever PEFT does later holds: further
    adapters, merging, disabling, saving. Layers that are added later are plain until `accelerate` is called again. Give the
    model before fully_shard, torch.compile or DDP wrap it, and after `get_peft_model`; with TRL's `peft_config`, give
    `trainer.model`. Not for nn.DataParallel, whose replicas share what a module calls: start one process a GPU.

    Raises ConfigError without peft and transformers or for another `loss`, and AdapterError for a model without PEFT's LoRA
    layers and where `loss=True` cannot be.

        report = pf.accelerate(peft.get_peft_model(model, config))

    >>> placement = pf.place(pf.score(model, batches), rank=4)
    >>> peft_model = peft.get_peft_model(model, placement.lora_config(model))
    >>> print(pf.accelerate(peft_model))
    accelerated: 9 LoRA layers...
    >>> len(pf.restore(peft_model)) >= 9
    True
    """
    if loss not in ("auto", True, False):
        raise ConfigError(f'accelerate: expected loss="auto", True or False, got {shown(loss)}')
    layers = _layers_of(model)
    with _undone_on_error(model):
        restore(model)  # what this call does not ask for is not left from an earlier one
        return _accelerated(model, layers, linears, norms, shared, loss)


def _accelerated(
    model: nn.Module, layers: dict[str, Any], linears: bool, norms: bool, shared: bool, loss: str | bool
) -> Report:
    from . import peft_layers as fast, peft_loss

    report, inner = Report(), _inner(model)
    quick: dict[Any, str] = {}
    for name, layer in layers.items() if linears else ():
        if why := fast.why_left(layer):
            report.left[name] = why
        else:
            fast.quicken(layer)
            quick[layer] = name
    report.linears = list(quick.values())
    if any(is_sharded(parameter) or parameter.is_meta for parameter in model.parameters()):
        asked = {"norms": norms, "shared": shared, "loss": loss}
        why = "the weights are sharded or have no values: accelerate the model before"
        report.left |= {option: why for option, wanted in asked.items() if wanted}
        return report
    if norms:
        lean_modules(inner)
        report.norms = [name for name, module in model.named_modules() if _is_lean(module)]
    if shared:
        for members, _ in readers(inner, quick, fast.alike):
            fast.read_together(members)
            report.shared.append([quick[member] for member in members])
    if loss:
        if not (why := peft_loss.why_not(inner)):
            inner.forward = peft_loss.LossForward(inner)
        elif loss is True:
            raise AdapterError(f"accelerate: the loss cannot be computed by chunks: {why}; leave out loss=True")
        else:
            report.left["loss"] = why
        report.loss = not why
    return report


@contextlib.contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    from .peft_layers import FROZEN, READS_WITH

    names = ("forward", FROZEN, READS_WITH)
    before = [(m, type(m), {name: vars(m)[name] for name in names if name in vars(m)}) for m in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, own in before:
            if type(module) is not kind:
                module.__class__ = kind
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(own)
        raise


def restore(model: nn.Module) -> list[str]:
    """Undoes `accelerate`: every module is PEFT's and transformers' own again. Returns the names of those that were changed.

    Raises AdapterError where fully_shard has wrapped a layer by itself, which keeps its class.
    """
    _layers_of(model)
    from . import peft_layers as fast, peft_loss

    changed = []
    with _undone_on_error(model):
        for name, module in model.named_modules():
            if isinstance(module, fast.Fast):
                fast.slow_down(module)
            elif _is_lean(module) or isinstance(vars(module).get("forward"), peft_loss.LossForward):
                del module.forward
            else:
                continue
            changed.append(name)
    return changed


def _is_lean(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), LeanNorm | LeanMLP)


def _layers_of(model: nn.Module) -> dict[str, Any]:
    """Name -> layer of PEFT's LoRA. Raises ConfigError without peft, and AdapterError where there are none."""
    try:
        import transformers.loss.loss_utils  # noqa: F401
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ConfigError(f"accelerate works on PEFT models ({error}): pip install peft transformers") from None
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise AdapterError(
            f"expected a model with LoRA layers of PEFT's (peft.get_peft_model(model, placement.lora_config(model))), got a "
            f"{type(model).__name__} without any; plopfast's own are made by pf.inject(model, placement)"
        )
    return layers


def _inner(model: nn.Module) -> Any:
    """The model that PEFT wraps, wherever it is wrapped; the model itself where PEFT only put layers into it."""
    from peft import PeftModel

    outer = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    return model if outer is None else outer.get_base_model()
