"""Names from other tools in files of settings: they mean what plopfast's own names mean, or the error says what to use."""

import json

import pytest
import yaml

from plopfast.placing.rules import RULES
from plopfast.support.aliases import ALIASES, NAMES_OF_RULES
from plopfast.support.config import TYPES, RunConfig
from plopfast.support.errors import ConfigError
from plopfast.support.foreign import WHY_NOT
from plopfast.support.settings_file import load_settings

AXOLOTL = """
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
load_in_8bit: false
load_in_4bit: true
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw8bit
lr_scheduler: cosine
learning_rate: 0.0002
gradient_checkpointing: true
warmup_ratio: 0.1
weight_decay: 0.0
neftune_noise_alpha:
"""
LLAMA_FACTORY = """
model_name_or_path: some/model
lora_rank: 8
lora_target: all
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
"""
TRL = {
    "model_name_or_path": "some/model", "learning_rate": 2e-4, "num_train_epochs": 1, "packing": True, "eval_steps": 100,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "use_peft": None, "lora_r": 32, "lora_alpha": 16,
    "max_grad_norm": 0.3, "optim": "adamw_torch_fused", "report_to": ["tensorboard", "wandb"], "seed": 42,
    "target_modules": ["q_proj", "v_proj"], "lr_scheduler_type": "constant_with_warmup",
}  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    def of(value):
        file = tmp_path / ("a.json" if isinstance(value, dict) else "a.yaml")
        file.write_text(json.dumps(value) if isinstance(value, dict) else value)
        return load_settings(file)

    return of


def test_pasted_from_axolotl(settings):
    assert settings(AXOLOTL) == {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "quantize": "nf4", "max_length": 2048, "packing": True, "rank": 32,
        "alpha": 16, "dropout": 0.05, "rule": "all", "accumulate": 4, "batch_rows": 2, "epochs": 1, "optimizer": "adamw8bit",
        "schedule": "cosine", "lr": 2e-4, "checkpointing": True, "warmup": 0.1, "weight_decay": 0.0,
    }  # fmt: skip
    RunConfig(**settings(AXOLOTL))


def test_pasted_from_llama_factory_and_trl(settings):
    found = settings(LLAMA_FACTORY)
    assert (found["rank"], found["rule"], found["lr"], found["epochs"]) == (8, "all", 1e-4, 3.0)
    trl = {name: value for name, value in TRL.items() if name != "use_peft"}
    found = settings(trl)
    assert found == settings(yaml.safe_dump(trl)) and len(found) == len(trl)
    assert (found["rule"], found["log_to"], found["schedule"]) == ("q_proj,v_proj", "tensorboard,wandb", "constant")
    assert (found["optimizer"], found["clip"], found["eval_every"]) == ("adamw", 0.3, 100)
    RunConfig(**found)


def test_the_table_is_sound():
    """A name has one meaning: it is no setting of plopfast's own, and no name that is refused."""
    assert not ALIASES.keys() & (TYPES.keys() | WHY_NOT.keys() | {"out"}) and not TYPES.keys() & WHY_NOT.keys()
    assert {alias.setting for alias in ALIASES.values()} <= TYPES.keys() | {"out"}
    assert all(name == name.lower() and "-" not in name for name in (*ALIASES, *WHY_NOT))
    assert {*NAMES_OF_RULES} == RULES.keys() - {"all"}


READ = [
    ("target_modules", "all-linear", "all"), ("lora_target", "all", "all"), ("target_modules", "q_proj", "q_proj"),
    ("target_modules", "q_proj, v_proj", "q_proj,v_proj"), ("lora_target_modules", ["q_proj", "k_proj,v_proj"], "q_proj,k_proj,v_proj"),
    ("lora_target_linear", True, "all"), ("lora_target_linear", False, None),
    ("load_in_4bit", True, "nf4"), ("load_in_4bit", False, None), ("load_in_8bit", True, "int8"), ("load_in_8bit", None, None),
    ("lr_scheduler_type", "linear", "linear"), ("lr_scheduler", "constant_with_warmup", "constant"),
    ("optim", "adamw_8bit", "adamw8bit"), ("optim", "adamw_torch", "adamw"), ("report_to", "wandb", "wandb"),
    ("report_to", ["none"], "none"), ("gradient_checkpointing", True, True), ("gradient_checkpointing", False, False),
    ("lora_r", 8, 8), ("lora_alpha", 8, 8), ("learning_rate", 1, 1), ("train_file", ["a", "b"], ("a", "b")), ("lora_r", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "meant"), READ, ids=str)
def test_what_a_value_means(settings, name, value, meant):
    assert settings({name: value}) == ({} if meant is None else {ALIASES[name].setting: meant})
    assert settings({name.replace("_", "-"): value}) == settings({name: value}), "words joined as in an option"


REFUSED = [
    ({"target_modules": "attn"}, r"target_modules: 'attn' is no name of a module here: give --rule attn"),
    ({"target_modules": ["all-linear", "q_proj"]}, "give --rule all"),
    ({"target_modules": r".*\.q_proj"}, "is a pattern: expected names of modules"),
    ({"target_modules": []}, "expected names of modules"), ({"target_modules": 3}, "expected names of modules, or all-linear, got 3"),
    ({"load_in_4bit": "nf4"}, "load_in_4bit: expected true or false, got 'nf4'"), ({"load_in_4bit": 1}, "expected true or false, got 1"),
    ({"lr_scheduler_type": "constant"}, "'constant' has no warmup there: give --schedule constant --warmup 0"),
    ({"lr_scheduler_type": "cosin"}, "expected one of linear, cosine, constant_with_warmup, got 'cosin'; did you mean 'cosine'"),
    ({"optim": "paged_adamw_32bit"}, "optim: expected one of adamw"), ({"optim": 3}, "got 3"),
    ({"report_to": []}, "report_to: expected none, tensorboard or wandb"),
    ({"lora_r": "8"}, r"lora_r \(rank\): expected int, got '8'"), ({"gradient_checkpointing": "unsloth"}, r"\(checkpointing\): expected bool"),
    ({"lora_r": 8, "rank": 8}, "lora_r and rank both set rank: leave one of them out"),
    ({"lora_r": 8, "lora_rank": 8}, "lora_r and lora_rank both set rank"), ({"max-steps": 8, "max_steps": 8}, "max-steps and max_steps both set"),
    ({"load_in_4bit": True, "load_in_8bit": True}, "both set quantize"), ({"load_in_4bit": True, "quantize": None}, "both set quantize"),
    ({"output_dir": "runs/a"}, "output_dir: a file of settings names no run folder: give --out runs/a"),
    ({"bf16": True}, "unknown setting 'bf16': give --dtype bfloat16"), ({"warmup_steps": 9}, "give a share of the steps, such as --warmup 0.1"),
    ({"flash_attention": True}, "unknown setting 'flash_attention': plopfast has nothing like it: leave it out$"),
    ({"learing_rate": 1}, "unknown setting 'learing_rate'; did you mean 'learning_rate'"), ({"rnak": 1}, "did you mean 'rank'"),
    ({"rank": 1, "bf16": True, "tf32": False, "alpha": 2, "strict": 1}, r"'bf16': .* \(and 2 more: tf32, strict\)"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=str)
def test_what_is_refused(settings, value, message):
    with pytest.raises(ConfigError, match=rf"a\.json: .*{message}"):
        settings(value)


def test_what_is_off_leaves_room_for_the_other(settings):
    assert settings({"load_in_8bit": False, "load_in_4bit": True, "lora_r": None, "rank": 3}) == {
        "quantize": "nf4",
        "rank": 3,
    }


@pytest.mark.parametrize("name", ["batch_size", "per_device_train_batch_size", "micro-batch-size"])
def test_what_has_to_be_said_of_a_batch(tmp_path, name):
    file, told = tmp_path / "a.json", []
    file.write_text(json.dumps({name: 3, "lora_r": 4}))
    assert load_settings(file, told) == {"batch_rows": 3, "rank": 4}
    assert len(told) == 1 and f"a.json: {name} is --batch-rows" in told[0]
