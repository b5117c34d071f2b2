"""Rotary embedding of a model's queries and keys in one operation: a Triton kernel on a GPU, fewer passes on the CPU.

transformers calls a function `apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)` of each model's own source file.
`rotated` puts another one there that gives the same numbers: 10 operations become one, forward and backward.

The results are new tensors, as from transformers. Written in place they would move as many bytes, and save only memory,
and in place is not safe: q is a view of its product's output, so autograd would copy the gradient to undo it; hooks may
hold that output, where autograd does not record; and a gradient that comes in may be another operation's too.

B rows of the batch, T tokens, H heads, D columns of a head.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..kernels import library_rows
from ..kernels.autograd import once

NAME = "apply_rotary_pos_emb"
PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]
SMALL = {"cpu": 1 << 16}  # elements of q below which torch's own operations are as fast
WIDTHS = (16, 8)  # of cos, where heads have 16 columns: the whole head, or a part of it


def _op(q: torch.Tensor) -> Callable[..., Any]:
    """The op, or what it calls for eager tensors: torch's dispatcher would take a part of a small call."""
    eager = type(q) is torch.Tensor and q.device.type != "meta" and not torch.compiler.is_compiling()
    return library_rows.rotary if eager else torch.ops.plopfast.rotary


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _op(q)(q, k, cos, sin, interleaved, False, "auto")

    @staticmethod
    @once
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        found = _op(dq)(dq, dk, *ctx.saved_tensors, ctx.interleaved, True, "auto")
        return *found, None, None, None


def rotary(
    q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, cos_BTP: torch.Tensor, sin_BTP: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q [B, H, T, D] and k [B, G, T, D], with gradients for both, by cos and sin [B or 1, T, at most D].

    Pairs are a head's halves (Llama), or neighbours if `interleaved` (Cohere). Columns beyond those of cos stay.
    """
    return _Rotary.apply(q_BHTD, k_BHTD, cos_BTP, sin_BTP, interleaved)


@contextlib.contextmanager
def rotated(model: nn.Module) -> Iterator[int]:
    """Replaces `apply_rotary_pos_emb` in the source files of the model's modules while it lasts. Yields how many it replaced.

        with rotated(model) as count:
            ...

    A function is recognised by what it computes for random tensors, forward and backward, in the model's dtype; others
    are left alone. Other models of these files have the replacement too. Weights must have values.
    """
    like = next(model.parameters())
    names = {type(module).__module__ for module in model.modules()} & sys.modules.keys()
    sources = {name: vars(sys.modules[name]) for name in names}
    found = {name: source[NAME] for name, source in sources.items() if inspect.isfunction(source.get(NAME))}
    ours = {name: one for name, theirs in found.items() if (one := _replacement(theirs, like)) is not None}
    try:
        for name, one in ours.items():
            sources[name][NAME] = one
        yield len(ours)
    finally:
        for name, one in ours.items():
            if sources[name][NAME] is one:
                sources[name][NAME] = found[name]


def _replacement(theirs: Callable[..., Any], like: torch.Tensor) -> Callable[..., Any] | None:
    """A function that gives what `theirs` gives, and calls it for tensors of kinds that were not compared; or None."""
    parameters = inspect.signature(theirs).parameters
    optional = [name for name, parameter in parameters.items() if parameter.default is not parameter.empty]
    # Qwen4's k is optional, and it rotates q alone then
    if [*parameters] != PARAMETERS or optional not in ([], PARAMETERS[4:]) or not like.is_floating_point():
        return None
    kinds = {(like.dtype, table, partial) for table in (like.dtype, torch.float32) for partial in (False, True)}
    for interleaved in (False, True):
        known = {kind for kind in kinds if _agree(theirs, like, *kind[1:], interleaved)}
        if known:
            return _one(theirs, known, interleaved)
    return None


def _one(theirs: Callable[..., Any], known: set[Any], interleaved: bool) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        kind = q.dtype, cos.dtype, cos.shape[-1] < q.shape[-1]
        small = q.numel() < SMALL.get(q.device.type, 0)
        if small or kind not in known or unsqueeze_dim != 1 or not _fit(q, k, cos, sin):
            return theirs(q, k, cos, sin, unsqueeze_dim)
        return rotary(q, k, cos, sin, interleaved)

    return apply_rotary_pos_emb


def _fit(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.requires_grad or sin.requires_grad:
        return False
    (b, _, t, d), rows = q.shape, cos.shape[0]
    same = q.dtype == k.dtype and cos.dtype == sin.dtype and cos.shape == sin.shape and k.shape[::2] == q.shape[::2]
    return same and k.shape[3] == d and rows in (1, b) and cos.shape[1] == t and cos.shape[2] <= d


@torch.enable_grad()
def _agree(
    theirs: Callable[..., Any], like: torch.Tensor, table: torch.dtype, partial: bool, interleaved: bool
) -> bool:
    """Whether both give the same, with three query heads for a key head, and cosines whose halves differ."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(like.device)

    q, k = (normal(2, 5, heads, 16).to(like.dtype).transpose(1, 2).requires_grad_() for heads in (3, 1))
    cos, sin = (normal(2, 5, WIDTHS[partial]).to(table) for _ in range(2))
    dy = [normal(*x.shape).to(like.dtype) for x in (q, k)]
    found = []
    for function in (functools.partial(rotary, interleaved=interleaved), theirs):
        try:
            y = function(q, k, cos, sin)
        except RuntimeError:  # shapes that it does not take
            return False
        if [one.dtype for one in y] != [like.dtype] * 2 or [one.shape for one in y] != [q.shape, k.shape]:
            return False
        found.append([*y, *torch.autograd.grad(y, [q, k], dy)])
    eps = torch.finfo(like.dtype).eps
    return all(bool((one - other).norm() <= 4 * eps * other.norm()) for one, other in zip(*found, strict=True))
