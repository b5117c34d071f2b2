"""Writes a model as Hugging Face does, one that keeps codes too: as bitsandbytes (nf4, int8) or FineGrainedFP8 would.

So the folder can be read by plopfast (see stored.py for the format), and by transformers with those packages.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels import torch_codes
from ..support.errors import ModelError
from .quantized import FP8_BLOCK, QuantizedLinear, is_nested
from .quantized_experts import codes_in


def save_model(model: Any, folder: str | Path) -> None:
    """Writes config.json and safetensors into `folder`. Experts that are codes are written dense, with a warning: no such folder
    holds their codes. Raises ModelError for codes of several kinds, and for fp8 in other blocks than 128 x 128."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not modules:
        return model.save_pretrained(folder)
    kept_kind(model)
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    settings, quantizer = _settings(modules, dense, model.dtype), vars(model).pop("hf_quantizer", None)
    model.config.quantization_config = settings
    try:
        model.save_pretrained(folder, state_dict=stored_state(model, modules))
    finally:
        del model.config.quantization_config
        if quantizer is not None:
            model.hf_quantizer = quantizer


def kept_kind(model: nn.Module) -> str | None:
    """The kind of codes that the model's linear weights are; None for dense weights. Raises ModelError for several kinds."""
    kinds = {module.kind for module in model.modules() if isinstance(module, QuantizedLinear)}
    if len(kinds) > 1:
        raise ModelError(f"the model keeps codes of several kinds ({', '.join(sorted(kinds))}): make it dense first")
    return next(iter(kinds), None)


def stored_state(model: nn.Module, modules: dict[str, QuantizedLinear]) -> dict[str, torch.Tensor]:
    """The model's tensors by their names in a checkpoint."""
    state = model.state_dict()
    if experts := codes_in(model):
        warnings.warn(
            f"{len(experts)} weights of experts are written dense: checkpoints do not hold their codes", stacklevel=3
        )
    for name, (_, weight) in experts.items():
        for key in weight.held._parameters:
            state.pop(f"{name}.{key}", None)
        state[name] = weight.plus()
    for name, module in modules.items():
        for key in [key for key in module._parameters if key != "bias"]:
            state.pop(f"{name}.{key}", None)
        state |= {f"{name}.{key}": tensor.detach() for key, tensor in _tensors(name, module).items()}
    return state


def _tensors(name: str, module: Any) -> dict[str, torch.Tensor]:
    device = module.weight.device
    if module.kind == "int8":
        row_format = torch.tensor(0, dtype=torch.uint8, device=device)
        return {"weight": module.weight, "SCB": module.scale.view(-1) * 127.0, "weight_format": row_format}
    if module.kind == "fp8":
        blocks = -(-module.out_features // FP8_BLOCK[0]), -(-module.in_features // FP8_BLOCK[1])
        if module.scale.shape != blocks:  # a small matrix is one block of any size
            raise ModelError(
                f"{name}: fp8 in blocks of {module.block}, and only {FP8_BLOCK} can be written: make it dense"
            )
        return {"weight": module.weight.view(torch_codes.E4M3), "weight_scale_inv": module.scale}
    described = {
        "quant_type": "nf4", "blocksize": torch_codes.BLOCK, "dtype": str(module.dtype).removeprefix("torch."),
        "shape": [module.out_features, module.in_features],
    }  # fmt: skip
    found = {"weight": module.weight, "weight.absmax": module.absmax}
    if is_nested(module.codes):
        described |= {
            "nested_blocksize": torch_codes.NESTED, "nested_dtype": "float32", "nested_offset": module.nested_offset
        }  # fmt: skip
        found |= {"weight.nested_absmax": module.nested_absmax, "weight.nested_quant_map": module.nested_code.clone()}
    levels = torch.tensor(torch_codes.LEVELS, device=device)
    packed = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8, device=device)
    return found | {"weight.quant_map": levels, "weight.quant_state.bitsandbytes__nf4": packed}


def _settings(modules: dict[str, QuantizedLinear], dense: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """quantization_config of config.json."""
    first = next(iter(modules.values()))
    if first.kind == "fp8":
        return {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(FP8_BLOCK),
            "modules_to_not_convert": dense,
        }  # fmt: skip
    settings = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": dense}
    if first.kind == "int8":
        return settings | {"load_in_8bit": True, "load_in_4bit": False}
    return settings | {
        "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."), "bnb_4bit_use_double_quant": is_nested(first.codes),
    }  # fmt: skip
