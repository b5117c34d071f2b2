"""Quantised checkpoints of bitsandbytes and FineGrainedFP8 are read without those packages, and every damage is named.

bitsandbytes is the oracle: it writes the folders, and its own model's logits are compared. fp8 is compared with
transformers' own dequantisation.
"""

import json
import math
import shutil

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from helpers import SMALL, build, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig

import plopfast as pf
from plopfast.kernels import torch_codes
from plopfast.models.loading import codes_of, load_tokenizer
from plopfast.models.quantized import QuantizedLinear
from plopfast.models.sources import codes_stored
from plopfast.support.errors import ModelError

WIDE = {
    **SMALL,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
}  # bitsandbytes' own forward needs it
Q = "model.layers.0.self_attn.q_proj"
WAYS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "skipping": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["q_proj", "lm_head"]},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def dense(architecture="llama"):
    if architecture != "llama":
        return build(architecture)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**WIDE)).eval()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, tokenizer):
    """Makes a folder that bitsandbytes wrote, once, and returns it with the model that wrote it."""
    made = {}

    def make(way, architecture="llama"):
        if (way, architecture) not in made:
            folder = tmp_path_factory.mktemp(way)
            dense(architecture).save_pretrained(folder / "dense")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder / "dense", quantization_config=BitsAndBytesConfig(**WAYS[way]), dtype=torch.float32
            )
            model.save_pretrained(folder / "codes")
            tokenizer.save_pretrained(folder / "codes")
            made[way, architecture] = folder / "codes", model.eval()
        return made[way, architecture]

    return make


@pytest.fixture
def copied(theirs, tmp_path):
    """A copy of such a folder whose tensors or config.json a test changes."""

    def copy(way, change=lambda tensors: None, **config):
        folder = tmp_path / "copy"
        shutil.copytree(theirs(way)[0] if way != "fp8" else fp8_folder(theirs("nf4")[0], tmp_path), folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        set_config(folder, **config)
        return folder

    return copy


def set_config(folder, **values):
    file = folder / "config.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"quantization_config": found.get("quantization_config", {}) | values}))


def fp8_folder(like, tmp_path, shape=None, scales=torch.float32):
    """The dense model as FineGrainedFP8 stores it; `shape` makes the scales' shape from [N, K]."""
    folder = tmp_path / "fp8"
    shutil.copytree(like, folder)
    tensors = {}
    for name, value in dense().state_dict().items():
        if "_proj" not in name:
            tensors[name] = value
            continue
        rows, columns = shape(*value.shape) if shape else (-(-value.shape[0] // 128), -(-value.shape[1] // 128))
        block = (-(-value.shape[0] // rows), -(-value.shape[1] // columns)) if shape else (128, 128)
        tensors[name], scale = torch_codes.encode_fp8(value, block)
        tensors[f"{name}_scale_inv"] = scale.to(scales)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None if shape else [128, 128]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))
    return folder


def close(ours, theirs, factor=1e-5):
    assert (ours - theirs).norm() <= factor * theirs.norm(), ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("way", ["nf4", "nested", "bfloat16", "skipping"])
def test_nf4(way, theirs):
    folder, model = theirs(way)
    loaded, _ = pf.load_model(folder)
    infos = pf.linear_modules(loaded)
    plain = dense()
    for info, other in zip(infos, pf.linear_modules(plain), strict=True):
        if (weight := model.get_submodule(info.name).weight).dtype in (torch.uint8, torch.bfloat16):
            other.module.weight = nn.Parameter(dequantize_4bit(weight.data, weight.quant_state))
        assert torch.equal(info.frozen.dequantize(), other.frozen.dequantize())
    close(logits(loaded), logits(plain))
    close(
        logits(loaded), logits(model), 0.02
    )  # theirs multiplies in bfloat16 on a CPU, and packs its weights anew for that
    assert {info.type: info.frozen.kind for info in infos}["q_proj"] == ("dense" if way == "skipping" else "nf4")
    assert {info.frozen.kind for info in infos if info.type != "q_proj"} == {"nf4"}
    assert ("nested_absmax" in loaded.get_submodule(infos[-1].name)._parameters) == (way == "nested")


def test_int8(theirs):
    folder, model = theirs("int8")
    loaded, _ = pf.load_model(folder)
    for info, other in zip(pf.linear_modules(loaded), pf.linear_modules(model), strict=True):
        assert info.frozen.kind == "int8"
        torch.testing.assert_close(info.frozen.dequantize(), other.frozen.dequantize().float(), rtol=1e-3, atol=1e-7)
    close(logits(loaded), logits(model), 0.05)  # theirs rounds the inputs of each product to int8, too


@pytest.mark.parametrize("way", ["nested", "int8"])
def test_conv1d_biases_and_a_tied_head(way, theirs):
    folder, model = theirs(way, "gpt2")
    loaded, _ = pf.load_model(folder)
    codes = [name for name, module in loaded.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(codes) == 12 and loaded.lm_head.weight is loaded.transformer.wte.weight
    for name in codes:
        ours, other = (pf.linear_modules(m) for m in (loaded, model))
        assert [i.frozen.shape for i in ours] == [i.frozen.shape for i in other]
        assert torch.equal(loaded.get_submodule(name).bias, model.get_submodule(name).bias.float())
    close(logits(loaded), logits(dense("gpt2")), 0.1)


BLOCKS = {
    "blocks": None,
    "rows": lambda n, k: (n, 1),
    "one": lambda n, k: (1, 1),
}


@pytest.mark.parametrize("shape", BLOCKS)
def test_fp8(shape, theirs, tmp_path):
    folder = fp8_folder(theirs("nf4")[0], tmp_path, BLOCKS[shape])
    loaded, _ = pf.load_model(folder)
    assert {info.frozen.kind for info in pf.linear_modules(loaded)} == {"fp8"}
    tensors = load_file(folder / "model.safetensors")
    for info in pf.linear_modules(loaded):
        codes, scale = tensors[f"{info.name}.weight"], tensors[f"{info.name}.weight_scale_inv"]
        high, wide = (-(-size // count) for size, count in zip(codes.shape, scale.shape, strict=True))
        if shape == "blocks":
            high = wide = 128
        factor = scale.repeat_interleave(high, 0)[: len(codes)].repeat_interleave(wide, 1)[:, : codes.shape[1]]
        assert torch.equal(info.frozen.dequantize(), codes.float() * factor)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # decodes it, without a GPU
    close(logits(loaded), logits(other), 1e-4)


def test_scales_that_are_powers_of_two(theirs, tmp_path):
    folder = fp8_folder(theirs("nf4")[0], tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    exact = {n: (t.log2().round().exp2() if n.endswith("scale_inv") else t) for n, t in tensors.items()}
    save_file(exact, file, {"format": "pt"})
    one = logits(pf.load_model(folder)[0])
    bytes_ = {n: (t.to(torch.float8_e8m0fnu) if n.endswith("scale_inv") else t) for n, t in exact.items()}
    save_file(bytes_, file, {"format": "pt"})
    assert torch.equal(logits(pf.load_model(folder)[0]), one)


def test_names_without_the_body_and_in_shards(theirs, copied):
    """A checkpoint of the body alone lacks its name; and the parts of a module may lie in two files."""

    def shorten(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    folder = copied("nested", shorten)
    tensors = load_file(folder / "model.safetensors")
    parts = {"one": {n: t for n, t in tensors.items() if "absmax" in n}}
    parts["two"] = {n: t for n, t in tensors.items() if n not in parts["one"]}
    for part, held in parts.items():
        save_file(held, folder / f"{part}.safetensors", {"format": "pt"})
    places = {n: f"{part}.safetensors" for part, held in parts.items() for n in held}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert torch.equal(logits(pf.load_model(folder)[0]), logits(pf.load_model(theirs("nested")[0])[0]))
    (folder / "one.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no file one.safetensors"):
        pf.load_model(folder)


def state(**values):
    def change(tensors):
        key = f"{Q}.weight.quant_state.bitsandbytes__nf4"
        found = json.loads(bytes(tensors[key].tolist())) | values
        tensors[key] = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    return change


def put(name, value):
    return lambda tensors: tensors.update({f"{Q}.{name}": value(tensors[f"{Q}.{name}"])})


def drop(name):
    return lambda tensors: tensors.pop(f"{Q}.{name}")


def with_nan(t):
    t = t.clone()
    t.view(-1)[3] = math.nan
    return t


STATE = r"quant_state.bitsandbytes__nf4: expected "
DAMAGED = {
    "nf4 no codes": ("nf4", drop("weight"), rf"1 missing \({Q}.weight\)"),
    "nf4 no absmax": ("nf4", drop("weight.absmax"), rf"{Q}.weight.absmax: expected F32 \[256\], got no such tensor"),
    "nf4 no map": ("nf4", drop("weight.quant_map"), r"quant_map: expected F32 \[16\], got no such tensor"),
    "nf4 no state": ("nf4", drop("weight.quant_state.bitsandbytes__nf4"), STATE + "a JSON object .* no such tensor"),
    "nf4 short": ("nf4", put("weight", lambda t: t[:-1]), r"weight: expected U8 \[8192\], got U8 \[8191, 1\]: download"),
    "nf4 few absmax": ("nf4", put("weight.absmax", lambda t: t[:-1]), r"absmax: expected F32 \[256\], got F32 \[255\]"),
    "nf4 nan": ("nf4", put("weight.absmax", with_nan), rf"NaN or infinity in 1 of its weights \({Q}.weight.absmax\)"),
    "nf4 levels": ("nf4", put("weight.quant_map", lambda t: t.flip(0)), r"quant_map: expected the 16 levels of nf4"),
    "nf4 bytes": ("nf4", put("weight.quant_state.bitsandbytes__nf4", lambda t: t[:-1]), STATE + "a JSON object, got oth"),
    "nf4 shape": ("nf4", state(shape=[64, 256]), STATE + r"shape \[128, 128\], got \[64, 256\]"),
    "nf4 block": ("nf4", state(blocksize=128), STATE + r"blocksize 64, got 128: quantise the model again"),
    "nf4 type": ("nf4", state(quant_type="fp4"), STATE + r"quant_type nf4, got fp4"),
    "nested no absmax": ("nested", drop("weight.nested_absmax"), r"nested_absmax: expected F32 \[1\], got no such tensor"),
    "nested map": ("nested", put("weight.nested_quant_map", lambda t: t[:9]), r"nested_quant_map: expected F32 \[256\]"),
    "nested nan": ("nested", put("weight.nested_absmax", lambda t: t * math.nan), r"NaN .*nested_absmax\)"),
    "nested offset": ("nested", state(nested_offset=None), STATE + "a finite nested_offset, got None"),
    "nested block": ("nested", state(nested_blocksize=64), STATE + "nested_blocksize 256, got 64"),
    "mixed": ("nf4", put("weight", lambda t: torch.zeros(128, 128, dtype=torch.int8)), "expected nf4, .* got I8, which is int8"),
    "int8 no scales": ("int8", drop("SCB"), r"SCB: expected F32 or F16 or BF16 \[128\], got no such tensor"),
    "int8 few scales": ("int8", put("SCB", lambda t: t[:-1]), r"SCB: expected .* got F32 \[127\]"),
    "int8 nan": ("int8", put("SCB", with_nan), rf"NaN or infinity in 1 of its weights \({Q}.SCB\)"),
    "int8 turned": ("int8", put("weight", lambda t: t[:64]), r"weight: expected I8 \[128, 128\], got I8 \[64, 128\]"),
    "fp8 no scales": ("fp8", drop("weight_scale_inv"), r"weight_scale_inv: expected the scales, got no such tensor"),
    "fp8 many scales": ("fp8", put("weight_scale_inv", lambda t: t.repeat(2, 2)), r"expected .* \[1, 1\], got F32 \[2, 2\]"),
    "fp8 scale nan": ("fp8", put("weight_scale_inv", lambda t: t * math.nan), r"NaN .*weight_scale_inv\)"),
    "fp8 nan": (
        "fp8", put("weight", lambda t: with_nan(t.float()).to(t.dtype)), rf"NaN or infinity in 1 of its weights \({Q}.weight\)",
    ),
    "fp8 turned": ("fp8", put("weight", lambda t: t[:64]), r"weight: expected F8_E4M3 \[128, 128\], got F8_E4M3 \[64, 128\]"),
    "other name": ("int8", lambda t: t.update({"other.weight": t[f"{Q}.weight"] + 0, "other.SCB": t[f"{Q}.SCB"] + 0}),
                   r"other.weight is int8, and the model has no linear module of this name"),
    "norm": ("nf4", lambda t: t.pop("model.norm.weight"), r"1 missing \(model.norm.weight\)"),
    "norm shape": ("nf4", lambda t: t.update({"model.norm.weight": torch.ones(5)}), "of another shape .*norm|cannot be loaded"),
    "extra": ("nf4", lambda t: t.update({f"{Q}.weight.extra": torch.ones(5)}), rf"1 not expected \({Q}.weight.extra\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case, copied):
    way, change, message = DAMAGED[case]
    with pytest.raises(ModelError, match=message):
        pf.load_model(copied(way, change))


def test_config_says_another_kind(theirs, copied):
    folder = copied("nf4", load_in_4bit=False, load_in_8bit=True)
    with pytest.raises(ModelError, match="expected int8, as config.json says, got U8, which is nf4"):
        pf.load_model(folder)


def test_config_says_so_of_dense_weights(model_folder):
    set_config(model_folder, quant_method="bitsandbytes", load_in_8bit=True)
    with pytest.raises(
        ModelError, match="config.json: expected int8 weights, as its quantization_config says, got none"
    ):
        pf.load_model(model_folder)


def test_quantised_twice(theirs):
    with pytest.raises(ModelError, match="its weights are nf4 already: leave out --quantize"):
        pf.load_model(theirs("nf4")[0], quantize="nf4")


def test_fp4(theirs):
    with pytest.raises(ModelError, match=r"bitsandbytes' fp4.*are not supported.*bfloat16.*--quantize nf4"):
        pf.load_model(theirs("fp4")[0])


METHODS = [
    "gptq",
    "awq",
    "hqq",
    "mxfp4",
    "nvfp4",
    "mxfp8",
    "torchao",
    "compressed-tensors",
    "eetq",
    "aqlm",
    "vptq",
    "quanto",
    "bitnet",
    "spqr",
    "fp_quant",
    "fbgemm_fp8",
    "quark",
    "higgs",
    "auto-round",
    "modelopt",
    "unknown",
]


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_by_name(method, model_folder):
    set_config(model_folder, quant_method=method, bits=4)
    for load in pf.load_model, load_tokenizer:
        with pytest.raises(ModelError, match=rf"quantised weights \('{method}'\) are not supported.*--quantize nf4"):
            load(model_folder)


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [128, True]])
def test_a_block_that_is_none(block, model_folder):
    set_config(model_folder, quant_method="fp8", weight_block_size=block)
    with pytest.raises(ModelError, match="weight_block_size in config.json: expected two whole numbers"):
        codes_stored(str(model_folder))


def test_the_kind_is_known_without_the_weights(theirs, monkeypatch):
    monkeypatch.setattr("plopfast.models.quantizer.load", lambda *_: pytest.fail("the model is loaded"))
    for way, kind in ("nf4", "nf4"), ("nested", "nf4"), ("int8", "int8"):
        folder, _ = theirs(way)
        assert codes_of(folder) == kind and codes_of(folder / ".." / "dense") is None
        assert codes_of(folder / ".." / "dense", "fp8") == "fp8"
    assert codes_of(None) is None, "a GGUF file is made dense"
