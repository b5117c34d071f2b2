"""How numbers round on a GPU: bf16, fp16, fp8 and tf32, which numpy and the stock interpreter lack or get wrong."""

import numpy as np
import torch
import triton.runtime.interpreter as stock

NARROW = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}  # numpy has none of them
BITS = {1: torch.uint8, 2: torch.uint16}  # by bytes: what the interpreter keeps them in


def is_narrow(*types):
    return any(ty.scalar.name in NARROW for ty in types)


def widen(handle):
    """A handle's numbers, in a type that numpy computes with."""
    dtype = NARROW.get(handle.dtype.scalar.name)
    return handle.data if dtype is None else torch.from_numpy(np.array(handle.data)).view(dtype).float().numpy()


def narrow(numbers, ty):
    """A handle of Triton type `ty`, rounded to nearest even; fp8 saturates, as casts do in hardware."""
    dtype = NARROW.get(ty.scalar.name)
    if dtype is None:
        assert "fp8" not in ty.scalar.name, ty  # an exotic one, which would need its own arithmetic
        return stock.TensorHandle(numbers.astype(stock._get_np_dtype(ty)), ty.scalar)
    wide = torch.from_numpy(np.array(numbers, dtype=np.float32))
    if dtype.itemsize == 1:
        wide = wide.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return stock.TensorHandle(wide.to(dtype).view(BITS[dtype.itemsize]).numpy(), ty.scalar)


def round_to_tf32(numbers):
    bits = numbers.view(np.uint32)
    bits = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(numbers), bits.view(np.float32), numbers)
