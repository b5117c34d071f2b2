"""`stream=True`: models are read through maps of their files, and what is made while they are read goes into a file."""

import errno
import os
from pathlib import Path

import pytest
import torch
import transformers
from helpers import build, logits, quantize
from safetensors import SafetensorError
from safetensors.torch import save_file

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.models import spool
from plopfast.models.frozen import streamed_in
from plopfast.models.saved import save_model
from plopfast.models.spool import Spool, is_mapped, mapped_tensors
from plopfast.models.streaming import unstream
from plopfast.support.errors import ConfigError, FileError, ModelError


@pytest.fixture
def saved(tmp_path, tokenizer, monkeypatch):
    """Writes a model to a folder, with the small tokenizer; plopfast's cache is beside it."""
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path / "cache"))

    def save(model, **more):
        save_model(model, tmp_path / "model", **more)
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def host_tensors(model):
    payloads = model.streaming.streamer.payloads
    return [tensor for payload in payloads for of_module in payload.tensors.values() for tensor in of_module.values()]


def both(folder, **how):
    (plain, _), (model, _) = pf.load_model(folder, **how), pf.load_model(folder, **how, stream=True)
    assert torch.equal(logits(plain), logits(model)) and len(streamed_in(model)) == len(pf.linear_modules(plain))
    assert not any(is_mapped(tensor) for tensor in (*model.parameters(), *model.buffers())), "what stays is memory"
    assert plain.generation_config == model.generation_config and plain.name_or_path == model.name_or_path
    assert plain.config.to_dict() == model.config.to_dict() and not model.training
    return plain, model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_weights_in_their_own_dtype_stay_in_the_checkpoint(architecture, saved, tmp_path):
    folder = saved(build(architecture))
    _, model = both(folder)
    assert all(is_mapped(tensor) for tensor in host_tensors(model))
    begins = mapped_tensors([folder / "model.safetensors"])
    assert all(is_mapped(tensor) for tensor in begins.values()) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("how", [{"dtype": torch.bfloat16}, {"quantize": "nf4"}, {"quantize": "int8"}], ids=str)
def test_what_is_cast_or_quantised_is_in_a_file_without_a_name(how, saved, tmp_path):
    _, model = both(saved(build("llama")), **how)
    assert all(is_mapped(tensor) for tensor in host_tensors(model))
    assert (tmp_path / "cache").is_dir() and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_checkpoints_of_codes(kind, saved):
    _, model = both(saved(quantize(build("llama"), kind)))
    large = [tensor for tensor in host_tensors(model) if (tensor.dim() == 2 and tensor.shape[1] > 1) or kind == "nf4"]
    assert len(large) >= 21 and all(is_mapped(tensor) for tensor in large)


def test_a_model_with_experts_and_a_tied_head(saved):
    """The experts are one tensor for each layer, which transformers merges; they and the head are not streamed."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
    }
    config = transformers.Qwen2MoeConfig(
        **sizes, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, tie_word_embeddings=True,
    )  # fmt: skip
    _, model = both(saved(transformers.AutoModelForCausalLM.from_config(config).eval()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [name for name in streamed_in(model) if name.endswith("experts")]


def test_unstreamed_weights_can_be_written_to(saved):
    """Those of a map cannot: the process would be killed."""
    model, _ = pf.load_model(saved(build("llama")), stream=True)
    pf.inject(model, pf.Placement({"model.layers.0.mlp.up_proj": (2, 4.0)}, [], "", 0))
    adapters(model)["model.layers.0.mlp.up_proj"].lora_B.data.fill_(0.1)
    expected = logits(model)
    unstream(model)
    assert not any(is_mapped(tensor) for tensor in model.parameters())
    pf.merge(model)
    torch.testing.assert_close(logits(model), expected)


def test_resident_layers_are_memory(saved):
    model, _ = pf.load_model(saved(build("llama")), stream=True, resident_share=0.5)
    assert len(streamed_in(model)) == 14 and model.streaming.resident == 1
    assert not any(is_mapped(parameter) for parameter in model.parameters())


def test_old_files_that_are_not_aligned(tmp_path):
    save_file({"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(5.0)}, tmp_path / "one.safetensors")
    data = (tmp_path / "one.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    moved = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    (tmp_path / "two.safetensors").write_bytes(moved)
    for name in ("one", "two"):
        found = mapped_tensors([tmp_path / f"{name}.safetensors"])
        assert torch.equal(found["a"], torch.arange(3, dtype=torch.uint8)) and torch.equal(
            found["b"], torch.arange(5.0)
        )


def test_a_full_disk_is_an_error_with_the_sizes(saved, monkeypatch):
    folder = saved(build("llama"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spool.os, "posix_fallocate", full)
    with pytest.raises(
        FileError, match=r"no room for the streamed weights \(No space left.*0 MiB are written, 0\.0 MiB more.*CACHE"
    ):
        pf.load_model(folder, dtype=torch.bfloat16, stream=True)
    assert pf.load_model(folder, stream=True), "which needs no room"


def test_a_cache_that_cannot_be_written(saved, tmp_path, monkeypatch):
    folder = saved(build("llama"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileError, match=r"cannot write there.*PLOPFAST_CACHE"):
        pf.load_model(folder, dtype=torch.bfloat16, stream=True)
    assert pf.load_model(folder, stream=True), "which writes nothing"


def test_the_spool_keeps_values(monkeypatch, tmp_path):
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path / "cache"))
    one = Spool()
    for value in (
        torch.randn(70, 30).T,
        torch.arange(5, dtype=torch.uint8),
        torch.zeros(0, 3),
        torch.randn(3).bfloat16(),
    ):
        kept = one.keep(value)
        assert torch.equal(kept, value) and kept.dtype == value.dtype
        assert is_mapped(kept) == bool(value.numel()) and one.keep(kept) is kept
    page = spool.mmap.ALLOCATIONGRANULARITY
    assert one.size == -(-70 * 30 * 4 // page) * page, "the small ones had room in its last page"


@pytest.mark.skipif(not hasattr(spool.mmap, "MADV_DONTNEED"), reason="this system takes no such advice")
def test_pages_that_are_let_go_are_read_again(monkeypatch, tmp_path):
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path))
    save_file({"a": torch.ones(1 << 22)}, tmp_path / "one.safetensors")
    read, kept = mapped_tensors([tmp_path / "one.safetensors"])["a"], Spool().keep(torch.full((1 << 22,), 2.0))
    assert read.sum() == 1 << 22 and kept.sum() == 2 << 22
    before = resident_mib()
    spool.let_pages_go()
    assert resident_mib() < before - 30
    assert read.sum() == 1 << 22 and kept.sum() == 2 << 22


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_many_weights_take_few_maps(monkeypatch, tmp_path):
    """Each map holds a file descriptor, of which a process often has 1,024."""
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path))
    one, before = Spool(), len(spool._MAPPED)
    values = [torch.full((1000,), float(number)) for number in range(300)]
    kept = [one.keep(value) for value in values]
    assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True))
    assert len(spool._MAPPED) - before < 12 and one.size < 3 * 300 * 4096


def test_no_more_maps_is_not_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path))

    def no_more(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(spool.mmap, "mmap", no_more)
    with pytest.raises(FileError, match=r"cannot map the file of streamed weights \(Too many open files\)$"):
        Spool().keep(torch.ones(3))


def test_a_type_that_torch_does_not_know(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "one.safetensors")
    data = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(data.replace(b'"F32"', b'"X32"'))
    with pytest.raises((ModelError, SafetensorError), match="X32"):
        mapped_tensors([tmp_path / "one.safetensors"])


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none(share, model_folder):
    with pytest.raises(ConfigError, match="resident_share"):
        pf.load_model(model_folder, stream=True, resident_share=share)
    with pytest.raises(ConfigError, match="resident_share is a share of streamed layers"):
        pf.load_model(model_folder, resident_share=0.5)


def test_damaged_files_and_other_models_are_refused_as_ever(saved, tmp_path):
    folder = saved(build("llama"))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        pf.load_model(folder, stream=True)
    tensors = {name: tensor.clone() for name, tensor in build("llama").state_dict().items()}
    up = "model.layers.1.mlp.up_proj.weight"
    for change, words in (
        (lambda t: t.pop(up), "1 missing"),
        (lambda t: t.update({up: torch.zeros(32, 48)}), "1 of another shape"),
        (lambda t: t.update({up: t[up] * float("nan")}), "NaN or infinity"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ModelError, match=words):
            pf.load_model(folder, stream=True)
