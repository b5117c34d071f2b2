"""Codes as checkpoints hold them: bitsandbytes' nf4 and int8, and FineGrainedFP8. They are read without those packages.

nf4    NAME uint8 [N K / 2, 1], NAME.absmax, NAME.quant_map [16], and NAME.quant_state.bitsandbytes__nf4, the bytes of a JSON
       object; with absmax in uint8, NAME.nested_absmax and NAME.nested_quant_map [256], too
int8   NAME int8 [N, K], and SCB float32 [N] beside it: the largest value of each row
fp8    NAME float8_e4m3fn [N, K], and NAME_scale_inv: one number for each block, for each row, or one at all

NAME is that of the weight, MODULE.weight. N out, K in.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..kernels import torch_codes
from ..support.errors import ModelError
from . import weights
from .frozen import is_transposed
from .quantized import FP8_BLOCK, QuantizedLinear
from .quantizer import check_untied, replace
from .spool import mapped_tensors

WORDS = {"U8": "nf4", "I8": "int8", "F8_E4M3": "fp8"}  # what a weight of this safetensors type is taken for
PARTS = {  # what belongs to the weight of a module; without the first no code can be decoded
    "nf4": (
        ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
        ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
    ),
    "int8": (".SCB", ".weight_format"),
    "fp8": (".weight_scale_inv", ".activation_scale"),
}  # fmt: skip
AGAIN = "download or save the checkpoint again"
NESTED = ("absmax", "nested_absmax", "nested_quant_map")


class Stored:
    """Reads codes of `kind` from safetensors files, for the modules whose weights are codes there; a Way of quantizer.py."""

    def __init__(
        self, source: str, files: Sequence[Path], kind: str, block: tuple[int, int] = FP8_BLOCK,
        keep: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    ) -> None:  # fmt: skip
        self.source, self.kind, self.block = source, kind, block
        self._tensors, self._keep = mapped_tensors(files), keep  # by default a copy: the file may go away
        self._files = [safe_open(file, framework="numpy") for file in files]
        self._of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        self._bad: dict[str, None] = {}
        self._state: dict[str, dict[str, Any]] = {}  # of nf4: name in the checkpoint -> the JSON object
        self._places: dict[str, str] = {}  # name in the model -> in the checkpoint
        self._coded = [n.removesuffix(".weight") for n in self._of if n.endswith(".weight") and self._is_codes(n)]
        names = (f"{module}{part}" for module in self._coded for part in (".weight", *PARTS[kind]))
        self.ignored = [f"^(?:{'|'.join(re.escape(name) for name in names if name in self._of)})$"]

    def _is_codes(self, name: str) -> bool:
        """Whether a weight is codes: its type says so, or what decodes it lies beside it."""
        return self._type(name) in WORDS or name.removesuffix(".weight") + PARTS[self.kind][0] in self._of

    def _slice(self, name: str) -> Any:
        return self._of[name].get_slice(name)

    def _type(self, name: str) -> str:
        return self._slice(name).get_dtype()

    def _read(self, name: str) -> torch.Tensor:
        return self._keep(self._tensors[name])

    def _finite(self, name: str) -> torch.Tensor:
        value = self._read(name)
        value = value if value.dtype in (torch.uint8, torch.int8, torch_codes.E4M3) else value.float()
        if not weights.is_finite(value):
            self._bad[name] = None
        return value

    def _error(self, name: str, expected: str, got: object, remedy: str = AGAIN) -> ModelError:
        return ModelError(f"{self.source}: {name}: expected {expected}, got {got}: {remedy}")

    def swap(self, model: Any) -> None:
        for module in self._coded:
            name = f"{module}.weight"
            if (kind := WORDS.get(self._type(name), self.kind)) != self.kind:
                raise self._error(name, f"{self.kind}, as config.json says", f"{self._type(name)}, which is {kind}")
            place = self._place(model, module)
            n_out, n_in = _shape(model.get_submodule(place))
            check_untied(model, place, "save the checkpoint with a dense embedding")
            more = getattr(self, f"_check_{self.kind}")(name, module, n_out, n_in)
            dtype = next(model.parameters()).dtype
            made = replace(model, place, n_in, n_out, self.kind, dtype, **more)
            for key in [key for key in made._parameters if key != "bias"]:
                later: Any = made._parameters.pop(key).detach()  # transformers does not miss what is no parameter
                later._is_hf_initialized = True  # and some models would draw random values for it
                setattr(made, key, later)
            self._places[place] = module
        if not self._places:
            raise self._error("config.json", f"{self.kind} weights, as its quantization_config says", "none", AGAIN)

    def _place(self, model: Any, module: str) -> str:
        """The linear module that the checkpoint means: its names may lack the name of the model's body, or have one more."""
        prefix = f"{model.base_model_prefix}."
        for name in module, prefix + module, module.removeprefix(prefix):
            try:
                found = model.get_submodule(name)
            except AttributeError:
                continue
            if isinstance(found, nn.Linear) or is_transposed(found):
                return name
        raise ModelError(
            f"{self.source}: {module}.weight is {self.kind}, and the model has no linear module of this name (the experts of a "
            "mixture are one tensor here): give the checkpoint in bfloat16, and --quantize"
        )

    def _sized(self, name: str, types: Sequence[str], count: int, shape: Sequence[int] | None = None) -> None:
        """Raises ModelError where a tensor is missing, of another type, or of another size or shape."""
        words = f"{' or '.join(types)} {list(shape) if shape else f'[{count}]'}"
        if name not in self._of:
            raise self._error(name, words, "no such tensor")
        found = self._slice(name).get_shape()
        if self._type(name) not in types or math.prod(found) != count or (shape and list(shape) != found):
            raise self._error(name, words, f"{self._type(name)} {found}")

    def _check_nf4(self, name: str, module: str, n_out: int, n_in: int) -> dict[str, Any]:
        key = f"{name}.quant_state.bitsandbytes__nf4"
        if f"{name}.quant_state.bitsandbytes__fp4" in self._of:
            raise self._error(name, "nf4", "fp4, bitsandbytes' other 4-bit type", "quantise the model again, as nf4")
        if key not in self._of:
            raise self._error(key, "a JSON object that describes the codes", "no such tensor")
        state = self._state[module] = self._json(key)
        wanted = {"quant_type": "nf4", "blocksize": torch_codes.BLOCK, "shape": [n_out, n_in]}
        for what, value in wanted.items():
            if state.get(what) != value:
                remedy = "quantise the model again, with the usual block size" if what == "blocksize" else AGAIN
                raise self._error(key, f"{what} {value}", state.get(what), remedy)
        count = n_out * n_in
        blocks = -(-count // torch_codes.BLOCK)
        stored = self._type(name) if name in self._of else "U8"
        size = {"BF16": 2, "F16": 2, "F32": 4}.get(stored, 1)  # bnb_4bit_quant_storage
        self._sized(name, ("U8",) if size == 1 else (stored,), -(-count // 2) // size)
        nested = f"{name}.nested_absmax" in self._of or self._type_or_none(f"{name}.absmax") == "U8"
        self._sized(f"{name}.absmax", ("U8",) if nested else ("F32",), blocks)
        self._sized(f"{name}.quant_map", ("F32",), 16)
        if nested:
            self._sized(f"{name}.nested_absmax", ("F32",), -(-blocks // torch_codes.NESTED))
            self._sized(f"{name}.nested_quant_map", ("F32",), 256)
            offset = state.get("nested_offset")
            if state.get("nested_blocksize") != torch_codes.NESTED:
                raise self._error(key, f"nested_blocksize {torch_codes.NESTED}", state.get("nested_blocksize"))
            if not isinstance(offset, float | int) or not math.isfinite(offset):
                raise self._error(key, "a finite nested_offset", offset)
        return {"nested": nested}

    def _type_or_none(self, name: str) -> str | None:
        return self._type(name) if name in self._of else None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(bytes(self._read(name).tolist()))
        except (ValueError, TypeError):
            value = None
        if not isinstance(value, dict):
            raise self._error(name, "a JSON object", "other bytes")
        return value

    def _check_int8(self, name: str, module: str, n_out: int, n_in: int) -> dict[str, Any]:
        self._sized(name, ("I8",), n_out * n_in, (n_out, n_in))
        self._sized(f"{module}.SCB", ("F32", "F16", "BF16"), n_out)
        return {}

    def _check_fp8(self, name: str, module: str, n_out: int, n_in: int) -> dict[str, Any]:
        self._sized(name, ("F8_E4M3",), n_out * n_in, (n_out, n_in))
        key, types = f"{name}_scale_inv", ("F32", "BF16", "F16", "F8_E8M0")
        if key not in self._of:
            raise self._error(key, "the scales", "no such tensor")
        shape = self._slice(key).get_shape()
        count = math.prod(shape)
        if count == 1:
            block = (n_out, n_in)
        elif count == n_out and shape in ([n_out], [n_out, 1]):
            block = (1, n_in)
        else:
            block = self.block
            self._sized(key, types, count, (-(-n_out // block[0]), -(-n_in // block[1])))
        self._sized(key, types, count)
        return {"block": block}

    def takes(self, name: str) -> bool:
        return False

    def convert(self, model: Any, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        raise AssertionError("it takes none")

    def fill(self, model: Any) -> None:
        for place, module in self._places.items():
            target = model.get_submodule(place)
            for key, value in getattr(self, f"_read_{self.kind}")(f"{module}.weight", module, target).items():
                setattr(
                    target, key, nn.Parameter(value, requires_grad=False) if isinstance(value, torch.Tensor) else value
                )

    def _read_nf4(self, name: str, module: str, target: QuantizedLinear) -> dict[str, Any]:
        levels = self._read(f"{name}.quant_map")
        if not torch.allclose(levels, torch.tensor(torch_codes.LEVELS), rtol=0, atol=1e-6):
            raise self._error(f"{name}.quant_map", "the 16 levels of nf4", levels.tolist())
        found: dict[str, Any] = {"weight": self._read(name).view(torch.uint8).view(-1, 1)}
        if self._type(f"{name}.absmax") != "U8":
            return found | {"absmax": self._finite(f"{name}.absmax").view(-1)}
        absmax, nested, code = (self._finite(f"{name}.{part}").view(-1) for part in NESTED)
        offset = float(self._state[module]["nested_offset"])
        return found | {"absmax": absmax, "nested_absmax": nested, "nested_code": code, "nested_offset": offset}

    def _read_int8(self, name: str, module: str, target: QuantizedLinear) -> dict[str, Any]:
        return {"weight": self._read(name), "scale": self._finite(f"{module}.SCB").view(-1, 1) / 127.0}

    def _read_fp8(self, name: str, module: str, target: QuantizedLinear) -> dict[str, Any]:
        n_out, n_in = target.out_features, target.in_features
        high, wide = target.block
        scale = self._finite(f"{name}_scale_inv").view(-(-n_out // high), -(-n_in // wide))
        return {"weight": self._finite(name).view(torch.uint8), "scale": scale}

    def check(self, source: str, found: dict[str, Any]) -> None:
        weights.refuse_nonfinite(self._bad, f"model {source!r}")


def _shape(module: Any) -> tuple[int, int]:
    """[out, in]"""
    one, other = module.weight.shape
    return (other, one) if is_transposed(module) else (one, other)
