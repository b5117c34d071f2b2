"""The last section: how to load the adapter, and whether the run could be repeated."""

import dataclasses
import json
from typing import Any

from ..support.config import (
    AdapterSettings,
    DataSettings,
    PlaceSettings,
    RunConfig,
    ScoreSettings,
    SearchSettings,
    TrainConfig,
    TrialSettings,
)
from ..support.model_settings import ModelSettings
from ..support.tables import UNKNOWN, Column, Table
from .facts import model_of
from .figures import Code, Fold, Notes, Section, Side, Tables, Words
from .folder import RunFolder
from .words import name_of, range_of, rich

DEFAULTS = {field.name: field.default for field in dataclasses.fields(RunConfig)}
PLAIN = (
    None,
    False,
    0,
    0.0,
    "",
    "none",
    "auto",
    "error",
    "device",
)  # nothing that anyone chose, unless the default is another
NOT_SETTINGS = {
    "train",
    "valid",
    "test",
    "unlabeled",
    "general",
    "model",
}  # files and the model: they have lines of their own


def use(run: RunFolder, missing: list[tuple[str, str]]) -> Section:
    """config.json: loading, settings, versions and data; and `missing`, what would add to the page with its command."""
    section = Section(id="use", title="Use it, reproduce it", nav="Use and reproduce")
    adapter = (run.path / "adapter" / "adapter_config.json").exists()
    if adapter:
        section.answer = [
            rich("The adapter is an ordinary <b>PEFT adapter</b>, in <code>adapter/</code> of this folder.")
        ]
    else:
        section.answer = ["This folder holds no adapter."]
    section.answer.append("The same seed, versions, machine and threads repeat the run.")
    section.caveats = (
        ["Use the adapter with the weights it was trained on: other weights of the same name may give other answers."]
        if adapter
        else []
    )
    section.body = [Side([code for code in (_load(run) if adapter else None, _train(run)) if code])]
    command = run.stages.get("train", {}).get("command") or run.noted("score") or run.noted("trial")
    facts = [*_versions(run), ("this page", run.command("report --overwrite"))]
    section.body += [
        Fold(
            "Command, seed and settings",
            [
                *([Code(title="", code=command)] if command else []),
                *_halves("Settings that were used", settings_used(run)),
            ],
        ),
        Fold("Versions and machine", [_pairs("Versions and machine", facts)]),
    ]
    if data := _data(run):
        section.body.append(
            Fold(
                "Data and their SHA-256",
                [
                    Tables(
                        title="",
                        alt="Data and their SHA-256",
                        table=Table("", [Column("split"), Column("file"), Column("SHA-256")], data),
                        wide=True,
                    )
                ],
            )
        )
    if missing:
        rows = [(what, command) for what, command in missing]
        section.body.append(
            Fold(
                "What this page does not show yet",
                [
                    Tables(
                        title="",
                        alt="Not on this page yet",
                        table=Table("", [Column("what"), Column("command that makes it")], rows),
                        wide=True,
                    )
                ],
            )
        )
    section.body.append(Fold("Words used here", [Words(_words(run))]))
    return section


def _pairs(title: str, pairs: list[tuple[str, str]]) -> Tables:
    return Tables(title="", alt=title, table=Table("", [Column("what"), Column("value")], pairs), wide=True)


def _halves(title: str, pairs: list[tuple[str, str]]) -> list[Any]:
    """A long list in two columns."""
    if not pairs:
        return [Notes(["No settings are kept here."])]
    half = -(-len(pairs) // 2)
    return (
        [_pairs(title, pairs)]
        if len(pairs) <= 8
        else [Side([_pairs(title, pairs[:half]), _pairs(title, pairs[half:])])]
    )


def settings_used(run: RunFolder) -> list[tuple[str, str]]:
    """Return the settings that the folder's stages used: not those of other commands, nor options that stayed off.

    An option whose value is not its default was used, whatever its group.
    """
    settings = run.config.get("settings", {})
    groups: list[Any] = [ModelSettings, DataSettings]
    groups += (
        [ScoreSettings] * bool(run.scores)
        + [PlaceSettings] * bool(run.placement)
        + [AdapterSettings] * bool(run.placement)
    )
    groups += (
        [TrainConfig] * bool(run.training or run.metrics)
        + [TrialSettings] * bool(run.trial)
        + [SearchSettings] * bool(run.search)
    )
    used = {field.name for group in groups for field in dataclasses.fields(group)}
    found = []
    for name, value in settings.items():
        changed = name not in DEFAULTS or value != DEFAULTS[name]
        on = value not in PLAIN
        if name not in NOT_SETTINGS and value is not None and (changed or (on and name in used)):
            found.append((name.replace("_", " "), _shown(value)))
    seeds = [("trial’s seeds", ", ".join(map(str, run.trial["seeds"])))] if run.trial else []
    if "seed" in settings:
        found = [("seed", str(settings["seed"])), *(pair for pair in found if pair[0] != "seed")]
    return found + seeds


def _shown(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else {True: "yes", False: "no"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    )


def _versions(run: RunFolder) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for source, title in ((run.config, ""), (run.trial, "trial, ")):
        versions = (
            [(f"{title}versions", ", ".join(f"{name} {version}" for name, version in source["versions"].items()))]
            if "versions" in source
            else []
        )
        machine = [(f"{title}machine", source["machine"])] if "machine" in source else []
        known = {value for _, value in facts}
        facts += [pair for pair in versions + machine if pair[1] not in known]
    if run.config.get("device"):
        facts.append(("device", str(run.config["device"])))
    return facts


def _data(run: RunFolder) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for source, title in ((run.config, ""), (run.trial, "trial, ")):
        data = source.get("data", {}) | ({"general text": source["general"]} if "general" in source else {})
        for split, of in data.items():
            for one in of if isinstance(of, list) else [of]:  # a split may have several files
                row = (name_of(one["file"]), one["sha256"])
                if row not in {(file, sha) for _, file, sha in found}:
                    found.append((f"{title}{split}", *row))
    return found


def _model(run: RunFolder) -> tuple[str, str]:
    """The model for a line of code, and a comment where the page leaves out its folder."""
    name = model_of(run) or "MODEL"
    is_path = name.startswith(("/", "~", ".", "\\")) or name[1:3] == ":\\"
    return (name_of(name), "  # the folder it was loaded from") if is_path else (name, "")


def _load(run: RunFolder) -> Code:
    name, comment = _model(run)
    code = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

name = {json.dumps(name, ensure_ascii=False)}{comment}
tokenizer = AutoTokenizer.from_pretrained(name)
model = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(name),
    {json.dumps(run.path.name + "/adapter", ensure_ascii=False)})"""
    return Code(title="Load it with PEFT", sub="Python", code=code)


def _train(run: RunFolder) -> Code | None:
    placement = run.placement
    if not placement:
        return None
    pairs = {*placement.modules.values()}
    if not run.whole_types or len(pairs) != 1 or placement.experts:
        code = f"""import plopfast as pf

placement = pf.Placement.load({json.dumps(run.path.name + "/placement.json", ensure_ascii=False)})
config = placement.lora_config(model)  # a peft.LoraConfig"""
        return Code(title="Train the same placement elsewhere", sub="Python, for PEFT and TRL", code=code)
    rank, alpha = next(iter(pairs))
    targets = "".join(f"\n        {json.dumps(type_, ensure_ascii=False)}," for type_ in placement.types)
    code = f"""from peft import LoraConfig

config = LoraConfig(
    task_type="CAUSAL_LM",
    r={rank}, lora_alpha={alpha:g},
    target_modules=[{targets}
    ])
# PEFT: get_peft_model(model, config)
# TRL: SFTTrainer(model, peft_config=config, …)"""
    return Code(title="Train the same placement elsewhere", sub="Python, for PEFT and TRL", code=code)


def _words(run: RunFolder) -> list[tuple[str, str]]:
    ranks = range_of([rank for rank, _ in run.placement.modules.values()]) if run.placement else UNKNOWN
    here = f": {ranks} here" if ranks != UNKNOWN else ""
    return [
        ("LoRA adapter", "Two small matrices beside a frozen one; only they are trained."),
        ("Rank", f"The inner size of the two matrices{here}."),
        ("NFN", "‖Wz‖ divided by its expected value for a random input of the same length."),
        ("Nat", "Unit of loss; 0.69 nats is a probability of one half."),
        ("Interval", "95% of such intervals hold the true value, if the rows or prompts are a fair draw."),
        ("MiB", "1,048,576 bytes."),
    ]
