"""adapter_config.json, as PEFT and plopfast write it.

Every field is in one of three tables: it is honoured, it must have a neutral value, or it has no effect on what a saved
adapter computes. A field in none of them must be empty, so no setting of a newer PEFT is passed over.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import TypedDict

from ..support import files
from ..support.errors import AdapterError, FileError
from ..support.schema import Size, checked
from .patterns import matches
from .peft_targets import WEIGHT, key_of
from .placement import ends_of

CONFIG = "adapter_config.json"
_EMPTY: tuple[Any, ...] = (None, False, [], {})
_MERGE = "merge it with PEFT first"
_CONVERT = (
    "PiSSA and its like change the base weights; PEFT converts such an adapter: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)


Alpha = Annotated[float, Gt(0), Le(1e9)]
Dropout = Annotated[float, Ge(0), Lt(1)]


class Honoured(TypedDict, total=False):
    """The fields that plopfast honours as PEFT does, and what they may hold."""

    peft_type: Literal["LORA"]
    r: Size
    lora_alpha: Alpha
    lora_dropout: Dropout | None
    use_rslora: bool | None
    use_dora: bool | None
    rank_pattern: dict[str, Size] | None
    alpha_pattern: dict[str, Alpha] | None
    target_modules: str | list[str] | None  # names, or a regular expression
    target_parameters: list[str] | None  # weights of linear modules
    exclude_modules: str | list[str] | None
    layers_to_transform: int | list[int] | None
    modules_to_save: list[str] | None  # their values are in the file, whole
    bias: Literal["none", "all", "lora_only"] | None


HONOURED = frozenset(Honoured.__annotations__)
NEUTRAL: dict[str, tuple[Any, ...]] = {  # field -> the values that change nothing; empty ones never do
    "task_type": ("CAUSAL_LM",),
    # The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights that the adapter is trained on.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "trainable_token_indices": (),
    "layer_replication": (),
    "lora_bias": (),
    "use_qalora": (),
    "use_bdlora": (),
    "alora_invocation_tokens": (),
    "velora_config": (),
    "monteclora_config": (),
    "arrow_config": (),
    "kasa_config": (),
    "megatron_config": (),
    "ensure_weight_tying": (),
}
NO_EFFECT: dict[str, str] = {  # field -> why
    "auto_mapping": "plopfast is given the base model",
    "base_model_name_or_path": "plopfast is given the base model",
    "revision": "plopfast is given the base model",
    "peft_version": "says who wrote the file",
    "inference_mode": "says whether PEFT freezes it",
    "fan_in_fan_out": "read from the base's modules; PEFT mends a wrong value",
    "layers_pattern": "says how PEFT finds the layers; the tensors' names hold them",
    "loftq_config": "of an initialisation that is refused",
    "corda_config": "of an initialisation that is refused",
    "lora_ga_config": "of an initialisation that is refused",
    "eva_config": "of an initialisation that is over",
    "megatron_core": "of megatron_config, which is refused",
    "qalora_group_size": "of use_qalora, which is refused",
    "runtime_config": "PEFT ignores it in files",
}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says, all of it valid."""

    file: Path
    values: dict[str, Any]

    @property
    def dropout(self) -> float:
        return float(self.values.get("lora_dropout") or 0.0)

    @property
    def rslora(self) -> bool:
        return bool(self.values.get("use_rslora"))

    @property
    def dora(self) -> bool:
        return bool(self.values.get("use_dora"))

    @property
    def modules_to_save(self) -> list[str]:
        """Ends of the names of modules whose values the file has whole."""
        return self.values.get("modules_to_save") or []

    @property
    def bias(self) -> str:
        return self.values.get("bias") or "none"

    @property
    def peft_version(self) -> tuple[int, ...]:
        """The version of PEFT that wrote the file, such as (0, 19); (0, 0) where it doesn't say, as before 0.18."""
        found = re.match(r"(\d+)\.(\d+)", str(self.values.get("peft_version")))
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def base(self) -> Any:
        """The base model's name, as it was in the training."""
        return self.values.get("base_model_name_or_path")

    @property
    def parameters(self) -> list[str]:
        """The parameters that are adapted by their own names."""
        return self.values.get("target_parameters") or []

    def placed(self, ranks: dict[str, int], of_experts: Collection[str] = ()) -> dict[str, tuple[int, float]]:
        """Returns module name -> (rank, alpha). `ranks`: module name -> the rank that its tensors have. `of_experts` are the
        names that are weights of experts.

        Raises AdapterError where the configuration says another rank, or leaves a module out.
        """
        names = list(ranks)
        self._check_modules(names, of_experts)
        keys = {name: key_of(name, self.parameters) for name in names}
        ranks_said, alphas_said = (
            matches(self.values.get(field) or {}, [*keys.values()], f"{self.file}: {field}")
            for field in ("rank_pattern", "alpha_pattern")
        )
        placed = {}
        for name, rank in ranks.items():
            said = ranks_said[keys[name]] or [self.values.get("r", 8)]  # 8 is PEFT's own default, for both
            if rank not in said:  # not the first alone: PEFT sorts the patterns when it saves them
                raise AdapterError(
                    f"{self.file}: r and rank_pattern say rank {said[0]} for {name}, its tensors have rank {rank}; was it edited?"
                )
            alphas = alphas_said[keys[name]] or [self.values.get("lora_alpha", 8)]
            placed[name] = rank, float(alphas[0])
        return placed

    def _check_modules(self, names: Sequence[str], of_experts: Collection[str]) -> None:
        """Raises AdapterError for tensors of a module that PEFT would leave out. Of modules given by a regular expression
        the tensors alone say which they are."""
        targets, excluded, layers = (
            self.values.get(field) for field in ("target_modules", "exclude_modules", "layers_to_transform")
        )
        layers = [layers] if isinstance(layers, int) else layers or []
        keys = [name if name in of_experts else name + WEIGHT for name in names]
        met = {end for key in keys for end in (key, *ends_of(key))}
        if idle := [one for one in self.parameters if one not in met]:
            raise AdapterError(not_known(self.file, idle))
        for name in [n for n in names if n not in of_experts and key_of(n, self.parameters) == n]:
            ends = {name.split(".", i)[-1] for i in range(name.count(".") + 1)}
            layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
            for field, value, out in (
                ("target_modules", targets, isinstance(targets, list) and not ends & set(targets)),
                ("exclude_modules", excluded, isinstance(excluded, list) and bool(ends & set(excluded))),
                ("layers_to_transform", layers, bool(layers) and layer not in layers),
            ):
                if out:
                    raise AdapterError(
                        f"{self.file}: {field} = {value!r:.80} leaves out {name}, for which there are tensors; was it edited?"
                    )


def read_config(folder: Path) -> AdapterConfig:
    """Reads the adapter_config.json in `folder`.

    Raises AdapterError where there is none, and, with the field and its value, for a value of another kind and for a
    setting of PEFT that plopfast does not have.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise AdapterError(f"{folder}: not an adapter folder, it has no {CONFIG}")
    try:
        values = files.read_json(file, "plopfast train")
        if not isinstance(values, dict) or values.get("peft_type") != "LORA":
            raise AdapterError(f"{file}: expected the configuration of a LoRA adapter (peft_type LORA)")
        checked(Honoured, values, file, "was it edited?", more=True)
    except FileError as error:
        raise AdapterError(str(error)) from error
    for field, value in values.items():
        said = f"{file}: {field} = {value!r:.80}"
        if field in HONOURED or field in NO_EFFECT or _is_one_of(value, _EMPTY):
            continue
        if field not in NEUTRAL:
            raise AdapterError(f"{said}: this field is unknown; is it of a newer PEFT? {_MERGE}")
        if not _is_one_of(value, NEUTRAL[field]):
            raise AdapterError(f"{said} is not supported; {_CONVERT if field == 'init_lora_weights' else _MERGE}")
    return AdapterConfig(file, values)


def not_known(file: Path, parameters: list[str]) -> str:
    """The error for target_parameters that are neither."""
    return (
        f"{file}: target_parameters = {parameters!r:.80}: expected weights of linear modules or of experts that this model and the "
        f"file have; adapters of other parameters are not supported; {_MERGE}"
    )


def _is_one_of(value: Any, plain: Sequence[Any]) -> bool:
    """`in` alone would take 1 for True."""
    return any(type(value) is type(one) and value == one for one in plain)
