"""Adapters in PEFT's format, and the resumable state of a training run: safetensors and JSON, written atomically."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..models.linears import fingerprint, is_linear, is_transposed, same_fingerprint
from ..support import files, ranks
from ..support.errors import AdapterError, PlacementError
from .layer import adapters, inject, unload
from .placement import Placement, ranks_and_patterns

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<part>[AB])\.weight")
_UNSUPPORTED = {
    "use_dora": False,
    "modules_to_save": None,
    "lora_bias": False,
    "bias": "none",
    "trainable_token_indices": None,
}


def save_adapter(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the model's adapters as PEFT does: adapter_config.json and adapter_model.safetensors in the folder `path`.

    Ranks and alphas that differ go into rank_pattern and alpha_pattern. Of several processes, rank 0 alone writes.
    Raises AdapterError where the model has no adapters or weights are not finite, FileError where the folder exists
    (unless `overwrite`) or cannot be written.
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
        files.write_json(scratch / CONFIG, _peft_config(model))
    return path


def _peft_config(model: nn.Module) -> dict[str, Any]:
    modules = adapters(model)
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
        "fan_in_fan_out": is_transposed(first.base),
        "bias": "none",
        "init_lora_weights": True,
    }


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Last name components where they hit exactly the adapted modules, else the full names."""
    lasts = {name.rpartition(".")[2] for name in names}
    others = {n.removesuffix(".base") for n, m in model.named_modules() if is_linear(m)} - set(names)
    exact = not any(name.rpartition(".")[2] in lasts for name in others)
    return sorted(lasts) if exact else sorted(names)


def load_adapter(model: nn.Module, path: str | Path, *, check_base: bool = True, backend: str = "auto") -> list[str]:
    """Injects a LoRA adapter in PEFT's format, ours or PEFT's own, into `model`; returns the modules' names.

    Raises AdapterError for files that are missing, truncated or of another kind, for PEFT features that plopfast does
    not have, for modules or shapes this model lacks, and, for adapters that plopfast saved, where the base model's
    weights are not those it was trained on (`check_base=False` lets that pass).
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise AdapterError(f"{path}: not an adapter folder, it has no {CONFIG}")
    config = files.read_json(path / CONFIG, "plopfast train")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path / CONFIG}: expected the configuration of a LoRA adapter (peft_type LORA)")
    for key, plain in _UNSUPPORTED.items():
        if config.get(key, plain) not in (plain, None, False, [], {}):
            raise AdapterError(f"{path / CONFIG}: {key} = {config[key]!r} is not supported; merge it with PEFT first")
    tensors, metadata = _read(path / WEIGHTS)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{path / WEIGHTS}: unexpected tensor {key!r}; expected *.lora_A.weight, *.lora_B.weight"
            )
        parts.setdefault(match["name"], {})[match["part"]] = tensor
    if not parts:
        raise AdapterError(f"{path / WEIGHTS}: holds no tensors")
    _check_base(model, path, parts)
    ranks = {name: int(part["A"].shape[0]) for name, part in parts.items()}
    placement = Placement({name: (rank, _alpha(config, name)) for name, rank in ranks.items()}, [], "adapter", 0)
    dropout, rslora = float(config.get("lora_dropout") or 0.0), bool(config.get("use_rslora"))
    try:
        names = inject(model, placement, dropout=dropout, rslora=rslora, backend=backend)
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


def _check_base(model: nn.Module, path: Path, parts: dict[str, dict[str, torch.Tensor]]) -> None:
    modules = dict(model.named_modules())
    for name, part in parts.items():
        if set(part) != {"A", "B"}:
            raise AdapterError(f"{path / WEIGHTS}: {name} has lora_{'/'.join(part)} only; the file is incomplete")
        module = modules.get(name)
        if module is None or not is_linear(module):
            raise AdapterError(f"{path}: made for another base model: this one has no linear module {name!r}")
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        n_out, n_in = weight.shape[::-1] if is_transposed(module) else weight.shape
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


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file (adapters in pickle format, .bin, are not read)") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: truncated or not a safetensors file ({error})") from error
