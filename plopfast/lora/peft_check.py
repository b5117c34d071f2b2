"""Whether PEFT, where it is installed, would load an adapter's files as they are: its own key logic says so.

PEFT 0.19 and later rename keys of some families to those that transformers 5 gave their weights, also keys that have the new
name already, and drop with a warning what no longer fits (huggingface/peft#3711). PEFT also refuses some modules by name.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

REFUSED = {"out_proj", "conv1d"}  # last components of names that PEFT refuses in some families
WAY_OUT = "load it with plopfast's load_adapter, or merge it (plopfast merge) and share the merged model"


def not_loaded(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """A line that says what PEFT would not load of `tensors` (adapter_model.safetensors) under `config`
    (adapter_config.json) into `model`, and the way out; None where it loads all, or is not installed."""
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
    if not _is_renamed(model) and not {name.rpartition(".")[2] for name in names} & REFUSED:
        return None
    try:
        import peft
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check_name
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers as convert,
        )
    except ImportError:  # not installed, or a version that renames nothing
        return None
    theirs: Any = peft.LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})
    refused = []
    for name in names:
        try:
            check_name(theirs, model, name.rpartition(".")[2])
        except ValueError:
            refused.append(name)
    if refused:
        return f"PEFT {peft.__version__} refuses {_some(refused)}: {WAY_OUT}"
    try:
        kept = convert(model, theirs, {key: tensor.to("meta") for key, tensor in tensors.items()})
    except Exception as error:  # it is no part of PEFT's interface, and must cost nobody an adapter
        return f"PEFT {peft.__version__} could not say whether it would load it ({type(error).__name__}: {error})"
    if lost := [key.removeprefix("base_model.model.") for key in tensors if key not in kept]:
        return f"PEFT {peft.__version__} renames {_some(lost)} when it loads, and drops what it renamed: {WAY_OUT}"
    return None


def _is_renamed(model: nn.Module) -> bool:
    """Whether transformers has other names for weights of this family's checkpoints; importing PEFT takes 3 s."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping as mapping
    except ImportError:
        return True
    return mapping(getattr(getattr(model, "config", None), "model_type", "")) is not None


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return first + f" and {len(others)} more" * bool(others)
