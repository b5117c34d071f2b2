"""Every field of PEFT's adapter_config.json: honoured as PEFT does, or refused by name."""

import copy
import dataclasses
import json
import math

import peft
import pytest
import torch
from helpers import build, everywhere, logits, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import plopfast as pf
from plopfast.lora import adapter_config
from plopfast.lora.adapter_config import HONOURED, NEUTRAL, NO_EFFECT
from plopfast.lora.layer import adapters
from plopfast.support.errors import AdapterError, PlopfastError

TABLES = (HONOURED, NEUTRAL, NO_EFFECT)
FIELDS = {field.name: field for field in dataclasses.fields(LoraConfig)}


@pytest.fixture
def saved(llama, tmp_path):
    pf.inject(llama, everywhere(llama))
    randomise(llama)
    return pf.save_adapter(llama, tmp_path / "adapter")


def edit(folder, **values):
    file = folder / "adapter_config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if values.get(k, v) is not ...}
    file.write_text(json.dumps(kept | {k: v for k, v in values.items() if v is not ...}))


def by_peft(base, folder, **settings):
    """A PEFT adapter with random B, saved in `folder`, and what it computes when PEFT loads it."""
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        **settings,
    }
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())


def test_every_field_of_peft_is_in_one_table():
    """A red test here means that PEFT has a new field: find out what it computes, then add it to a table."""
    assert set().union(*TABLES) >= set(FIELDS), sorted(set(FIELDS) - set().union(*TABLES))
    assert sum(map(len, TABLES)) == len(set().union(*TABLES)), "a field is in one table only"


def test_pefts_own_defaults_are_read(saved):
    defaults = {k: v for k, v in LoraConfig(r=4, task_type="CAUSAL_LM").to_dict().items() if k != "target_modules"}
    edit(saved, **json.loads(json.dumps(defaults, default=lambda value: getattr(value, "value", str(value)))))
    assert pf.load_adapter(build("llama"), saved)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"r": 3, "lora_alpha": 5}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"target_modules": r".*\.(q|v)_proj"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"alpha_pattern": {r"layers\.[01]\..*q_proj": 3, "q_proj": 7, "layers.2.mlp.down_proj": 1.5}},
        {"rank_pattern": {r"(q|down)_proj": 1}}, {"alpha_pattern": {r"model.layers.\d+.mlp.down_proj": 2}},
        {"layers_to_transform": [0, 2]}, {"layers_to_transform": 1}, {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": r".*layers\.1\..*"},
        {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": False},
        {"task_type": None}, {"inference_mode": True}, {"revision": "main"}, {"base_model_name_or_path": "nobody/nothing"},
        {"fan_in_fan_out": True}, {"modules_to_save": None}, {"bias": "none"}, {"qalora_group_size": 8},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_honoured_as_peft_does(llama, tmp_path, settings):
    theirs = by_peft(llama, tmp_path / "adapter", **settings)
    ours = copy.deepcopy(llama)
    pf.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(llama), theirs, atol=1e-3), "the adapter does something"
    pf.merge(ours)
    torch.testing.assert_close(logits(ours), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
        {"lora_bias": True}, {"trainable_token_indices": [1, 2]}, {"alora_invocation_tokens": [5, 6]}, {"layer_replication": [[0, 2], [1, 3]]},
        {"lora_bias": True, "target_modules": ["q_proj"]},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_peft_computes_otherwise_is_refused(llama, tmp_path, settings):
    by_peft(llama, tmp_path / "adapter", **settings)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    with pytest.raises(AdapterError, match=rf"adapter_config.json: ({'|'.join(settings)}) = .* is not supported"):
        pf.load_adapter(llama, tmp_path / "adapter")
    assert before.keys() == llama.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items()), "the model is as it was"


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_2", "olora", "corda", "loftq", "lora_ga", "mica", "PISSA", "of a newer PEFT"]
)
def test_initialisations_that_change_the_base_are_refused(saved, init):
    edit(saved, init_lora_weights=init)
    with pytest.raises(AdapterError, match=rf"init_lora_weights = '{init}' is not supported; PiSSA and its like"):
        pf.load_adapter(build("llama"), saved)


@pytest.mark.parametrize("field", sorted(NEUTRAL))
def test_every_other_value_is_refused_by_name(saved, field):
    for value in (True, "other", 7, [1], {"a": 1}):
        if value in NEUTRAL[field]:
            continue
        edit(saved, **{field: value})
        with pytest.raises(AdapterError, match=rf"adapter_config.json: {field} = .* is not supported; "):
            pf.load_adapter(build("llama"), saved)
    for value in (None, False, [], {}, *NEUTRAL[field]):
        edit(saved, **{field: value})
        pf.load_adapter(build("llama"), saved)


def test_a_pissa_adapter_that_peft_converted(llama, tmp_path):
    """Its message says how to convert one; converted, it computes the same here."""
    settings = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"
    )
    model = get_peft_model(copy.deepcopy(llama), settings).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    trained = logits(model)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match=r"init_lora_weights = 'pissa' is not supported; .*path_initial_model_for"):
        pf.load_adapter(copy.deepcopy(llama), tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    pf.load_adapter(llama, tmp_path / "converted")
    torch.testing.assert_close(logits(llama), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("r", value) for value in (4.7, "4", True, None, 0, -2, [], 10**400, 5)],
        *[("lora_alpha", value) for value in ("x", True, None, 0, -1, math.inf, math.nan, 10**400, 1e300, [1])],
        *[("lora_dropout", value) for value in (2, -0.1, 1, "0.1", True, math.nan, [0])],
        *[("use_rslora", value) for value in ("no", 1, [], {}, 0)],
        *[("rank_pattern", value) for value in ("x", [1], {"q_proj": 4.5}, {"q_proj": "4"}, {"q_proj": True}, {"q_proj": 3})],
        *[("alpha_pattern", value) for value in (3, [], {"q_proj": -1}, {"q_proj": None}, {"q_proj": math.inf})],
        *[("target_modules", value) for value in (3, [1], {}, ["k_proj"], [], [None])],
        *[("exclude_modules", value) for value in (3, ["q_proj"], ["model.layers.1.mlp.up_proj"], [[]])],
        *[("layers_to_transform", value) for value in ("x", 1.5, [0, 1], 2, [True], True, {"a": 1})],
        *[("peft_type", value) for value in ("IA3", None, 3, [])],
        ("task_type", "SEQ_CLS"), ("such_a_field", 1), ("such_a_field", {"a": None}),
    ],
)  # fmt: skip
def test_values_of_another_kind_or_range(saved, field, value):
    edit(saved, **{field: value})
    with pytest.raises(AdapterError, match=rf"{field}|is not JSON|digits"):
        pf.load_adapter(build("llama"), saved)


def test_fields_that_are_absent_or_empty(saved):
    edit(saved, such_a_field=None, another={}, bias=..., lora_dropout=..., task_type=..., target_modules=None)
    pf.load_adapter(build("llama"), saved)
    edit(saved, r=...)
    with pytest.raises(AdapterError, match="r and rank_pattern say rank 8 for .* its tensors have rank 4"):
        pf.load_adapter(build("llama"), saved)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"LORA"', "{}", '{"peft_type": "LORA"}', "\0", "NaN"])
def test_any_json_is_one_clear_error(saved, text):
    (saved / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError):
        pf.load_adapter(build("llama"), saved)


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_is_not_finite(saved, part, value, dtype):
    file = saved / "adapter_model.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{part}.weight"][1, 1] = value
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=rf"layers.1.mlp.up_proj.lora_{part} holds NaN or infinity"):
        pf.load_adapter(build("llama"), saved)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(4, 32, dtype=torch.int), torch.ones(32), torch.ones(1, 4, 32), torch.zeros(0, 32), torch.tensor(1.0)],
)
def test_tensors_that_are_no_matrix_of_floats(saved, tensor):
    file = saved / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": tensor}, file)
    with pytest.raises(AdapterError):
        pf.load_adapter(build("llama"), saved)


@pytest.mark.parametrize("value", ["", "{", "[1", '["a"]', "3", "null", "[NaN]", "[1e999]", "[" * 100_000])
def test_a_fingerprint_that_was_edited(saved, value):
    file = saved / "adapter_model.safetensors"
    save_file(load_file(file), file, {"plopfast_base": value})
    model = build("llama")
    with pytest.raises(AdapterError, match="plopfast_base|other base weights"):
        pf.load_adapter(model, saved)
    assert not pf.unload(model), "the model is as it was"


def test_nothing_but_plopfast_errors_for_values_of_any_kind(saved):
    """Each field with each kind of value: read, or refused with the field's name."""
    file = saved / "adapter_config.json"
    good = json.loads(file.read_text())
    kinds = [
        None,
        True,
        False,
        0,
        -1,
        3,
        4.5,
        10**30,
        "",
        "x",
        "(",
        [],
        [0],
        ["x"],
        [[]],
        {},
        {"x": 1},
        {"(": 3},
        {"q_proj": {}},
    ]
    for field in {*FIELDS, "another"}:
        for value in kinds:
            file.write_text(json.dumps(good | {field: value}))
            try:
                adapter_config.read_config(saved).placed(dict.fromkeys(["model.layers.0.mlp.up_proj"], 4))
            except PlopfastError as error:
                assert field in str(error) or "digits" in str(error), (field, value)


def test_the_version_of_peft_is_one_that_was_looked_at():
    assert peft.__version__ >= "0.18"


def test_an_alpha_that_is_not_said_is_pefts_own(saved):
    """Whatever the rank is."""
    edit(saved, lora_alpha=..., alpha_pattern=...)
    model = build("llama")
    pf.load_adapter(model, saved)
    assert {(m.rank, m.alpha) for m in adapters(model).values()} == {(4, LoraConfig().lora_alpha)} != {(4, 4)}


@pytest.mark.parametrize(
    "layers, fits", [(0, False), ([0], False), ([0, 1, 2], True), ([], True), (None, True), ([0, 2], False)]
)
def test_layers_without_tensors_and_tensors_without_layers(saved, layers, fits):
    edit(saved, layers_to_transform=layers)
    if fits:
        pf.load_adapter(build("llama"), saved)
        return
    with pytest.raises(AdapterError, match="layers_to_transform"):
        pf.load_adapter(build("llama"), saved)


def test_matrices_that_do_not_multiply(saved):
    weights = saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if key.endswith("lora_B.weight"))
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, weights)
    with pytest.raises(AdapterError):
        pf.load_adapter(build("llama"), saved)
