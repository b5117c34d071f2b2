"""Rotary embedding and cross-entropy in plain torch, in few passes: the CPU's way, and the twins of triton_rows.py.

B rows of the batch, T tokens, H heads, D columns of a head; n rows of logits, V vocabulary.
"""

from typing import Any

import torch

CACHED = 1 << 20  # bytes of q or k that are rotated at a time: a processor's cache holds them for the second pass


def rotary(
    q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, cos_BTP: torch.Tensor, sin_BTP: torch.Tensor, *,
    interleaved: bool = False, backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q and k, rotated, or their gradients: new tensors in q's and k's dtype, laid out as [B, T, H, D].

    Where cos and sin are wider than q and k, the sums are too, and are rounded once.
    """
    cos, sin = cos_BTP.unsqueeze(1), sin_BTP.unsqueeze(1)
    a, b = _pairs(cos.shape[-1], interleaved)
    if backward:
        turned = torch.empty_like(sin)
        turned[b], turned[a] = -sin[a], -sin[b]
        sin = turned
    return _rotated(q_BHTD, cos, sin, a, b), _rotated(k_BHTD, cos, sin, a, b)


def _pairs(width: int, interleaved: bool) -> list[Any]:
    """The indices of the first and of the second of each pair."""
    halves = [slice(0, width, 2), slice(1, width, 2)] if interleaved else [slice(width // 2), slice(width // 2, width)]
    return [(..., half) for half in halves]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    (rows, heads, tokens, d), dtype = x.shape, x.dtype
    x = x.to(torch.promote_types(dtype, cos.dtype))
    y = x.new_empty(rows, tokens, heads, d).transpose(1, 2)
    step = max(1, CACHED // max(1, x[:1].numel() * x.element_size()))
    if step >= rows:
        _rotate(x, y, cos, sin, a, b)
    else:
        for one in (slice(at, at + step) for at in range(0, rows, step)):
            table = one if len(cos) == rows else slice(1)
            _rotate(x[one], y[one], cos[table], sin[table], a, b)
    return y.to(dtype)


def _rotate(x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, a: Any, b: Any) -> None:
    width = cos.shape[-1]
    if width == x.shape[-1]:
        torch.mul(x, cos, out=y)
    else:
        torch.mul(x[..., :width], cos, out=y[..., :width])
        y[..., width:] = x[..., width:]
    y[a].addcmul_(x[b], sin[a], value=-1)
    y[b].addcmul_(x[a], sin[b])


def cross_entropy(
    z_nV: torch.Tensor, targets_n: torch.Tensor, bias_V: torch.Tensor | None = None, *,
    multiplier: float = 1.0, cap: float | None = None, gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The losses [n] of logits [n, V], and their gradient by z where `gradient`, both in float32. z may be overwritten."""
    z = z_nV.float()
    if bias_V is not None:
        z += bias_V
    if multiplier != 1.0:
        z *= multiplier
    if cap is not None:
        z.div_(cap).tanh_().mul_(cap)
    targets = targets_n[:, None]
    reused = z.device.type == "cpu" and (cap is None or not gradient)  # of a row, z is read before it is overwritten
    logp = torch.log_softmax(z, -1, out=z) if reused else z.log_softmax(-1)
    losses = logp.gather(1, targets)[:, 0].neg_()
    if not gradient:
        return losses, z
    dz = logp.exp_()
    dz.scatter_add_(1, targets, dz.new_full((1, 1), -1.0).expand_as(targets))
    if cap is not None:
        dz.mul_(z.div_(cap).square_().neg_().add_(1.0))
    if multiplier != 1.0:
        dz.mul_(multiplier)
    return losses, dz
