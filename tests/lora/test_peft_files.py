"""Adapters in PEFT's format, both ways; damaged and foreign files; atomic writing."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import build, logits, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import plopfast as pf
from plopfast.support import files
from plopfast.support.errors import AdapterError, FileError


def mixed(model):
    """Different ranks and alphas, on all modules of one type and some of another."""
    infos = pf.linear_modules(model)
    first = infos[0].type
    modules = {i.name: ((4, 8.0) if i.layer else (2, 6.0)) for i in infos if i.type == first}
    last = infos[-1]
    return pf.Placement({**modules, last.name: (3, 5.0)}, [], "explicit", 0)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_ours(any_model, tmp_path, rslora):
    base = copy.deepcopy(any_model)
    pf.inject(any_model, mixed(any_model), dropout=0.1, rslora=rslora)
    randomise(any_model)
    pf.save_adapter(any_model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(any_model), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()
    pf.merge(any_model)
    torch.testing.assert_close(logits(merged), logits(any_model), rtol=1e-5, atol=1e-5)
    for (name, one), (_, two) in zip(merged.state_dict().items(), any_model.state_dict().items(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_pefts(any_model, tmp_path, rslora):
    ours = copy.deepcopy(any_model)
    infos = pf.linear_modules(any_model)
    types = sorted({i.type for i in infos})[:2]
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=types, rank_pattern={infos[-1].type: 2, rf"1\..*{types[0]}": 3}, alpha_pattern={types[1]: 5},
        use_rslora=rslora, task_type="CAUSAL_LM", fan_in_fan_out=infos[0].transposed,
    )  # fmt: skip
    theirs = get_peft_model(any_model, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    names = pf.load_adapter(ours, tmp_path / "adapter")
    assert {n.split(".")[-1] for n in names} == {t.split(".")[-1] for t in types}
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()
    pf.merge(ours)
    torch.testing.assert_close(logits(ours), logits(merged), rtol=1e-5, atol=1e-5)


@pytest.fixture
def saved(llama, tmp_path):
    pf.inject(llama, mixed(llama))
    randomise(llama)
    return pf.save_adapter(llama, tmp_path / "adapter")


def test_round_trip_and_config(llama, saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8.0 and len(config["rank_pattern"]) == 2
    other = build("llama")
    pf.load_adapter(other, saved)
    assert torch.equal(logits(other), logits(llama))
    assert sorted(p.name for p in saved.parent.iterdir()) == ["adapter"], "no scratch folder is left"


def test_whole_types_are_named_shortly(llama, tmp_path):
    placement = pf.Placement({i.name: (2, 2.0) for i in pf.linear_modules(llama) if i.type == "v_proj"}, [], "", 0)
    pf.inject(llama, placement)
    config = json.loads((pf.save_adapter(llama, tmp_path / "a") / "adapter_config.json").read_text())
    assert config["target_modules"] == ["v_proj"] and not config["rank_pattern"]


def test_files_can_be_read_by_those_who_may_read_new_ones(llama, tmp_path):
    before = os.umask(0o027)
    try:
        pf.inject(llama, mixed(llama))
        pf.save_adapter(llama, tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").iterdir()} == {0o640}


def test_another_base_is_noticed(saved):
    with pytest.raises(AdapterError, match="other base weights"):
        pf.load_adapter(build("llama", seed=1), saved)
    model = build("llama", seed=1)
    assert pf.load_adapter(model, saved, check_base=False)
    for dtype in (torch.bfloat16, torch.float16):  # the same base in another dtype passes
        pf.load_adapter(build("llama").to(dtype), saved)
    with pytest.raises(AdapterError, match="no linear module"):
        pf.load_adapter(build("gpt2"), saved)
    with pytest.raises(AdapterError, match=r"is 32 -> \d+ here, the adapter's is"):
        pf.load_adapter(narrower(), saved)


def narrower():
    from helpers import SMALL
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_attention_heads": 2, "head_dim": 8}))


def test_damaged_files(saved, llama):
    pf.unload(llama)
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    good = weights.read_bytes()
    for broken in (good[:-7], good[:20], b"", b"PK\x03\x04 a pickle"):
        weights.write_bytes(broken)
        with pytest.raises(AdapterError, match="truncated or not a safetensors file"):
            pf.load_adapter(llama, saved)
    weights.write_bytes(good)
    tensors = load_file(weights)
    save_file({"foreign.weight": torch.zeros(2)}, weights)
    with pytest.raises(AdapterError, match=r"unexpected tensor 'foreign.weight'"):
        pf.load_adapter(llama, saved)
    save_file({k: v for k, v in tensors.items() if "lora_A" in k}, weights)
    with pytest.raises(AdapterError, match="lora_A only; the file is incomplete"):
        pf.load_adapter(llama, saved)
    save_file({}, weights)
    with pytest.raises(AdapterError, match="holds no tensors"):
        pf.load_adapter(llama, saved)
    weights.unlink()
    with pytest.raises(AdapterError, match=r"no such file \(adapters in pickle format"):
        pf.load_adapter(llama, saved)
    for change in ({"peft_type": "IA3"}, {"lora_bias": True}, {"trainable_token_indices": [1]}):
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | change))
        with pytest.raises(AdapterError, match="of a LoRA adapter|not supported"):
            pf.load_adapter(llama, saved)
        config.write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match="not an adapter folder"):
        pf.load_adapter(llama, saved.parent)


def test_saving_refuses_what_it_should(llama, saved, tmp_path):
    with pytest.raises(FileError, match="exists already"):
        pf.save_adapter(llama, saved)
    pf.save_adapter(llama, saved, overwrite=True)
    first = next(m for m in llama.modules() if isinstance(m, pf.LoRALinear))
    before = (saved / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        first.lora_B[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN or infinity: not saved"):
        pf.save_adapter(llama, saved, overwrite=True)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    pf.unload(llama)
    with pytest.raises(AdapterError, match="no LoRA adapters"):
        pf.save_adapter(llama, tmp_path / "other")


def test_a_full_disk(llama, saved):
    """A real limit on file sizes, in a process of its own: one clear error, and the earlier adapter is intact."""
    before = (saved / "adapter_model.safetensors").read_bytes()
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import plopfast as pf
from helpers import build
from plopfast.support.errors import FileError
model = build("llama")
pf.load_adapter(model, {str(saved)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    pf.save_adapter(model, {str(saved)!r}, overwrite=True)
except FileError as error:
    assert "writing failed" in str(error), error
else:
    raise AssertionError("it did not fail")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "f.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(FileError, match="No space left"), files.replacing(path) as scratch:
        scratch.write_text("half")
        raise OSError(28, "No space left on device")
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileError, match="cannot write there"):
        files.write_json(path / "below" / "a-file.json", {})
