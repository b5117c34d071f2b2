"""Nothing in a model's files is run, unpickled or fetched, and files of any content end in one clear error."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import build
from safetensors.torch import load_file, save_file

import plopfast as pf
from plopfast.models import loading, sources
from plopfast.support.errors import ModelError

HOSTILE = """
import pathlib
pathlib.Path({witness!r}).write_text("run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig): model_type = {model_type!r}
class Own(LlamaForCausalLM): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""
CODE = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
LOAD = """
import sys, warnings
import plopfast as pf
from plopfast.models import loading
for load in (pf.load_model, loading.load_tokenizer):
    try:
        load(sys.argv[1])
        print("loaded")
    except pf.PlopfastError as error:
        print(type(error).__name__, error)
"""


def edit(folder, name="config.json", **values):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_code(folder, witness, name="config.json", model_type="own", **auto_map):
    (folder / "own.py").write_text(HOSTILE.format(witness=str(witness), model_type=model_type))
    edit(folder, name, auto_map=auto_map)


def answered_yes(folder):
    """What loading the folder prints, in a process of its own whose user answers every question with yes."""
    run = subprocess.run([sys.executable, "-c", LOAD, str(folder)], input="y\n" * 50, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("case", ["config", "model", "tokenizer"])
def test_code_in_the_folder_is_never_run(model_folder, tmp_path, case):
    witness = tmp_path / "witness"
    if case == "tokenizer":
        entries = [None, "own.OwnTokenizer"]
        with_code(model_folder, witness, "tokenizer_config.json", AutoTokenizer=entries)
        edit(model_folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer")
        edit(model_folder, model_type="llama")
    else:
        with_code(model_folder, witness, **(CODE if case == "config" else {"AutoModelForCausalLM": "own.Own"}))
        edit(model_folder, model_type="own", architectures=["Own"])
    printed = answered_yes(model_folder)
    assert not witness.exists(), "it was run"
    if case != "tokenizer":
        assert printed.count("wants to run code of its own") == 2 and "own.Own" in printed
        assert "never runs code" in printed and "Do you wish" not in printed


def test_a_model_type_without_a_language_model(model_folder, tmp_path):
    """transformers has the configuration, but only the folder's own code makes a language model of it."""
    with_code(model_folder, tmp_path / "witness", AutoModelForCausalLM="own.Own")
    edit(model_folder, model_type="clip_text_model")
    with pytest.raises(ModelError, match=r"code of its own \(AutoModelForCausalLM: own.Own\)"):
        pf.load_model(model_folder)
    assert not (tmp_path / "witness").exists()


def test_transformers_own_class_is_taken_where_there_is_one(model_folder, tmp_path, llama):
    with_code(model_folder, tmp_path / "witness", model_type="llama", **CODE)
    model, _ = pf.load_model(model_folder)
    assert type(model).__module__.startswith("transformers.") and not (tmp_path / "witness").exists()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), llama.parameters(), strict=True))


def test_custom_generation_is_not_run(model_folder, tmp_path):
    (model_folder / "custom_generate").mkdir()
    (model_folder / "custom_generate" / "generate.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')")
    assert answered_yes(model_folder) == "loaded\nloaded\n" and not (tmp_path / "witness").exists()


def test_a_chat_template_is_no_code(model_folder):
    edit(model_folder, "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    _, tokenizer = pf.load_model(model_folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_kernels_of_the_hub_are_not_fetched(model_folder, monkeypatch):
    asked = []
    monkeypatch.setattr("transformers.modeling_utils.is_kernel", lambda name: asked.append(name) or False)
    for name in ("evil/kernels", "flash_attention_2", "kernels-community/flash-attn"):
        edit(model_folder, attn_implementation=name)
        with pytest.warns(UserWarning, match=f"asks for '{name}', which is not part of transformers: not used"):
            model, _ = pf.load_model(model_folder)
        assert model.config._attn_implementation == "sdpa"
    assert not set(asked) & {"evil/kernels", "flash_attention_2", "kernels-community/flash-attn"}
    edit(model_folder, attn_implementation="eager")
    assert pf.load_model(model_folder)[0].config._attn_implementation == "eager"


def test_an_adapter_beside_the_model_is_refused(model_folder):
    """transformers would load it, too, and without a word."""
    model = build("llama")
    pf.inject(model, pf.Placement({"model.layers.0.mlp.up_proj": (2, 4.0)}, [], "", 0))
    for file in pf.save_adapter(model, model_folder / "adapter").iterdir():
        file.rename(model_folder / file.name)
    with pytest.raises(ModelError, match="it holds an adapter"):
        pf.load_model(model_folder)
    with pytest.raises(ModelError, match="it holds an adapter"):
        loading.load_tokenizer(model_folder)
    (model_folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="it holds an adapter"):
        pf.load_model(model_folder / "model.gguf")


def test_pickled_weights_are_never_read(model_folder, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    tensors = load_file(model_folder / "model.safetensors")
    torch.save(tensors, model_folder / "pytorch_model.bin")
    torch.save(tensors, model_folder / "adapter_model.bin")
    pf.load_model(model_folder)
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        pf.load_model(model_folder)
    index = {"weight_map": dict.fromkeys(tensors, "pytorch_model.bin")}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"\.safetensors files only, but it names 'pytorch_model.bin'"):
        pf.load_model(model_folder)
    edit(model_folder, transformers_weights="adapter_model.bin")
    with pytest.raises(ModelError, match=r"\.safetensors files only, but it names 'adapter_model.bin'"):
        pf.load_model(model_folder)


def test_quantised_weights_are_refused_before_they_are_loaded(model_folder):
    edit(model_folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"quantised weights \('gptq'\) are not supported"):
        pf.load_model(model_folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b'"text"', b"\xff\xfe\x00", b"{}"])
def test_broken_json(model_folder, file, content):
    (model_folder / file).write_bytes(content)
    try:
        pf.load_model(model_folder)
    except ModelError:
        return
    assert file != "config.json", "a configuration that says nothing was accepted"


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [10**12, 10**6, -1, 0, "x", 1.5, True, [3], {}])
def test_impossible_sizes(model_folder, name, value):
    edit(model_folder, **{name: value})
    with pytest.raises(ModelError, match=f"{name}|cannot be loaded"):
        pf.load_model(model_folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0}, {"num_attention_heads": -3}, {"num_attention_heads": "x"}, {"intermediate_size": 10**12},
        {"model_type": "such-a-type"}, {"model_type": 3}, {"model_type": None}, {"rope_parameters": 7}, {"hidden_act": "no"},
        {"auto_map": "x"}, {"auto_map": [1]}, {"dtype": "no"}, {"architectures": 3}, {"attn_implementation": 7},
        {"quantization_config": "x"}, {"transformers_weights": 3}, {"configuration_files": [3]}, {"rms_norm_eps": "x"},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_impossible_settings_are_no_traceback(model_folder, change):
    edit(model_folder, **change)
    for load in (pf.load_model, loading.load_tokenizer):
        try:
            load(model_folder)
        except ModelError as error:
            assert str(model_folder) in str(error)


@pytest.mark.parametrize(
    "name", ["", "a\0b", "a\nb", "\0.gguf", "~", "a//b", "nobody/absent", "/", "x" * 5000, ".gguf"]
)
def test_names_that_are_no_model(name):
    for load in (pf.load_model, loading.load_tokenizer):
        with pytest.raises(ModelError):
            load(name)


def test_a_folder_that_must_not_be_read(model_folder, monkeypatch):
    """As another user than root meets it."""

    def forbidden(self, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.is_file", forbidden)
    with pytest.raises(ModelError, match=r"cannot be read \(Permission denied\)"):
        pf.load_model(model_folder)


def test_an_empty_name_is_not_the_default_model():
    with pytest.raises(ModelError, match="expected a Hugging Face hub id, a folder or a .gguf file"):
        pf.load_model("")


def test_the_size_check_counts_all_shards(model_folder):
    tensors = load_file(model_folder / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[:4], names[4:])):
        save_file({k: tensors[k] for k in part}, model_folder / f"model-{number}.safetensors")
    (model_folder / "model.safetensors").unlink()
    weight_map = {k: f"model-{int(k in names[4:])}.safetensors" for k in names}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, "metadata": {}}))
    pf.load_model(model_folder)
    assert sources.code_wanted(str(model_folder)) == {}


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_in_the_folder_is_not_waited_for(model_folder, name):
    (model_folder / name).unlink(missing_ok=True)
    os.mkfifo(model_folder / name)
    with pytest.raises(ModelError, match=f"{name}: expected a file, got a pipe"):
        pf.load_model(model_folder)


def test_settings_of_the_tokenizer_that_show_when_it_is_used(model_folder):
    file = model_folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load_tokenizer(model_folder)
