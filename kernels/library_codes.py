"""Registers the operations that decode quantised weights into new memory, for torch.compile and tensors without values.

Eager products decode into a workspace instead, see codes.py.
"""

import torch

from . import codes
from .library import DEVICES, LIBRARY

LIBRARY.define(
    "decode_nf4(Tensor packed, Tensor absmax, Tensor? code, Tensor? nested, float offset, SymInt n, SymInt k, "
    "ScalarType dtype) -> Tensor"
)
LIBRARY.define("decode_scaled(Tensor codes, Tensor scale, SymInt high, SymInt wide, ScalarType dtype) -> Tensor")


def decode_nf4(packed, absmax, code, nested, offset, n, k, dtype):
    weight = codes.NF4(packed, absmax, (n, k), dtype, None if code is None else (code, nested, offset))
    return weight.decode(packed.new_empty(n, k, dtype=dtype))


def decode_scaled(values, scale, high, wide, dtype):
    weight = codes.Scaled(values, scale, (high, wide), values.shape, dtype)
    return weight.decode(values.new_empty(values.shape, dtype=dtype))


for _device in DEVICES:
    LIBRARY.impl("decode_nf4", decode_nf4, _device)
    LIBRARY.impl("decode_scaled", decode_scaled, _device)


@torch.library.register_fake("plopfast::decode_nf4", lib=LIBRARY)
def _(packed, absmax, code, nested, offset, n, k, dtype):
    return packed.new_empty(n, k, dtype=dtype)


@torch.library.register_fake("plopfast::decode_scaled", lib=LIBRARY)
def _(values, scale, high, wide, dtype):
    return values.new_empty(values.shape, dtype=dtype)
