"""Registers the ops of rotary embedding and cross-entropy, as library.py does; autograd is added by plopfast/models/.

B rows of the batch, T tokens, H heads, D columns of a head; n rows of logits, V vocabulary.
"""

import torch

from . import dispatch, torch_rows
from .library import DEVICES, LIBRARY

LIBRARY.define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool backward, str backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "cross_entropy_(Tensor(a!) z, Tensor targets, Tensor? bias, float multiplier, float? cap, bool gradient, str backend)"
    " -> Tensor"
)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    backward: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, T, D] and k [B, G, T, D], rotated by cos and sin [B or 1, T, at most D], or their gradients."""
    if not dispatch.runs_kernels(q.device, q.dtype, backend) or cos.dtype not in dispatch.DTYPES:
        return torch_rows.rotary(q, k, cos, sin, interleaved=interleaved, backward=backward)
    from . import triton_rows

    q, k, cos, sin = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, cos, sin))
    return triton_rows.rotary(q, k, cos, sin, interleaved=interleaved, backward=backward)


def cross_entropy_(
    z: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, multiplier: float, cap: float | None,
    gradient: bool, backend: str,
) -> torch.Tensor:  # fmt: skip
    """Losses [n] in float32 of logits z [n, V]. `gradient`: z becomes its gradient; else z's values are lost."""
    if dispatch.runs_kernels(z.device, z.dtype, backend):
        from . import triton_rows

        return triton_rows.cross_entropy(z, targets, bias, multiplier=multiplier, cap=cap, gradient=gradient)
    losses, dz = torch_rows.cross_entropy(z, targets, bias, multiplier=multiplier, cap=cap, gradient=gradient)
    if gradient and dz is not z:
        z.copy_(dz)
    return losses


for _op in (rotary, cross_entropy_):
    for _device in DEVICES:
        LIBRARY.impl(_op.__name__, _op, _device)


@torch.library.register_fake("plopfast::rotary", lib=LIBRARY)
def _(q, k, cos, sin, interleaved, backward, backend):
    def like(x):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

    return like(q), like(k)


@torch.library.register_fake("plopfast::cross_entropy_", lib=LIBRARY)
def _(z, targets, bias, multiplier, cap, gradient, backend):
    return z.new_empty(z.shape[0], dtype=torch.float32)
