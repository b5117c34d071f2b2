"""Linear modules whose frozen weight is kept as codes: plopfast's own, and those of bitsandbytes and transformers.

    y = x W^T + bias, W decoded for the product and again for the gradient of x, see kernels/codes.py

N out, K in.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels import library_codes, torch_codes  # noqa: F401  # the first registers the operations that decode
from ..kernels.codes import NF4, Codes, Scaled, Stack, frozen_linear, one_workspace
from ..support.errors import ModelError

__all__ = ["one_workspace"]  # for training, which imports no kernels
KINDS = ("nf4", "int8", "fp8")
FP8_BLOCK = (128, 128)


class QuantizedMatrix(nn.Module):
    """A frozen matrix [N, K] as codes of `kind` "nf4", "int8" or "fp8", with a bias or none.

    Its parameters are `weight`, the codes (those of fp8 as bytes, which no cast of a model touches), and what decodes them:
    `absmax` (nf4; with `nested_absmax` and `nested_code` where the absmax are codes, too), or `scale`. None of them is
    trained. `model.to(dtype)` changes `dtype`, that of the output, and leaves codes and scales as they are.
    """

    def __init__(
        self, n_in: int, n_out: int, kind: str, dtype: torch.dtype, *, bias: bool = False, nested: bool = False,
        block: tuple[int, int] = FP8_BLOCK,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.kind, self.dtype = n_in, n_out, kind, dtype
        self.block = (1, n_in) if kind == "int8" else block
        self.nested_offset = 0.0
        count = n_in * n_out
        blocks = -(-count // torch_codes.BLOCK)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if kind == "nf4":
            shapes = {
                "weight": ((-(-count // 2), 1), torch.uint8),
                "absmax": ((blocks,), torch.uint8 if nested else torch.float32),
            }
            if nested:
                shapes["nested_absmax"] = (-(-blocks // torch_codes.NESTED),), torch.float32
                shapes["nested_code"] = (256,), torch.float32
        else:
            high, wide = self.block
            shapes = {
                "weight": ((n_out, n_in), torch.int8 if kind == "int8" else torch.uint8),
                "scale": ((-(-n_out // high), -(-n_in // wide)), torch.float32),
            }
        for name, (shape, of) in shapes.items():
            setattr(self, name, _frozen(torch.empty(shape, dtype=of)))
        self.bias = _frozen(torch.empty(n_out, dtype=dtype)) if bias else None

    @property
    def codes(self) -> Codes:
        return self.codes_of(self._parameters)

    def codes_of(self, held: Mapping[str, Any]) -> Codes:
        """The codes whose tensors, by the parameters' names, are in `held`."""
        shape = self.out_features, self.in_features
        if self.kind != "nf4":
            codes = held["weight"] if self.kind == "int8" else held["weight"].view(torch_codes.E4M3)
            return Scaled(codes, held["scale"], self.block, shape, self.dtype)
        nested = (held["nested_code"], held["nested_absmax"], self.nested_offset) if "nested_code" in held else None
        return NF4(held["weight"], held["absmax"], shape, self.dtype, nested)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedMatrix":
        kept = {name: p.detach() for name, p in self.named_parameters() if name != "bias" and p.dtype == torch.float32}
        self.dtype = fn(self._parameters["weight"].new_empty(0, dtype=self.dtype)).dtype  # type: ignore[union-attr]
        super()._apply(fn, recurse)
        for name, scales in kept.items():  # float32, whatever the model's dtype becomes
            if (now := getattr(self, name)).dtype != scales.dtype:
                setattr(self, name, _frozen(scales.to(now.device)))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}, bias={self.bias is not None}"


class QuantizedLinear(QuantizedMatrix):
    """A frozen linear module that takes the place of an nn.Linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]"""
        return frozen_linear(x, self.codes, self.bias)


class ExpertCodes(QuantizedMatrix):
    """The weights [N, K] of all experts of a layer, one below the other: a child of the module of experts, of the name that the
    parameter had."""

    def __init__(self, experts: int, n_in: int, n_out: int, kind: str, dtype: torch.dtype) -> None:
        super().__init__(n_in, experts * n_out, kind, dtype)
        self.experts = experts

    @property
    def stack(self) -> Stack:
        return Stack(self.codes, self.experts)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def encoded(weight: torch.Tensor, kind: str, *, nested: bool = False) -> dict[str, Any]:
    """Parameter name -> value of a QuantizedMatrix with the weight [N, K]; "nested_offset" is a number.

    Raises ModelError for a weight that is not a matrix of finite floating-point values, or whose number of values is odd
    (nf4 puts two into a byte).
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ModelError(f"expected a matrix in float32, bfloat16 or float16, got {weight.dtype} {list(weight.shape)}")
    if kind == "int8":
        return dict(zip(("weight", "scale"), torch_codes.encode_int8(weight), strict=True))
    if kind == "fp8":
        codes, scale = torch_codes.encode_fp8(weight, FP8_BLOCK)
        return {"weight": codes.view(torch.uint8), "scale": scale}
    if weight.numel() % 2:
        raise ModelError(f"nf4 puts two values into a byte, and {list(weight.shape)} holds an odd number: take int8")
    packed, absmax = torch_codes.encode_nf4(weight)
    if not nested:
        return {"weight": packed, "absmax": absmax}
    codes, code, outer, offset = torch_codes.nest(absmax)
    return {"weight": packed, "absmax": codes, "nested_absmax": outer, "nested_code": code, "nested_offset": offset}


def quantized(linear: nn.Linear, kind: str, *, nested: bool = False) -> QuantizedLinear:
    """A QuantizedLinear of an nn.Linear's weight, on its device. Raises ModelError as `encoded` does."""
    weight = linear.weight
    with torch.device("meta"):
        made = QuantizedLinear(
            linear.in_features, linear.out_features, kind, weight.dtype, bias=linear.bias is not None, nested=nested
        )
    for name, value in encoded(weight, kind, nested=nested).items():
        setattr(made, name, _frozen(value) if isinstance(value, torch.Tensor) else value)
    if linear.bias is not None:
        made.bias = _frozen(linear.bias.detach())
    return made.train(linear.training)


def linear_of(weight: torch.Tensor, module: nn.Module) -> nn.Linear:
    """An nn.Linear with the weight [N, K], and the bias and the mode of `module`."""
    bias: Any = module.bias
    linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight, linear.bias = _frozen(weight), bias if bias is None else _frozen(bias.detach())
    return linear.train(module.training)


def is_nested(codes: Codes) -> bool:
    """Whether the scales are codes, too."""
    return isinstance(codes, NF4) and codes.nested is not None


def forget_quantization(model: Any) -> None:
    """Takes away what marks a model of transformers as quantised."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        for name in ("quantization_config", "_is_quantized"):
            vars(config).pop(name, None)


def reader_of(module: nn.Module) -> Callable[[Any], Codes] | None:
    """A function that reads the codes of such a module's weight; None for other modules than plopfast's, bitsandbytes'
    Linear4bit (nf4) and Linear8bitLt, and transformers' FP8Linear, which are known by what they hold."""
    if isinstance(module, QuantizedLinear):
        return _own
    weight: Any = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None and getattr(state, "quant_type", None) == "nf4" and state.blocksize == torch_codes.BLOCK:
        return _of_bitsandbytes_4bit
    if getattr(weight, "SCB", None) is not None or getattr(getattr(module, "state", None), "SCB", None) is not None:
        return _of_bitsandbytes_8bit
    if getattr(weight, "dtype", None) == torch_codes.E4M3 and getattr(module, "weight_scale_inv", None) is not None:
        return _of_fp8_linear
    return None


def _own(module: QuantizedLinear) -> Codes:
    return module.codes


def _of_bitsandbytes_4bit(module: Any) -> Codes:
    weight, state = module.weight, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return _of_bitsandbytes_on_a_cpu(weight.data, state)
    nested = (state.state2.code, state.state2.absmax, _number(state.offset)) if state.nested else None
    return NF4(weight.data.view(torch.uint8), state.absmax, state.shape, state.dtype, nested)


_NUMBERS: Any = WeakIdKeyDictionary()


def _number(value: torch.Tensor | float) -> float:
    """The value of a 0-d tensor that nobody changes, read once: on a GPU, reading waits for all work before it."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value not in _NUMBERS:
        _NUMBERS[value] = float(value)
    return _NUMBERS[value]


def _of_bitsandbytes_on_a_cpu(packed: torch.Tensor, state: Any) -> Codes:
    """The codes that bitsandbytes reorders in a model's first evaluation on a CPU with AVX-512 bfloat16: a byte has the same
    place in two of 64 codes, and 32 rows lie side by side; absmax, in bfloat16, is transposed."""
    n_out, n_in = state.shape
    codes = torch.cat([packed.reshape(-1, 32) & 15, packed.reshape(-1, 32) >> 4], 1)
    codes = codes.view(n_out // 32, n_in // 2, 32, 2).transpose(1, 2).reshape(-1, 2)
    absmax = state.absmax.T.reshape(-1).float()
    return NF4(codes[:, :1] << 4 | codes[:, 1:], absmax, state.shape, state.original_dtype)


def _of_bitsandbytes_8bit(module: Any) -> Codes:
    state = module.state if getattr(module.weight, "SCB", None) is None else module.weight
    codes = module.weight.data if module.weight.data.dtype == torch.int8 else state.CB
    bias = module.bias
    dtype = bias.dtype if bias is not None else torch.float16
    return Scaled(codes, state.SCB.float()[:, None] / 127.0, (1, codes.shape[1]), codes.shape, dtype)


def _of_fp8_linear(module: Any) -> Codes:
    codes, scale = module.weight.data, module.weight_scale_inv.detach()
    scale = scale.float().reshape(-1, 1) if scale.dim() < 2 else scale.float()
    high, wide = (-(-size // count) for size, count in zip(codes.shape, scale.shape, strict=True))
    block = tuple(module.block_size) if getattr(module, "block_size", None) else (high, wide)
    bias = module.bias
    return Scaled(codes, scale, block, codes.shape, bias.dtype if bias is not None else torch.bfloat16)
