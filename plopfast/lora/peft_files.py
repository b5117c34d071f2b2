"""Adapters on disk in PEFT's format: adapter_model.safetensors and adapter_config.json in a folder, written atomically."""

import json
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..models.experts import mixtures, weight_at
from ..models.fingerprints import SAME, SAME_QUANTIZED, fingerprint, kinds_of, same_fingerprint
from ..models.frozen import DTYPES, frozen_of, is_linear
from ..models.routed import ExpertWeight
from ..models.weights import is_finite
from ..support import files, ranks
from ..support.errors import AdapterError, FileError, PlacementError
from ..support.schema import checked
from .adapter_config import CONFIG, AdapterConfig, Dropout, not_known, read_config
from .expert_files import NATURAL, from_file, names_in_file, to_file
from .experts import ExpertLoRA, adapted_mixtures
from .injection import check_name, inject, undone_on_error
from .layer import LoRALinear, adapters
from .many import adapter_names, named_places, plain_modules
from .peft_check import not_loaded
from .peft_targets import WEIGHT, key_of, targets_of
from .placement import Placement, ends_of, ranks_and_patterns
from .replaced import check_values, replace_values, replaced_values

WEIGHTS = "adapter_model.safetensors"
FILES = (WEIGHTS, CONFIG)
_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?:(?P<part>[AB])\.weight|magnitude_vector)")
_WHOLE = re.compile(r"base_model\.model\.(?!.*\.lora_)(?P<name>.+)")
MAGNITUDE = "magnitude"
# module name -> "A" [rank, in], "B" [out, rank], and with DoRA MAGNITUDE [out, 1]
Parts = dict[str, dict[str, torch.Tensor]]


def save_adapter(model: nn.Module, path: str | Path, *, overwrite: bool = False, name: str | None = None) -> Path:
    """Writes the model's adapters as PEFT does, in the folder `path`, which it returns; of several with names, that of `name`.

    Ranks and alphas that differ go into `rank_pattern` and `alpha_pattern`. Where PEFT is installed and would not load the files
    as they are, a warning says so (`peft_check`). Values that a loaded adapter had replaced whole are written again, as
    modules_to_save or biases. Of several processes, only rank 0 writes, but all have to call this.

    Raises AdapterError where the model has no adapters or one of them is not finite, and FileError where the folder
    exists (unless `overwrite`) or cannot be written.

    >>> names = pf.inject(model, pf.place(pf.score(model, batches), rank=4))
    >>> folder = pf.save_adapter(model, "adapter")
    >>> names == pf.unload(model) == pf.load_adapter(model, folder)
    True
    """
    return save_with(model, path, overwrite=overwrite, name=name)


def save_with(
    model: nn.Module, path: str | Path, beside: Callable[[Path], None] = lambda folder: None, *, overwrite: bool = False,
    name: str | None = None, mine: Callable[[str], bool] = lambda file: False,
) -> Path:  # fmt: skip
    """As `save_adapter`; `beside` writes more into the folder before it takes its place, and files of an earlier folder without a
    successor may be lost if they are `mine`."""
    path = Path(path)
    modules = adapters(model, name)
    if not modules and (known := adapter_names(model)):
        raise AdapterError(
            f"expected the name of one of the model's adapters ({', '.join(known)}), got {name!r}: give name="
        )
    if not modules:
        raise AdapterError("the model has no LoRA adapters to save: inject(model, placement) first")
    if any(place.merged for place in named_places(model)):
        raise AdapterError("an adapter is merged into the weights: unmerge_adapter(model) first")
    metadata = {
        "format": "pt",
        "plopfast_base": json.dumps(fingerprint(model, list(modules))),
        "plopfast_base_kind": kinds_of(model, modules),
        "plopfast_dropout": str(next(iter(modules.values())).dropout),
    }
    if not ranks.is_main():
        return path
    files.refuse_existing(path, overwrite)
    tensors, places = {}, names_in_file(adapted_mixtures(model), modules)
    for name, module in modules.items():
        for part, tensor in _tensors_of(module).items():
            if not is_finite(tensor):
                raise AdapterError(f"{name}.lora_{part.removesuffix('.weight')} holds NaN or infinity: not saved")
            key = f"base_model.model.{places.get(name, name)}.lora_{part}"
            tensors[key] = tensor.detach().cpu().contiguous()
    whole = {_name_in_peft(name, modules): value for name, value in replaced_values(model).items()}
    tensors |= {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in whole.items()}
    config = _peft_config(model, modules) | _whole_in_config([*whole])
    said = not_loaded(model, config, tensors)
    with files.replacing(path, mine=mine) as scratch:
        scratch.mkdir()
        save_file(tensors, scratch / WEIGHTS, metadata)
        files.write_json(scratch / CONFIG, config)
        beside(scratch)
    if said:
        warnings.warn(f"{path}: {said}", stacklevel=3)
    return path


def _tensors_of(module: Any) -> dict[str, torch.Tensor]:
    """The end of a key in the file -> its tensor."""
    if isinstance(module, ExpertLoRA):
        return {f"{part}.weight": tensor for part, tensor in to_file(module).items()}
    found = {"A.weight": module.lora_A, "B.weight": module.lora_B}
    return found if module.lora_magnitude is None else {**found, "magnitude_vector": module.lora_magnitude}


def _name_in_peft(name: str, modules: Collection[str]) -> str:
    """The name in PEFT's model of a parameter, which may be of an adapted module's base."""
    owner, _, key = name.rpartition(".")
    inner = owner.removesuffix(".base")
    return f"{inner}.base_layer.{key}" if owner != inner and inner in modules else name


def _whole_in_config(names: list[str]) -> dict[str, Any]:
    """The fields modules_to_save and bias for values that an adapter replaces whole."""
    to_save = sorted({name.rpartition(".")[0] for name in names if not name.endswith(".bias")})
    biases = [name for name in names if name.rpartition(".")[0] not in to_save]
    kind = "all" if any(".base_layer." not in name for name in biases) else "lora_only" if biases else "none"
    return {"bias": kind, "modules_to_save": to_save or None}


def _peft_config(model: nn.Module, modules: dict[str, Any]) -> dict[str, Any]:
    linears = [module for module in modules.values() if isinstance(module, LoRALinear)]
    first = next(iter(linears or modules.values()))
    dora = first.lora_magnitude is not None
    targets = targets_of(model, list(modules), as_parameters=not dora)  # PEFT has no DoRA of parameters
    parameters = targets.get("target_parameters", [])
    ranks = {key_of(name, parameters): (module.rank, module.alpha) for name, module in modules.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        **ranks_and_patterns(ranks),
        "lora_dropout": 0.0 if parameters else first.dropout,  # PEFT has none for parameters
        "use_rslora": first.rslora,
        "use_dora": dora,
        **targets,
        "fan_in_fan_out": bool(linears) and first.frozen.transposed,
        "init_lora_weights": True,
    }


def load_adapter(
    model: nn.Module, path: str | Path, *, check_base: bool = True, backend: str = "auto", name: str | None = None
) -> list[str]:
    """Injects the LoRA adapter in the folder `path`, saved by plopfast or by PEFT, into `model`; returns the modules' names.
    With a `name`, the model takes several, see `inject`; what an adapter replaces whole would be theirs all, and is refused.

    An adapter that plopfast saved knows its base model's weights; `check_base=False` skips that check. One that was trained
    on quantised weights is taken by the dense model, too, and the other way round, with a warning. If an error is raised,
    the model is unchanged.

    Raises AdapterError for files that are missing, truncated or of another kind, for NaN and infinity, for PEFT features
    that plopfast does not have (see adapter_config.py), for modules or shapes that this model lacks, for modules that share
    a weight, and for other base weights than those of the training.
    """
    path = Path(path)
    check_name(model, name)
    config = read_config(path)
    parts, whole, metadata = _read_parts(path)
    if name is not None and whole:
        raise AdapterError(
            f"{path}: replaces {min(whole)} whole, which rows with other adapters would have, too: load it without a name"
        )
    early = "plopfast_base" not in metadata and config.peft_version < NATURAL
    of_experts = _taken_from(parts, model, path, config, early)
    _check_base(model, path, parts, config.dora)
    check_values(model, path, whole, config.modules_to_save, config.bias)
    sizes = {name: a_ERK.shape[1] for name, (a_ERK, _) in of_experts.items()}
    placed = config.placed(sizes | {name: len(part["A"]) for name, part in parts.items()}, of_experts)
    saved = _fingerprint(path, metadata)
    theirs, ours = metadata.get("plopfast_base_kind", "dense"), kinds_of(model, placed)
    within = SAME if theirs == ours else SAME_QUANTIZED
    if check_base and saved is not None and not same_fingerprint(saved, fingerprint(model, list(placed)), within):
        raise AdapterError(
            f"{path}: trained on other base weights than this model's (same shapes, other values; dequantised GGUF "
            f"counts as other); its base was {config.base!r:.200}: load that, or pass --any-base"
        )
    if saved is not None and theirs != ours:
        warnings.warn(
            f"{path}: trained on {theirs} weights, and this model's are {ours}: its answers differ a little from those of the "
            "training",
            stacklevel=2,
        )
    placement = Placement(placed, [], "adapter", 0)
    try:
        with torch.no_grad(), undone_on_error(model, name):
            replace_values(model, whole)
            names = inject(
                model, placement, dropout=_dropout(path, config, metadata), rslora=config.rslora, dora=config.dora, backend=backend,
                name=name,
            )  # fmt: skip
            for place, module in adapters(model, name).items():
                a, b = of_experts[place] if place in of_experts else (parts[place]["A"], parts[place]["B"])
                module.lora_A.copy_(a)
                module.lora_B.copy_(b)
                if module.lora_magnitude is not None:
                    module.lora_magnitude.copy_(parts[place][MAGNITUDE][:, 0])
    except PlacementError as error:
        raise AdapterError(f"{path}: {error}") from error
    return names


def check_files(path: str | Path) -> None:
    """Raises AdapterError for a folder that holds no adapter, or a damaged one, as far as that shows without its base model."""
    read_config(Path(path))
    _read_parts(Path(path))


def _taken_from(
    parts: Parts, model: nn.Module, path: Path, config: AdapterConfig, early: bool
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Takes the tensors of experts out of `parts`: name of the weight -> lora_A [E, R, K] and lora_B [E, N, R]."""
    if not config.parameters:
        return {}
    found, places = {}, names_in_file(mixtures(model), config.parameters)
    linears = [name + WEIGHT for name, module in plain_modules(model).items() if is_linear(module)]
    met = {end for name in (*linears, *places) for end in (name, *ends_of(name))}
    if unknown := [one for one in config.parameters if one not in met]:
        raise AdapterError(not_known(config.file, unknown))
    for name, place in places.items():
        if {"A", "B"} - set(part := parts.pop(place, {})):
            raise AdapterError(f"{path / WEIGHTS}: no lora_A and lora_B of {place}, which are those of {name}")
        weight = weight_at(model, name)
        assert isinstance(weight, ExpertWeight)
        try:
            found[name] = from_file(name, part, weight, early)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None
    return found


def _dropout(path: Path, config: AdapterConfig, metadata: dict[str, str]) -> float:
    """The dropout rate of the training: the file's where the configuration cannot hold it."""
    if config.dropout or not config.parameters or "plopfast_dropout" not in metadata:
        return config.dropout
    where = f"{path / WEIGHTS}: plopfast_dropout in its metadata"
    try:
        return checked(Dropout, files.parse_json(where, metadata["plopfast_dropout"]), where, "was it edited?")
    except FileError as error:
        raise AdapterError(str(error)) from error


def _fingerprint(path: Path, metadata: dict[str, str]) -> list[float] | None:
    """The first weights of the base, which plopfast wrote into the file's metadata; PEFT does not."""
    if "plopfast_base" not in metadata:
        return None
    where = f"{path / WEIGHTS}: plopfast_base in its metadata"
    try:
        return checked(list[float], files.parse_json(where, metadata["plopfast_base"]), where, "was it edited?")
    except FileError as error:
        raise AdapterError(str(error)) from error


def _read_parts(path: Path) -> tuple[Parts, dict[str, torch.Tensor], dict[str, str]]:
    """The adapters' tensors, parameter name -> value of what they replace whole, and the file's metadata."""
    file = path / WEIGHTS
    if not file.is_file():
        raise AdapterError(f"{file}: no such file (adapters in pickle format, .bin, are not read)")
    try:
        tensors, metadata = files.read_tensors(file, "plopfast train")
    except FileError as error:
        raise AdapterError(str(error)) from error
    parts: Parts = {}
    whole = {}
    for key, tensor in tensors.items():
        if other := _WHOLE.fullmatch(key):
            if tensor.dtype not in DTYPES or not is_finite(tensor.float()):
                raise AdapterError(f"{file}: {key} holds NaN or infinity, or {tensor.dtype}; train it again")
            whole[other["name"].replace(".base_layer.", ".")] = tensor
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{file}: unexpected tensor {key!r}; expected *.lora_A.weight, *.lora_B.weight, and with DoRA *.lora_magnitude_vector"
            )
        part = match["part"] or MAGNITUDE
        if part == MAGNITUDE and tensor.dim() == 1:
            tensor = tensor[:, None]
        if tensor.dim() != 2 or tensor.dtype not in DTYPES:
            raise AdapterError(f"{file}: {key}: expected a matrix of floats, got {tensor.dtype} {list(tensor.shape)}")
        if not is_finite(tensor.float()):
            raise AdapterError(f"{file}: {match['name']}.lora_{part} holds NaN or infinity; train it again")
        parts.setdefault(match["name"], {})[part] = tensor
    if not parts:
        raise AdapterError(f"{file}: holds no tensors")
    return parts, whole, metadata


def _check_base(model: nn.Module, path: Path, parts: Parts, dora: bool) -> None:
    """Raises AdapterError where a module of the adapter is incomplete, absent from the model, or of another shape."""
    modules = plain_modules(model)
    for name, part in parts.items():
        if dora != (MAGNITUDE in part) and {"A", "B"} <= set(part):
            raise AdapterError(
                f"{path / WEIGHTS}: {name} has {'a' if MAGNITUDE in part else 'no'} lora_magnitude_vector, and {CONFIG} says use_dora "
                f"{str(dora).lower()}; was it edited?"
            )
        if set(part) - {MAGNITUDE} != {"A", "B"}:
            raise AdapterError(f"{path / WEIGHTS}: {name} has lora_{'/'.join(part)} only; the file is incomplete")
        if name not in modules or not is_linear(modules[name]):
            raise AdapterError(f"{path}: made for another base model: this one has no linear module {name!r}")
        n_out, n_in = frozen_of(modules[name], name).shape
        got = [part["A"].shape[1], part["B"].shape[0]]
        if dora and part[MAGNITUDE].shape != (n_out, 1):
            raise AdapterError(
                f"{path}: made for another base model: {name} has {n_out} rows here, lora_magnitude_vector {len(part[MAGNITUDE])}"
            )
        if got != [n_in, n_out] or part["A"].shape[0] != part["B"].shape[1]:
            raise AdapterError(
                f"{path}: made for another base model: {name} is {n_in} -> {n_out} here, the adapter's is {got[0]} -> {got[1]}"
            )
