"""Adapters on disk in PEFT's format: adapter_model.safetensors and adapter_config.json in a folder, written atomically."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..models.frozen import fingerprint, frozen_of, is_linear, same_fingerprint
from ..support import files, ranks
from ..support.errors import AdapterError, FileError, PlacementError
from .layer import LoRALinear, adapters, inject, unload
from .placement import Placement, ranks_and_patterns

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = (WEIGHTS, CONFIG)
_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<part>[AB])\.weight")
_UNSUPPORTED = {
    "use_dora": False,
    "modules_to_save": None,
    "lora_bias": False,
    "bias": "none",
    "trainable_token_indices": None,
}

Parts = dict[str, dict[str, torch.Tensor]]  # module name -> "A" [rank, in] and "B" [out, rank]


def save_adapter(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the model's adapters as PEFT does, in the folder `path`, which it returns.

    Ranks and alphas that differ go into `rank_pattern` and `alpha_pattern`. Of several processes, only rank 0 writes, but
    all have to call this.

    Raises AdapterError where the model has no adapters or one of them is not finite, and FileError where the folder
    exists (unless `overwrite`) or cannot be written.
    """
    path = Path(path)
    modules = adapters(model)
    if not modules:
        raise AdapterError("the model has no LoRA adapters to save: inject(model, placement) first")
    metadata = {"format": "pt", "plopfast_base": json.dumps(fingerprint(model, list(modules)))}
    if not ranks.is_main():
        return path
    files.refuse_existing(path, overwrite)
    tensors = {}
    for name, module in modules.items():
        for part, tensor in (("A", module.lora_A), ("B", module.lora_B)):
            if not tensor.isfinite().all():
                raise AdapterError(f"{name}.lora_{part} holds NaN or infinity: not saved")
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor.detach().cpu().contiguous()
    with files.replacing(path) as scratch:
        scratch.mkdir()
        save_file(tensors, scratch / WEIGHTS, metadata)
        files.write_json(scratch / CONFIG, _peft_config(model, modules))
    return path


def _peft_config(model: nn.Module, modules: dict[str, LoRALinear]) -> dict[str, Any]:
    first = next(iter(modules.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        **ranks_and_patterns({name: (module.rank, module.alpha) for name, module in modules.items()}),
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "target_modules": _target_modules(model, list(modules)),
        "fan_in_fan_out": first.frozen.transposed,
        "bias": "none",
        "init_lora_weights": True,
    }


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The names' last components where these match only the adapted modules, else the full names."""
    lasts = {name.rpartition(".")[2] for name in names}
    others = {n.removesuffix(".base") for n, m in model.named_modules() if is_linear(m)} - set(names)
    exact = not any(name.rpartition(".")[2] in lasts for name in others)
    return sorted(lasts) if exact else sorted(names)


def load_adapter(model: nn.Module, path: str | Path, *, check_base: bool = True, backend: str = "auto") -> list[str]:
    """Injects the LoRA adapter in the folder `path`, saved by plopfast or by PEFT, into `model`; returns the modules' names.

    An adapter that plopfast saved knows its base model's weights; `check_base=False` skips that check.

    Raises AdapterError for files that are missing, truncated or of another kind, for PEFT features that plopfast does
    not have, for modules or shapes that this model lacks, and for other base weights than those of the training.
    """
    path = Path(path)
    config = _read_config(path)
    parts, metadata = _read_parts(path)
    _check_base(model, path, parts)
    placed = {name: (len(part["A"]), _alpha(config, name)) for name, part in parts.items()}
    dropout, rslora = float(config.get("lora_dropout") or 0.0), bool(config.get("use_rslora"))
    try:
        names = inject(model, Placement(placed, [], "adapter", 0), dropout=dropout, rslora=rslora, backend=backend)
    except PlacementError as error:
        raise AdapterError(f"{path}: {error}") from error
    saved = metadata.get("plopfast_base")
    if check_base and saved and not same_fingerprint(json.loads(saved), fingerprint(model, names)):
        unload(model)
        raise AdapterError(
            f"{path}: trained on other base weights than this model's (same shapes, other values; dequantised GGUF "
            f"counts as other); its base was {config.get('base_model_name_or_path')!r}: load that, or pass --any-base"
        )
    with torch.no_grad():
        for name, module in adapters(model).items():
            module.lora_A.copy_(parts[name]["A"])
            module.lora_B.copy_(parts[name]["B"])
    return names


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise AdapterError(f"{path}: not an adapter folder, it has no {CONFIG}")
    config = files.read_json(path / CONFIG, "plopfast train")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path / CONFIG}: expected the configuration of a LoRA adapter (peft_type LORA)")
    for key, plain in _UNSUPPORTED.items():
        if config.get(key, plain) not in (plain, None, False, [], {}):
            raise AdapterError(f"{path / CONFIG}: {key} = {config[key]!r} is not supported; merge it with PEFT first")
    return config


def _read_parts(path: Path) -> tuple[Parts, dict[str, str]]:
    """The adapters' tensors and the file's metadata."""
    file = path / WEIGHTS
    if not file.is_file():
        raise AdapterError(f"{file}: no such file (adapters in pickle format, .bin, are not read)")
    try:
        tensors, metadata = files.read_tensors(file, "plopfast train")
    except FileError as error:
        raise AdapterError(str(error)) from error
    parts: Parts = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{file}: unexpected tensor {key!r}; expected *.lora_A.weight, *.lora_B.weight")
        parts.setdefault(match["name"], {})[match["part"]] = tensor
    if not parts:
        raise AdapterError(f"{file}: holds no tensors")
    return parts, metadata


def _check_base(model: nn.Module, path: Path, parts: Parts) -> None:
    """Raises AdapterError where a module of the adapter is incomplete, absent from the model, or of another shape."""
    modules = dict(model.named_modules())
    for name, part in parts.items():
        if set(part) != {"A", "B"}:
            raise AdapterError(f"{path / WEIGHTS}: {name} has lora_{'/'.join(part)} only; the file is incomplete")
        if name not in modules or not is_linear(modules[name]):
            raise AdapterError(f"{path}: made for another base model: this one has no linear module {name!r}")
        n_out, n_in = frozen_of(modules[name], name).shape
        got = [part["A"].shape[1], part["B"].shape[0]]
        if got != [n_in, n_out] or part["A"].shape[0] != part["B"].shape[1]:
            raise AdapterError(
                f"{path}: made for another base model: {name} is {n_in} -> {n_out} here, the adapter's is {got[0]} -> {got[1]}"
            )


def _alpha(config: dict[str, Any], name: str) -> float:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):  # as PEFT matches its patterns
            return float(alpha)
    return float(config.get("lora_alpha", 8))
