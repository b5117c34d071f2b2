"""A model without values, built from its configuration alone: shapes and dtypes on torch's device "meta".

    model = model_of("meta-llama-3-8b", dtype=torch.bfloat16, quantize="nf4")

No weight is read and nothing is downloaded. `miniature` is a small model of the same family with values, from which can be
learned what takes values to find out.
"""

import copy
from pathlib import Path
from typing import Any

import torch

from ..support.errors import ModelError, PlopfastError, first_line, nearest
from . import sources
from .known import KNOWN, known
from .loading import DEFAULT_HUB_ID, check_quantize, shapes_source
from .quantizer import Encoding

MOST = {"num_hidden_layers": 1000, "hidden_size": 1 << 20, "vocab_size": 1 << 24, "intermediate_size": 1 << 22}
NOT_CAUSAL = (
    "MaskedLM",
    "Classification",
    "ConditionalGeneration",
    "Answering",
    "PreTraining",
    "Seq2Seq",
    "MultipleChoice",
)
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "vocab_size": 128, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LAYERS, HEADS, HEAD_DIM = 2, 4, 16


def config_of(name: str) -> tuple[Any, dict[str, Any]]:
    """(transformers' configuration, the JSON object it was made of) of a name in `KNOWN`, a config.json, a folder with one,
    or a hub repository in the cache.

    Raises ModelError for all other names, broken JSON, a family that transformers does not know or that is no causal language
    model, models of images or sound, and sizes that no model has.
    """
    raw = known(name) if not Path(name).exists() else None
    raw = dict(raw) if raw is not None else _read(name)
    import transformers

    family = raw.get("model_type")
    if not isinstance(family, str) or family not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"{name}: its model_type is {family!r:.60}, which transformers {transformers.__version__} does not know: give the "
            "config.json of an architecture that it has"
        )
    plain = {key: value for key, value in raw.items() if key not in (*sources.LOCAL, "auto_map", "quantization_config")}
    try:
        config = transformers.CONFIG_MAPPING[family].from_dict(plain)
    except Exception as error:  # odd values make it raise anything
        raise ModelError(
            f"{name}: not a configuration of {family} ({first_line(error) or type(error).__name__})"
        ) from error
    _check(name, config, raw)
    return config, raw


def _read(name: str) -> dict[str, Any]:
    """The JSON object of a config.json: of the file or folder `name`, or of a hub repository in the cache."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file() and not name.endswith(".json"):
        path = _cached(name)
    return sources.json_object(path)


def _cached(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        found = None
    if isinstance(found, str):
        return Path(found)
    if name == DEFAULT_HUB_ID:
        return Path(shapes_source(name)) / "config.json"
    raise ModelError(
        f"model config {name!r}: expected a config.json, a folder with one, a hub repository in the cache, or one of "
        f"{', '.join(KNOWN)}{nearest(name.lower(), [*KNOWN])}"
    )


def _check(name: str, config: Any, raw: dict[str, Any]) -> None:
    import transformers

    asked = raw.get("architectures")
    odd = [one for one in asked if any(word in str(one) for word in NOT_CAUSAL)] if isinstance(asked, list) else []
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or odd:
        what = odd[0] if odd else config.model_type
        raise ModelError(f"{name}: {what} is not a causal language model: give the config.json of one")
    if parts := sources.towers(config):
        raise ModelError(f"{name}: a multimodal model (with {' and '.join(parts)}): give a text-only checkpoint of it")
    text = config.get_text_config()
    for key, most in MOST.items():
        size = getattr(text, key, None)
        if size is not None and not (isinstance(size, int) and not isinstance(size, bool) and 0 < size <= most):
            raise ModelError(f"{name}: {key}: expected a whole number from 1 to {most}, got {size!r:.60}")


def model_of(
    name: str, *, dtype: torch.dtype = torch.bfloat16, quantize: str | None = None, quantize_head: bool = False,
    layers: int | None = None,
) -> Any:  # fmt: skip
    """A causal language model on "meta" as `loading.load_model` would load it, in evaluation mode. `layers`: only so many.

    Raises what `config_of` raises; ModelError for a model that cannot be quantised, and ConfigError for a kind that there is
    not.
    """
    check_quantize(quantize, quantize_head)
    config, raw = config_of(name)
    stored = sources.kind_in(raw, name)
    if stored is not None and quantize is not None:
        raise ModelError(f"{name}: its weights are {stored[0]} already: leave out --quantize")
    if layers is not None:
        _cut(config.get_text_config(), layers)
    try:
        model = _built(config, dtype, torch.device("meta"))
    except PlopfastError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name}: no model can be built from this configuration ({first_line(error) or type(error).__name__})"
        ) from error
    model.name_or_path = name
    kind = quantize or (stored[0] if stored is not None else None)
    if kind is not None:
        Encoding(kind, quantize_head, experts=quantize is not None).shape(model)  # such checkpoints hold experts dense
    return model.eval()


def _cut(text: Any, layers: int) -> None:
    """Leaves so many layers."""
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:layers]


def _built(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    import transformers

    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def miniature(model: Any) -> Any | None:
    """A model with random values of the same family and dtype: two layers, few columns. None where none can be built.

    What a family computes (its norm, its activation, how it treats logits) is the same in all its sizes.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    heads, kv_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    sizes: dict[str, Any] = dict(SMALL)
    if isinstance(heads, int):
        sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": max(1, HEADS * (kv_heads or heads) // heads)}
    if getattr(text, "head_dim", None):
        sizes["head_dim"] = HEAD_DIM
    try:
        for name, value in sizes.items():
            if hasattr(text, name):
                setattr(text, name, value)
        _cut(text, LAYERS)
        with torch.random.fork_rng(devices=[]):
            return _built(config, model.dtype, torch.device("cpu")).eval()
    except Exception:  # a family whose sizes depend on one another in a way of its own
        return None
