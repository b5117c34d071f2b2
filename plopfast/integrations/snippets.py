"""A placement as text to paste: Python for PEFT and for Unsloth, YAML for TRL and for Axolotl.

Field names were read in TRL 1.16 (ModelConfig), in Axolotl (utils/schemas/peft.py, loaders/adapter.py) and in Unsloth
(models/llama.py), both in 2026. What a tool has no field for is said in a comment.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..lora.lora_config import fields_for
from ..lora.placement import Placement

WIDE = 100  # characters in a line, beyond which a list has a line for each item
ORDER = ("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
OF_PEFT = {
    "kaiming": None,
    "gaussian": "gaussian",
}  # init -> PEFT's init_lora_weights; others are not PEFT's of that name


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What adapters are beside their places and ranks: a run's settings of these names."""

    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"


PLAIN = Adapter()


def snippets(
    placement: Placement, model: nn.Module | None = None, adapter: Adapter = PLAIN, notes: Sequence[str] = ()
) -> str:
    """Returns how PEFT, TRL, Axolotl and Unsloth put such adapters where the placement says, one after the other.

    With the `model`, which may be without values (models/shapes.py), targets are as brief as in `Placement.lora_config`; without
    it they are full names. `notes` are said first. Lines that begin with # are comments in Python and in YAML. Raises
    PlacementError where `model` lacks a module.
    """
    dora = adapter.dora and not placement.experts
    fields = fields_for(placement, model, as_parameters=not dora)
    fields |= {"r": int(fields["r"]), "lora_alpha": _number(fields["lora_alpha"])}
    fields["alpha_pattern"] = {name: _number(alpha) for name, alpha in fields["alpha_pattern"].items()}
    said, parameters = [str(placement).splitlines()[0], *notes], "target_parameters" in fields
    if adapter.dora and not dora:
        said.append("without DoRA: PEFT has none for the weights of experts")
    if adapter.dropout and parameters:
        said.append(f"without the dropout of {adapter.dropout:g}: PEFT has none beside target_parameters")
    if adapter.init not in OF_PEFT:
        said.append(f"A begins as PEFT's does by default: plopfast's init {adapter.init} is not PEFT's of this name")
    flags = {"use_rslora": True} if adapter.rslora else {}
    flags |= {"use_dora": True} if dora else {}
    fields["lora_dropout"] = 0.0 if parameters else adapter.dropout
    init = OF_PEFT.get(adapter.init)
    blocks = [_comments(said), _peft(fields, flags, init), _trl(placement, fields, flags, init)]
    blocks += [_axolotl(fields, flags, init), _unsloth(placement, fields, flags, init)]
    return "\n\n".join("\n".join(block) for block in blocks)


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _peft(fields: dict[str, Any], flags: dict[str, Any], init: str | None) -> list[str]:
    given = _given(fields, ("task_type", *ORDER)) | flags | ({"init_lora_weights": init} if init else {})
    return [
        "# PEFT (Python)", "from peft import LoraConfig, get_peft_model", "",
        *_call("config = LoraConfig(", [], given),
        "model = get_peft_model(model, config)  # or leave it to TRL: SFTTrainer(model, peft_config=config, ...)",
    ]  # fmt: skip


def _trl(placement: Placement, fields: dict[str, Any], flags: dict[str, Any], init: str | None) -> list[str]:
    targets, said = fields["target_modules"], []
    if isinstance(targets, list) and len(targets) == 1:
        said.append("a pattern, as TRL hands a single name to PEFT as one, which must match the whole name")
        targets = rf"(.*\.)?{re.escape(targets[0])}"
    given = {
        "use_peft": True, "lora_r": fields["r"], "lora_alpha": fields["lora_alpha"], "lora_dropout": fields["lora_dropout"],
        "lora_target_modules": [targets] if isinstance(targets, str) else targets,
    }  # fmt: skip
    if "target_parameters" in fields:
        given["lora_target_parameters"] = fields["target_parameters"]
    if others := {*fields["rank_pattern"], *fields["alpha_pattern"]}:
        ranks = [rank for rank, _ in placement.modules.values()]
        said.append(
            f"TRL's YAML has one rank and one alpha: {len(others)} of {len(ranks)} modules have others in the placement (its ranks are "
            f"{min(ranks)} to {max(ranks)}); in Python, placement.lora_config(model) has them all"
        )
    if init:
        said.append(f"TRL's YAML has no field for init {init}")
    title = "TRL (YAML): trl sft --config FILE, or dpo, grpo, ...; beside model_name_or_path, dataset_name and the like"
    return [f"# {title}", *_comments(said), *_yaml(given | flags)]


def _axolotl(fields: dict[str, Any], flags: dict[str, Any], init: str | None) -> list[str]:
    plain = _given(fields, ORDER)
    given = {"adapter": "lora"} | {f"lora_{name.removeprefix('lora_')}": value for name, value in plain.items()}
    given |= {f"peft_{name}": value for name, value in flags.items()}
    given |= {"peft_init_lora_weights": init} if init else {}
    said = []
    if "lora_rank_pattern" in given or "lora_alpha_pattern" in given:
        said.append("the patterns need an Axolotl that has them (axolotl-ai-cloud/axolotl#3673, of 2026)")
    if not all(isinstance(alpha, int) for alpha in [fields["lora_alpha"], *fields["alpha_pattern"].values()]):
        said.append("Axolotl refuses an alpha that is no whole number: place anew with another --alpha")
    return ["# Axolotl (YAML)", *_comments(said), *_yaml(given)]


def _unsloth(placement: Placement, fields: dict[str, Any], flags: dict[str, Any], init: str | None) -> list[str]:
    said, given = [], _given(fields, ORDER) | flags | ({"init_lora_weights": init} if init else {})
    if isinstance(pattern := given["target_modules"], str):
        given["target_modules"] = [name for name in placement.modules if re.fullmatch(pattern, name)]
        said.append("Unsloth takes names alone, and a module whose name ends with one of these gets an adapter, too")
    call = _call("model = FastLanguageModel.get_peft_model(", ["model"], given)
    return [
        "# Unsloth (Python): after model, tokenizer = FastLanguageModel.from_pretrained(...)",
        *_comments(said),
        *call,
    ]


def _given(fields: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """The fields in this order, without patterns that are empty and fields that are not there."""
    return {name: fields[name] for name in order if name in fields and fields[name] != {}}


def _comments(lines: Sequence[str]) -> list[str]:
    return [f"# {line}" for line in lines]


def _call(begin: str, arguments: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """A call in Python, an argument a line."""
    lines = [f"    {argument}," for argument in arguments]
    for name, value in given.items():
        text = repr(value) if isinstance(value, bool) else json.dumps(value)
        if isinstance(value, list | dict) and len(text) > WIDE:
            lines += [f"    {name}={text[0]}", *(f"        {item}," for item in _items(value)), f"    {text[-1]},"]
        else:
            lines.append(f"    {name}={text},")
    return [begin, *lines, ")"]


def _yaml(given: Mapping[str, Any]) -> list[str]:
    """Settings in YAML, of which JSON is a part."""
    lines = []
    for name, value in given.items():
        text = value if name == "adapter" else json.dumps(value)
        if isinstance(value, float) and "." not in text:
            text = text.replace("e", ".0e")  # YAML takes 1e-05 for a text
        if isinstance(value, list | dict) and len(text) > WIDE:
            mark = "- " if isinstance(value, list) else ""
            lines += [f"{name}:", *(f"  {mark}{item}" for item in _items(value))]
        else:
            lines.append(f"{name}: {text}")
    return lines


def _items(value: list[str] | dict[str, Any]) -> list[str]:
    if isinstance(value, list):
        return [json.dumps(item) for item in value]
    return [f"{json.dumps(name)}: {json.dumps(item)}" for name, item in value.items()]
