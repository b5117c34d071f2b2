"""Decoding of quantised weights on the CPU, in torch's operations, against bitsandbytes' C++.

    OMP_NUM_THREADS=1 python bench/decoding.py [--repeats 200]

A weight of SmolLM2-135M's MLP, 1536 x 576, is decoded into float32 and bfloat16. The ways alternate; ratios are within a
repeat, with their 20 % and 80 % quantiles. Then the seconds to make codes of it, and of bitsandbytes to make nf4.
"""

import argparse
import importlib.metadata
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import measure
import torch

from plopfast.kernels import codes, torch_codes

SHAPE = (1536, 576)


def ways(dtype: torch.dtype) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """(decoding, making codes), each by name."""
    weight = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    decoding: dict[str, Callable[[], Any]] = {}
    for name, nested in (("nf4", False), ("nested nf4", True)):
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        inner = (state.state2.code, state.state2.absmax, float(state.offset)) if nested else None
        ours = codes.NF4(packed, state.absmax, SHAPE, dtype, inner)
        assert torch.equal(codes.dense(ours), bnb.dequantize_4bit(packed, state))
        decoding[name] = lambda ours=ours: codes.dense(ours)  # type: ignore[misc]
        decoding[f"bitsandbytes {name}"] = lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state)  # type: ignore[misc]
    int8 = codes.Scaled(*torch_codes.encode_int8(weight), (1, SHAPE[1]), SHAPE, dtype)
    fp8 = codes.Scaled(*torch_codes.encode_fp8(weight), (128, 128), SHAPE, dtype)
    decoding |= {"int8": lambda: codes.dense(int8), "fp8": lambda: codes.dense(fp8)}
    making = {
        "nf4": lambda: torch_codes.encode_nf4(weight),
        "bitsandbytes nf4": lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False),
        "int8": lambda: torch_codes.encode_int8(weight),
        "fp8": lambda: torch_codes.encode_fp8(weight),
    }
    return decoding, making


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    given = parser.parse_args()
    lines, found = [f"{'':<34}{'ms':>8}  times bitsandbytes nf4"], {}
    for dtype in (torch.float32, torch.bfloat16):
        for what, candidates in zip(("decoded", "made"), ways(dtype), strict=True):
            seconds = measure.interleaved(candidates, given.repeats if what == "decoded" else given.repeats // 10)
            for name, times in seconds.items():
                ratio, low, high = measure.ratios(seconds, name, "bitsandbytes nf4")
                label = f"{str(dtype).removeprefix('torch.')} {what}, {name}"
                middle = sorted(times)[len(times) // 2]
                lines.append(f"{label:<34}{1e3 * middle:>8.3f}  {ratio:.2f} ({low:.2f} to {high:.2f})")
                found[label] = {"ms": 1e3 * middle, "ratio": [ratio, low, high]}
    packages = {"bitsandbytes": importlib.metadata.version("bitsandbytes")}
    measure.save("decoding", "\n".join(lines), {"found": found, "packages": packages})


if __name__ == "__main__":
    main()
