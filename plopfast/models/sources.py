"""What a model's files must not do: run code, be unpickled, bring an adapter along, or fetch kernels from the hub.

transformers would do each of these for a file that asks for it. So the small files of a folder or hub id are read first.
"""

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..support import files
from ..support.errors import ModelError, first_line
from .quantized import FP8_BLOCK

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SMALL = ("config.json", "adapter_config.json", "tokenizer_config.json", INDEX, "README.md")  # the last: its license
LOCAL = {  # what transformers has itself; other values name kernels on the hub, or packages that fall back to them
    "_attn_implementation": (None, "eager", "sdpa", "flex_attention"),
    "_experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
}


def checked_config(source: str) -> Any:
    """Returns transformers' configuration of a model folder or hub id, after a look at its small files.

    Raises ModelError for code of the folder's own, pickled weights, an adapter, quantised weights, and sizes that the
    weights in the folder cannot have; and whatever transformers raises for a configuration that it cannot read.
    """
    import transformers

    for path in sorted(Path(source).iterdir()) if Path(source).is_dir() else ():
        if not path.is_dir():
            files.check_regular(path, ModelError)  # a pipe would be waited for
    refuse_adapter(source)
    raw = _small_file(source, "config.json")
    if code_wanted(source) and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise remote_code(source)
    _refuse_pickle(source, raw)
    codes_stored(source)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    for part in config, config.get_text_config():
        vars(part).pop("quantization_config", None)  # plopfast reads codes itself
    for attribute, known in LOCAL.items():
        if (asked := getattr(config, attribute, None)) not in known:
            setattr(config, attribute, None)  # then transformers chooses
            warnings.warn(
                f"{source}: config.json asks for {asked!r}, which is not part of transformers: not used", stacklevel=3
            )
    _check_sizes(source, config)
    return config


def code_wanted(source: str) -> dict[str, str]:
    """The code that a model's files ask for: class of transformers -> file and class of the folder's own."""
    entries: dict[str, str] = {}
    for name in ("config.json", "tokenizer_config.json"):
        asked = _small_file(source, name).get("auto_map")
        if asked:
            asked = asked if isinstance(asked, dict) else {"AutoTokenizer": asked}
            entries |= {str(key): value if isinstance(value, str) else str(value) for key, value in asked.items()}
    return entries


def remote_code(source: str) -> ModelError:
    """The error for a model that works only with code of its own."""
    wanted = ", ".join(f"{key}: {value}" for key, value in code_wanted(source).items())
    return ModelError(
        f"{source}: it wants to run code of its own ({wanted}); plopfast never runs code from a model's files: give a "
        "checkpoint of an architecture that transformers has itself"
    )


def refuse_adapter(source: str) -> None:
    """Raises ModelError for a model with an adapter_config.json, because transformers would load that adapter, too."""
    if _path(source, "adapter_config.json"):
        raise ModelError(
            f"{source}: it holds an adapter (adapter_config.json), which is not the model's own: give the base model "
            "without it, and the adapter as --adapter"
        )


def _refuse_pickle(source: str, raw: dict[str, Any]) -> None:
    named = raw.get("transformers_weights")
    index = _small_file(source, INDEX).get("weight_map") or {}
    if not isinstance(index, dict):
        raise ModelError(f"{source}: weight_map in {INDEX}: expected names and files, got {index!r:.80}")
    pickled = [
        name
        for name in dict.fromkeys([*([] if named is None else [named]), *index.values()])
        if not (isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json")))
    ]
    if pickled:
        raise ModelError(f"{source}: weights are read from .safetensors files only, but it names {pickled[0]!r:.80}")


def codes_stored(source: str) -> tuple[str, tuple[int, int]] | None:
    """The kind of codes that config.json says the linear weights are, and the block of fp8; None for dense weights.

    Raises ModelError for codes that plopfast does not read.
    """
    return kind_in(_small_file(source, "config.json"), source)


def kind_in(raw: dict[str, Any], source: str) -> tuple[str, tuple[int, int]] | None:
    """As `codes_stored`, for the JSON object of a config.json."""
    parts = [raw, *(part for part in raw.values() if isinstance(part, dict))]
    how = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if not how:
        return None
    method = how.get("quant_method") if isinstance(how, dict) else how
    if isinstance(how, dict):
        four, eight = how.get("load_in_4bit"), how.get("load_in_8bit")
        if method in ("bitsandbytes", None) and bool(four) != bool(eight):
            if not four:
                return "int8", FP8_BLOCK
            if (type_ := how.get("bnb_4bit_quant_type", "fp4")) == "nf4":
                return "nf4", FP8_BLOCK
            method = f"bitsandbytes' {type_}"
        if method == "fp8":
            block = how.get("weight_block_size") or FP8_BLOCK
            if not (isinstance(block, list | tuple) and len(block) == 2 and all(_is_size(size) for size in block)):
                raise ModelError(
                    f"{source}: weight_block_size in config.json: expected two whole numbers, such as [128, 128], got {block!r:.80}"
                )
            return "fp8", (block[0], block[1])
    raise ModelError(
        f"{source}: quantised weights ({method!r:.80}) are not supported; those of bitsandbytes (nf4, int8) and FineGrainedFP8 "
        "(fp8) are: give the checkpoint in bfloat16 or float32, and --quantize nf4"
    )


def towers(config: Any) -> list[str]:
    """The parts of a configuration that are for images or sound."""
    return [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a model folder or hub id; the latter's are downloaded unless the cache has them."""
    index = _small_file(source, INDEX).get("weight_map")
    names = (
        sorted(set(index.values()))
        if index
        else [_small_file(source, "config.json").get("transformers_weights") or SINGLE]
    )
    if Path(source).is_dir():
        folder = Path(source)
    else:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns=names))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(f"{source}: no file {missing[0]}, which holds weights: download or save the checkpoint again")
    return [folder / name for name in names]


def _check_sizes(source: str, config: Any) -> None:
    """Raises ModelError for sizes that would take more memory or time than any model with these weights.

    A model has a tensor or more in each layer, and an embedding of vocabulary x width. Only a local folder is looked at.
    """
    shapes = [shape for file in sorted(Path(source).glob("*.safetensors")) for shape in _shapes(file)]
    if not shapes:
        return
    text, numbers = config.get_text_config(), sum(math.prod(shape) for shape in shapes)
    sizes = {name: getattr(text, name, None) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ModelError(f"{source}: {name} in config.json: expected a whole number from 1, got {size!r:.80}")
    vocabulary, width, layers = (size or 1 for size in sizes.values())
    if vocabulary * width > 2 * numbers or layers > len(shapes):
        raise ModelError(
            f"{source}: config.json describes a much larger model (vocab_size {vocabulary}, hidden_size {width}, "
            f"num_hidden_layers {layers}) than its weights are: {len(shapes)} tensors of {numbers:,} numbers"
        )


def _shapes(file: Path) -> Iterator[list[int]]:
    # numpy's reader takes no memory, and loading says more about errors
    with contextlib.suppress(SafetensorError, OSError), safe_open(file, framework="numpy") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            yield tensors.get_slice(key).get_shape()


def _small_file(source: str, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder or hub id; empty where there is no such file."""
    path = _path(source, name)
    return {} if path is None else json_object(path)


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError where it holds none, or cannot be read."""
    text = files.read_text(path, "no such file", ModelError)
    try:
        value = json.loads(text)  # not our strict parser: good models hold Infinity (Mamba 2) and integers of 31 digits
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {value!r:.80}")
    return value


def _path(source: str, name: str) -> Path | None:
    return path if (path := folder_of(source) / name).is_file() else None


def why_absent(hub_id: str) -> str:
    """Why neither the hub's cache nor the hub has the weights of a model in one file; nothing if one of them has."""
    from huggingface_hub import file_exists

    try:
        if (folder_of(hub_id) / SINGLE).is_file() or file_exists(hub_id, SINGLE):
            return ""
        return f"the hub has no {SINGLE} of it"
    except Exception as error:  # whatever a proxy or a broken network makes of the question
        return first_line(error) or type(error).__name__


@functools.cache
def folder_of(source: str) -> Path:
    """A folder with the small files of a model folder or hub id. Without a network, one question to the hub fails at once,
    where transformers asks for each file six times in 23 s.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(SMALL)))
    except errors.GatedRepoError as error:
        raise OSError("it is gated: accept its terms on the hub, then hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise OSError(
            "the hub has no such model (if it is private: hf auth login), and there is no such folder"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(
            "the hub cannot be reached, the model is not in its cache, and there is no such folder"
        ) from error
