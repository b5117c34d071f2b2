"""Bytes and FLOPs of what runs within a context, and the formulas of FLOPs that torch lacks.

`FlopCounterMode(custom_mapping=FORMULAS)` is torch's own counter of a training step's FLOPs. `Meter` uses its formulas but
not the mode itself, whose module tracker keeps tensors of the backward pass alive: with it, peaks were up to twice as high.
"""

import itertools
import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..lora import many_ops, ops  # noqa: F401  # register torch.ops.plopfast, of which FORMULAS speaks


class Meter(TorchDispatchMode):
    """Counts bytes of the storages that operations made, or that `add` was given: those still alive, `now`, and the most
    that were alive at one time, `peak`. Counts the `flops` of products too, a multiplication with its addition being two.

    With `device` only storages of that kind of device count so: the bytes of all others are `host_now` and `host_peak`, and
    `crossed` are the bytes that operations copied from one to the other. `part` names what is made from now on,
    `parts` says how many bytes of each part are alive, which sum to `now`, and `at_peak` how many were at the peak.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.card = None if device is None else device.type
        self.now = self.peak = self.flops = self.host_now = self.host_peak = self.crossed = 0
        self.part = ""
        self.at_peak: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self._known: dict[int, str] = {}
        self._formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry

    def add(self, tensor: torch.Tensor, part: str | None = None, *, host: bool = False) -> None:
        """Counts a tensor's storage until it is freed; a storage that is known counts once. `host`: it does not lie on the
        device, whatever its own says."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        on_card = not host and (self.card is None or tensor.device.type == self.card)
        self._known[key] = (self.part if part is None else part) if on_card else HOST
        if on_card:
            self.now += size
            self.parts[self._known[key]] += size
            if self.now > self.peak:
                self.peak, self.at_peak = self.now, self.parts.copy()
        else:
            self.host_now += size
            self.host_peak = max(self.host_peak, self.host_now)
        weakref.finalize(storage, self._gone, key, size)

    def name(self, tensor: torch.Tensor, part: str) -> None:
        """Says what a storage that is known is a part of."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if self._known.get(key, HOST) != HOST:
            self.parts[self._known[key]] -= size
            self.parts[part] += size
            self._known[key] = part

    def _gone(self, key: int, size: int) -> None:
        part = self._known.pop(key)
        if part == HOST:
            self.host_now -= size
        else:
            self.now -= size
            self.parts[part] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        packet = func._overloadpacket
        if packet in COPIES and len({t.device.type for t in (out, *args[:2]) if isinstance(t, torch.Tensor)}) > 1:
            self.crossed += args[0].nbytes
        if formula := self._formulas.get(packet):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


HOST = "other devices"


def _lora_forward(x: Any, w: Any, a: Any, *_: Any, **__: Any) -> int:
    (m, k), n, r = x, w[0], a[0]
    return 2 * m * (k * r + n * k + r * n)  # S, X W^T, S B^T


def _lora_backward(dy: Any, x: Any, s: Any, w: Any, a: Any, *rest: Any, **__: Any) -> int:
    (m, k), n, r = x, w[0], a[0]
    need_x, need_a, need_b = map(bool, rest[5:8])
    return 2 * m * (r * n * (need_b + (need_a or need_x)) + r * k * (need_a + need_x) + n * k * need_x)


def _many_forward(x: Any, w: Any, a: Any, b: Any, bias: Any, cuts: Any, *_: Any, **__: Any) -> int:
    (m, k), n = x, w[0]
    rows = [end - start for start, end in itertools.pairwise(cuts)]
    return 2 * m * n * k + sum(2 * own * one[0] * (n + k) for own, one in zip(rows, a, strict=True) if one is not None)


def _many_backward(dy: Any, x: Any, s: Any, w: Any, a: Any, b: Any, cuts: Any, *rest: Any, **__: Any) -> int:
    (m, k), n, (need_x, need_a, need_b) = x, w[0], rest[4:7]
    found = 2 * m * n * k * need_x
    for e, (start, end) in enumerate(itertools.pairwise(cuts)):
        if a[e] is not None:
            of_s, of_b, of_x = need_a[e] or need_x, need_b[e], need_a[e] + need_x
            found += 2 * (end - start) * a[e][0] * (n * (of_s + of_b) + k * of_x)
    return found


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
COPIES = (_ATEN.copy_, _ATEN._to_copy)
_ATTENTION = (
    "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "fused_attention_overrideable",
)  # fmt: skip
FORMULAS: dict[Any, Any] = {  # of shapes
    _OPS.lora_forward: _lora_forward,
    _OPS.lora_backward: _lora_backward,
    _OPS.many_forward: _many_forward,
    _OPS.many_backward: _many_backward,
    _OPS.segment_product: lambda x, w, *_, **__: 2 * x[0] * w[1] * w[2],
    _OPS.segment_outer: lambda one, other, *_, **__: 2 * one[0] * one[1] * other[1],
    _OPS.segment_forward: lambda x, w, a, *_, **__: 2 * x[0] * (w[1] * w[2] + a[1] * (w[1] + w[2])),
    _OPS.segment_backward: lambda dy, x, s, w, a, b, ends, scaling, *needed, **__: _lora_backward(
        dy, x, s, w[1:], a[1:], b, scaling, 0.0, None, "", *needed
    ),
    _ATEN.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1],  # torch 2.13 knows no products in place
    # torch 2.11 refuses keys with fewer heads than the queries; torch 2.13 does not know attention on the CPU
    **{getattr(_ATEN, f"_scaled_dot_product_{kind}"): attention_flops for kind in _ATTENTION},
    **{getattr(_ATEN, f"_scaled_dot_product_{kind}_backward"): attention_backward_flops for kind in _ATTENTION},
}
