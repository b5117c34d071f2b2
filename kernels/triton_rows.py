"""Launchers of the kernels that take rows one by one: rotary embedding and cross-entropy. See triton_ops.py for their form.

B rows of the batch, T tokens, H heads, D columns of a head; n rows of logits, V vocabulary.
"""

from collections.abc import Callable

import torch
import triton

from . import dispatch
from .cross_entropy import cross_entropy as cross_entropy_kernel
from .launch import Planned, plan
from .rotary import rotary as rotary_kernel

TILE = 2048  # pairs of q that a program of `rotary` holds
BLOCK = 16384  # 16-bit logits that a program of `cross_entropy` takes at a time: 16 a thread


def rotary(
    q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, cos_BTP: torch.Tensor, sin_BTP: torch.Tensor, *,
    interleaved: bool = False, backward: bool = False, in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q and k, rotated in one launch, or their gradients; new tensors laid out as [B, T, H, D] unless `in_place`.

    q and k share B, T, D and dtype. cos and sin are [B or 1, T, at most D], of any dtype. All have a last stride of 1.
    """
    facts = [(one.dtype, one.shape, one.stride()) for one in (q_BHTD, k_BHTD, cos_BTP, sin_BTP)]
    return plan(_rotary, q_BHTD.device, *facts, interleaved, backward, in_place)(q_BHTD, k_BHTD, cos_BTP, sin_BTP)


_Fact = tuple[torch.dtype, torch.Size, tuple[int, ...]]


def _rotary(
    device: torch.device, q: _Fact, k: _Fact, cos: _Fact, sin: _Fact, interleaved: bool, backward: bool, in_place: bool
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    (dtype, (b, hq, t, d), _), (k_dtype, (_, hk, _, _), _), (_, (cos_b, _, width), _) = q, k, cos
    assert q[1][::2] == k[1][::2] and d == k[1][3] and dtype == k_dtype, (q, k)
    assert cos[1] == sin[1] == (cos_b, t, width) and cos_b in (1, b) and width <= d and width % 2 == 0, (cos, sin, d)
    assert all(one[2][-1] == 1 or one[1][-1] == 1 for one in (q, k, cos, sin))
    pairs = triton.next_power_of_2(max(width // 2, 1))
    blocks = [min(triton.next_power_of_2(max(h, 1)), max(1, TILE // pairs)) for h in (hq, hk)]
    rest = 0 if in_place or width == d else triton.next_power_of_2(d - width)
    shapes = [(b, t, h, d) for h in (hq, hk)]
    outs = [one[2][:3] if in_place else (t * h * d, d, h * d) for one, h in ((q, hq), (k, hk))]
    tables = [s for one in (cos, sin) for s in (0 if cos_b == 1 else one[2][0], one[2][1])]
    warps = max(1, min(4, blocks[1] * pairs // 256))  # so that k too comes 16 bytes at a time
    launch = Planned(
        rotary_kernel, (b * t,), (*q[2][:3], *k[2][:3], *tables, *outs[0], *outs[1]),
        {"HQ": hq, "HK": hk, "D": d, "P": width // 2, "BP": pairs, "BQ": blocks[0], "BK": blocks[1], "BREST": rest,
         "INTERLEAVED": interleaved, "BACKWARD": backward}, device, num_warps=warps,
    )  # fmt: skip

    def run(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_q, out_k = (q, k) if in_place else (q.new_empty(shape).transpose(1, 2) for shape in shapes)
        if b * t and d:
            launch((q, k, cos, sin, out_q, out_k), (t,))
        return out_q, out_k

    return run


def cross_entropy(
    z_nV: torch.Tensor, targets_n: torch.Tensor, bias_V: torch.Tensor | None = None, *,
    multiplier: float = 1.0, cap: float | None = None, gradient: bool = True,
) -> torch.Tensor:  # fmt: skip
    """The losses [n] in float32 of logits [n, V]; with `gradient`, dz is written over z. Targets are int64.

    The loss of a target outside of the vocabulary is NaN. The columns of z lie side by side; its rows may be apart.
    """
    run = plan(
        _cross_entropy, z_nV.device, z_nV.dtype, z_nV.shape, z_nV.stride(), None if bias_V is None else bias_V.dtype,
        multiplier, cap, gradient,
    )  # fmt: skip
    return run(z_nV, targets_n, bias_V)


def _cross_entropy(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], bias: torch.dtype | None,
    multiplier: float, cap: float | None, gradient: bool,
) -> Callable[..., torch.Tensor]:  # fmt: skip
    n, v = shape
    assert v and (strides[1] == 1 or v == 1), (shape, strides)
    most = 16 if dispatch.target_of(device).name.startswith("gfx9") else 32  # 1024 threads
    block = BLOCK * 2 // dtype.itemsize // (1 if bias is None and cap is None else 2)  # registers and shared memory
    block = min(block, max(256, triton.next_power_of_2(v)))
    launch = Planned(
        cross_entropy_kernel, (n,), (v, strides[0], multiplier, cap or 1.0),
        {"BIAS": bias is not None, "CAP": cap is not None, "GRADIENT": gradient, "BLOCK": block}, device,
        num_warps=max(1, min(most, block // 128)),
    )  # fmt: skip

    def run(z: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        losses = z.new_empty(n, dtype=torch.float32)
        if n:
            launch((z, z if bias is None else bias.contiguous(), targets.contiguous(), losses), ())
        return losses

    return run
