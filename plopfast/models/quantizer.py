"""Loads a model whose linear modules keep codes, so that at most one of its dense weights is in memory at a time.

transformers asks a quantiser of its own kind to replace modules before it reads the weights. Then either it hands over each
weight as it has renamed, split and cast it, and `Encoding` makes codes of it; or the checkpoint holds codes, which `Stored`
(see stored.py) reads itself, while transformers reads everything else.
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from ..support import memory
from ..support.errors import ModelError, PlopfastError
from . import weights
from .exclusions import in_layers
from .experts import Mixture
from .linears import linear_modules
from .quantized import ExpertCodes, QuantizedLinear, encoded, forget_quantization
from .quantized_experts import check_shape, codes_of, put_codes, recognised
from .routed import ExpertWeight
from .running import output_head
from .spool import is_mapped

METHOD = "plopfast"  # transformers' name for this quantiser


class Way(Protocol):
    """How the linear modules get their codes."""

    ignored: list[str]  # patterns of names in the checkpoint that transformers must not read

    def swap(self, model: Any) -> None:
        """Puts QuantizedLinear modules into the model, whose tensors have no values yet."""

    def takes(self, name: str) -> bool:
        """Whether `convert` is to be asked for what takes the parameter's place."""

    def convert(self, model: Any, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters, by full name, that take the place of a dense one."""

    def fill(self, model: Any) -> None:
        """Gives the modules their codes after transformers has read the rest."""

    def check(self, source: str, found: dict[str, Any]) -> None:
        """Completes what transformers has found missing, and raises ModelError for values that are no numbers."""


def load(
    source: str, config: Any, dtype: torch.dtype, way: Way | None, state: dict[str, torch.Tensor] | None = None
) -> tuple[Any, dict[str, Any]]:
    """As transformers' from_pretrained with output_loading_info: (model, what was missing, unexpected or mismatched).

    Without a `way` all weights are dense. `state` has the tensors of the checkpoint by name, where they are not to be read
    from its files; then nothing is copied out of files afterwards (see `let_files_go`).
    """
    import transformers

    asked = None if way is None else _config_class()(way, source)
    how: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    if asked is not None:
        how["quantization_config"] = asked
    loaded: Any
    try:
        if state is None:
            auto = transformers.AutoModelForCausalLM
            loaded = auto.from_pretrained(source, use_safetensors=True, trust_remote_code=False, **how)
        else:
            loaded = _class_of(config).from_pretrained(None, state_dict=state, trust_remote_code=False, **how)
    except _Left as left:
        raise left.error from left.error.__cause__
    model, found = loaded
    if state is not None:
        model.name_or_path = model.config.name_or_path = source
        with contextlib.suppress(OSError):  # most checkpoints have the file
            of_files = transformers.GenerationConfig.from_pretrained(source, trust_remote_code=False)
            model.generation_config = of_files
    if way is None or asked is None:
        return model, found
    found = dict(found) | {key: set(found[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    way.check(source, found)
    found["mismatched_keys"] |= asked.mismatched(model)
    if state is None:
        let_files_go(model)
    _unmark(model)
    return model, found


class _Left(BaseException):
    """Carries an error out of transformers' loading, which would note it and go on. So it is no Exception."""

    def __init__(self, error: PlopfastError) -> None:
        self.error = error


def _class_of(config: Any) -> Any:
    """The class of causal language models that transformers takes for a configuration."""
    import transformers

    with torch.device("meta"):
        return type(transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False))


def replace(model: nn.Module, name: str, n_in: int, n_out: int, kind: str, dtype: torch.dtype, **more: Any) -> Any:
    """Puts a QuantizedLinear without values in the place of a linear module, and returns it."""
    module = model.get_submodule(name)
    with torch.device("meta"):
        made = QuantizedLinear(n_in, n_out, kind, dtype, bias=module.bias is not None, **more)
    model.set_submodule(name, made.train(module.training))
    return made


def check_untied(model: Any, name: str, remedy: str) -> None:
    """Raises ModelError where the output head shares its weight with the embedding, which looks rows up and takes no codes."""
    configs = (model.config, model.config.get_text_config())
    if model.get_submodule(name) is output_head(model) and any(
        getattr(one, "tie_word_embeddings", False) for one in configs
    ):
        raise ModelError(
            f"model {model.name_or_path!r}: its output head ({name}) is tied to the embedding, which stays dense: {remedy}"
        )


class Encoding:
    """Makes codes of `kind` of the linear weights in the repeated layers and of `experts`, and with `head` of the output head,
    too. `keep` may put those of linear modules elsewhere than into memory."""

    def __init__(
        self,
        kind: str,
        head: bool,
        keep: Callable[[torch.Tensor], torch.Tensor] = lambda codes: codes,
        experts: bool = True,
    ) -> None:
        self.kind, self.head, self.keep, self.of_experts = kind, head, keep, experts
        self.ignored: list[str] = []
        self._modules: dict[
            str, tuple[QuantizedLinear, torch.Size, bool]
        ] = {}  # with the stored shape, and whether [in, out]
        self._experts: dict[
            str, tuple[Mixture, str, torch.Size]
        ] = {}  # with the parameter's own name and its stored shape
        self._bad: dict[str, None] = {}
        self._other: dict[str, tuple[torch.Size, torch.Size]] = {}

    def swap(self, model: Any) -> None:
        infos = linear_modules(model, include_head=self.head)
        if self.head and (head := next((info for info in infos if info.layer is None), None)):
            check_untied(model, head.name, "leave out --quantize-head")
        elif self.head:
            raise ModelError(f"model {model.name_or_path!r} has no linear output head: leave out --quantize-head")
        for info in infos:
            if not info.transposed and type(info.module).forward is not nn.Linear.forward:
                continue  # a class of its own, which may do more than y = x W^T + bias
            if self.kind == "nf4" and info.n_in * info.n_out % 2:
                raise ModelError(
                    f"{info.name}: nf4 puts two values into a byte, and {info.n_out} x {info.n_in} is an odd number: "
                    "--quantize int8 or fp8"
                )
            weight: Any = info.module.weight
            made = replace(model, info.name, info.n_in, info.n_out, self.kind, weight.dtype)
            # until its codes come: transformers casts what it reads to the dtype that it finds here
            made.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
            self._modules[info.name] = (made, weight.shape, info.transposed)
        for name, module in model.named_modules():
            mixture = recognised(module) if self.of_experts and in_layers(name) else None
            if mixture is None:
                continue
            for key in mixture.keys:
                held: ExpertWeight = mixture.weight(key)
                check_shape(f"{name}.{key}", self.kind, *held.shape)
                self._experts[f"{name}.{key}"] = mixture, key, held.stored.shape
        if not self._modules:
            raise ModelError(
                f"model {model.name_or_path!r}: its linear modules ({type(infos[0].module).__name__}) are neither nn.Linear nor "
                "Conv1D, so none of them can keep codes: leave out --quantize"
            )

    def shape(self, model: Any) -> None:
        """As `swap`, for a model that never gets values: its modules have codes of the right shapes at once."""
        self.swap(model)
        for name, (module, *_) in self._modules.items():
            replace(model, name, module.in_features, module.out_features, self.kind, module.dtype)
        for mixture, key, _ in self._experts.values():
            put_codes(mixture, key, self.kind, {})

    def takes(self, name: str) -> bool:
        module, _, parameter = name.rpartition(".")
        return name in self._experts or (parameter == "weight" and module in self._modules)

    def convert(self, model: Any, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        place, experts = name.rpartition(".")[0], self._experts.get(name)
        shape, transposed = self._modules[place][1:] if experts is None else (experts[2], False)
        if value.shape != shape:
            self._other[name] = (value.shape, shape)
            return {}
        if not weights.is_finite(value):
            self._bad[name] = None
            return {}
        if experts is not None:
            mixture, key, _ = experts
            put_codes(mixture, key, self.kind, {})
            place = name
            codes = codes_of(value.transpose(1, 2) if mixture.weight(key).transposed else value, self.kind)
        else:
            codes = {key: self.keep(one) for key, one in encoded(value.T if transposed else value, self.kind).items()}
        memory.trim()  # else freed parts of the weights before add up to as much as the codes
        return {f"{place}.{key}": nn.Parameter(one, requires_grad=False) for key, one in codes.items()}

    def fill(self, model: Any) -> None:
        """They have them."""

    def check(self, source: str, found: dict[str, Any]) -> None:
        weights.refuse_nonfinite(self._bad, f"model {source!r}")
        of_codes = {f"{name}.{key}" for name, (module, *_) in self._modules.items() for key in module._parameters} - {
            f"{name}.{key}" for name in self._modules for key in ("weight", "bias")
        }
        found["missing_keys"] -= of_codes | self._other.keys()  # no checkpoint holds the former
        found["mismatched_keys"] |= {(name, *shapes) for name, shapes in self._other.items()}


def let_files_go(model: nn.Module) -> None:
    """Copies what lies in a file that is mapped into memory: one such tensor keeps all of the file there, dense weights too."""
    mapped = memory.mapped_files()
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        if is_mapped(tensor) or any(tensor.device.type == "cpu" and tensor.data_ptr() in where for where in mapped):
            tensor.data = tensor.data.clone()


def _unmark(model: Any) -> None:
    """Takes transformers' marks of a quantised model away: it knows some methods by them, and handles those in ways of its own.

    `hf_quantizer` stays, because it is what refuses `save_pretrained`.
    """
    quantizer = model.hf_quantizer
    quantizer.quantization_config.way = None
    forget_quantization(model)
    model.hf_quantizer = quantizer


@functools.cache
def _config_class() -> Any:
    """The settings that transformers hands to its quantiser of this name; both classes are made once it is imported."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):
        def __init__(self, way: Way, source: str) -> None:
            self.quant_method, self.way, self.source = METHOD, way, source  # type: ignore[assignment]
            self.shapes: dict[str, torch.Size] = {}

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD}

        def __deepcopy__(self, memo: Any) -> Any:
            return self  # transformers copies configurations, and open files cannot be copied

        def mismatched(self, model: Any) -> set[tuple[Any, ...]]:
            """Dense parameters that got another shape: transformers 5.20 does not look where there is a quantiser."""
            now = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
            return {
                (name, now[name], shape) for name, shape in self.shapes.items() if name in now and now[name] != shape
            }

    class Convert(ConversionOps):
        def __init__(self, way: Way) -> None:
            self.way = way

        def convert(  # type: ignore[override]
            self, input_dict: dict[str, Any], model: Any = None, missing_keys: set[str] | None = None, **_: Any
        ) -> dict[str, Any]:
            result: dict[str, Any] = {}
            for name, value in input_dict.items():
                value = value[0] if isinstance(value, list) else value
                try:
                    made = self.way.convert(model, name, value) if self.way.takes(name) else {name: value}
                except PlopfastError as error:
                    raise _Left(error) from error
                if made and name not in made and missing_keys is not None:
                    missing_keys.discard(name)  # other parameters took its place
                result |= made
            return result

    @register_quantizer(METHOD)
    class Quantizer(HfQuantizer):
        quantization_config: Config

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            asked = self.quantization_config
            model.name_or_path = asked.source  # errors name it
            asked.way.swap(model)
            of_codes = {
                f"{name}.{key}"
                for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
                for key in module._parameters if key != "bias"
            }  # fmt: skip
            asked.shapes = {name: p.shape for name, p in model.named_parameters() if name not in of_codes}
            if asked.way.ignored:
                kept = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
                model._keys_to_ignore_on_load_unexpected = {*kept, *asked.way.ignored}
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            self.quantization_config.way.fill(model)
            return model

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return self.quantization_config.way.takes(param_name)

        def get_quantize_ops(self) -> Convert:
            return Convert(self.quantization_config.way)

        def is_serializable(self) -> bool:
            return True  # once no codes are left: see the next function, which save_pretrained calls

        def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
            if codes := [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear | ExpertCodes)]:
                raise ModelError(
                    f"model {model.name_or_path!r} keeps codes in {len(codes)} modules ({codes[0]}, ...): write it with "
                    "plopfast.models.saved.save_model, or make it dense by merging"
                )
            return None, {}

        @property
        def is_trainable(self) -> bool:
            return True

    return Config
