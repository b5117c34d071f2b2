"""Gradients that can be taken once: what a second derivative would read isn't kept."""

import functools
from collections.abc import Callable
from typing import Any

import torch

TWICE = (
    b"plopfast's operations have no second derivative (backward was called with create_graph=True): train with first "
    b"derivatives alone, or on plain modules (of a PEFT model: pf.restore(model))"
)


def once(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """For the `backward` of a torch.autograd.Function: whoever differentiates its results gets a RuntimeError that says so.

    torch's once_differentiable raises only where the incoming gradient requires a gradient itself. In a gradient penalty,
    `torch.autograd.grad(y.sum(), x, create_graph=True)`, it doesn't, so the penalty would be a constant and say nothing.
    """

    @functools.wraps(gradients)
    def backward(ctx: Any, *dy: torch.Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return gradients(ctx, *dy)
        with torch.no_grad():
            found = gradients(ctx, *dy)
        several: tuple[Any, ...] = found if isinstance(found, tuple) else (found,)
        refused = torch._C._functions.DelayedError(TWICE, len(several))
        aliases: list[Any] = [None if one is None else one.detach().requires_grad_() for one in several]
        return refused(*aliases)

    return backward
