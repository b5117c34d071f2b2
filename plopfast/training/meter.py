"""Bytes and FLOPs of what runs within a context, and the formulas of FLOPs that torch lacks.

`FlopCounterMode(custom_mapping=FORMULAS)` is torch's own counter of a training step's FLOPs. `Meter` uses its formulas but
not the mode itself, whose module tracker keeps tensors of the backward pass alive: with it, peaks were up to twice as high.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..lora import ops  # noqa: F401  # registers torch.ops.plopfast, of which FORMULAS speaks


class Meter(TorchDispatchMode):
    """Counts bytes of the storages that operations made, or that `add` was given: those still alive, `now`, and the most
    that were alive at one time, `peak`. Counts the `flops` of products too, a multiplication with its addition being two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known: set[int] = set()
        self._formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry

    def add(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage until it is freed; a storage that is known counts once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        if formula := self._formulas.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _lora_forward(x: Any, w: Any, a: Any, *_: Any, **__: Any) -> int:
    (m, k), n, r = x, w[0], a[0]
    return 2 * m * (k * r + n * k + r * n)  # S, X W^T, S B^T


def _lora_backward(dy: Any, x: Any, s: Any, w: Any, a: Any, *rest: Any, **__: Any) -> int:
    (m, k), n, r = x, w[0], a[0]
    need_x, need_a, need_b = map(bool, rest[5:8])
    return 2 * m * (r * n * (need_b + (need_a or need_x)) + r * k * (need_a + need_x) + n * k * need_x)


def attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Counts Q K^T and P V for q [B, H, T, D], k [B, G, S, D], v [B, G, S, E]; each of the H query heads takes part,
    however few heads G the keys have. As in torch, causal masks save nothing."""
    (b, h, t, d), s, e = q, k[2], v[3]
    return 2 * b * h * t * s * (d + e)


def attention_backward_flops(dy: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Counts Q K^T again, dY V^T, P^T dY, dS K and dS^T Q: 2.5 times the forward pass where D = E."""
    (b, h, t, d), s, e = q, k[2], v[3]
    return 2 * b * h * t * s * (3 * d + 2 * e)


_OPS, _ATEN = torch.ops.plopfast, torch.ops.aten
_ATTENTION = (
    "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "fused_attention_overrideable",
)  # fmt: skip
FORMULAS: dict[Any, Any] = {  # of shapes
    _OPS.lora_forward: _lora_forward,
    _OPS.lora_backward: _lora_backward,
    _ATEN.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1],  # torch 2.13 knows no products in place
    # torch 2.11 refuses keys with fewer heads than the queries; torch 2.13 does not know attention on the CPU
    **{getattr(_ATEN, f"_scaled_dot_product_{kind}"): attention_flops for kind in _ATTENTION},
    **{getattr(_ATEN, f"_scaled_dot_product_{kind}_backward"): attention_backward_flops for kind in _ATTENTION},
}
