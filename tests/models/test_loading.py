"""What a loaded model and tokenizer are: their dtype, mode, tokens, context; and what is refused, two-sided."""

import json
import math

import pytest
import torch
import transformers
from helpers import build
from safetensors.torch import load_file, save_file

import plopfast as pf
from plopfast.models.fingerprints import same_fingerprint
from plopfast.models.loading import load_tokenizer, path_of
from plopfast.models.running import check_packing, run_for_logits
from plopfast.models.sources import checked_config, code_wanted
from plopfast.models.weights import check_finite, check_loaded
from plopfast.support.errors import ModelError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_has_the_dtype_that_is_asked_for(model_folder, dtype):
    model, _ = pf.load_model(model_folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("own", [None, "<pad>", "<s>"])
def test_padding_is_the_tokenizers_own_where_it_has_one(model_folder, own):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = own
    tokenizer.save_pretrained(model_folder)
    assert pf.load_model(model_folder)[1].pad_token == (own or "</s>")


@pytest.mark.parametrize("rows, fits", [(300, True), (299, False)])
def test_each_token_has_a_row_of_the_embedding(model_folder, llama, rows, fits):
    llama.resize_token_embeddings(rows)
    llama.save_pretrained(model_folder)
    assert len(transformers.AutoTokenizer.from_pretrained(model_folder)) == 300
    if fits:
        pf.load_model(model_folder)
        return
    with pytest.raises(ModelError, match="number 299"):
        pf.load_model(model_folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite(model_folder, value):
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        pf.load_model(model_folder)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_the_weights_are_those_of_the_configuration(model_folder, change):
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(3)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError):
        pf.load_model(model_folder)


@pytest.mark.parametrize("kind", ["missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"])
def test_whatever_differs_is_refused(kind):
    check_loaded("model", {})
    with pytest.raises(ModelError, match="odd one"):
        check_loaded("model", {kind: ["odd one"]})


@pytest.mark.parametrize(
    "value, finite", [(math.nan, False), (math.inf, False), (-math.inf, False), (1e38, True), (-1e38, True)]
)
@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_every_stored_tensor_is_looked_at(value, finite, where):
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    model.register_buffer("kept", torch.zeros(3))
    (model.weight if where == "parameter" else model.kept).view(-1)[1] = value
    if finite:
        check_finite(model, "it")
        return
    with pytest.raises(ModelError):
        check_finite(model, "it")


def test_the_context_is_that_of_the_text(model_folder):
    text = transformers.Gemma3TextConfig(max_position_embeddings=77, vocab_size=300, num_hidden_layers=1)
    transformers.Gemma3Config(text_config=text.to_dict()).save_pretrained(model_folder)
    (model_folder / "model.safetensors").unlink()
    assert load_tokenizer(model_folder)[1] == 77


def test_where_a_model_is(model_folder):
    assert path_of(model_folder) == model_folder and path_of(model_folder / "absent") is None
    assert path_of("owner/of-the-hub") is None


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_fingerprints_agree_within_a_hundredth_of_their_size(scale):
    one = [scale * value for value in (1.0, -2.0, 3.0, 4.0)]
    for factor, same in ((1.0, True), (1.004, True), (1.02, False), (-1.0, False)):
        assert same_fingerprint(one, [factor * value for value in one]) == same
    assert not same_fingerprint(one, one[:3]) and not same_fingerprint([scale] * 4, [scale])


@pytest.mark.parametrize("training", [False, True])
def test_sequences_of_a_packed_batch_that_mix(training):
    """As where a model does not look at position_ids; dropout is not what makes the difference."""
    model = build("llama").train(training)
    check_packing(model)
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ModelError):
        check_packing(model)


def test_dropout_is_no_mixing():
    model = build("gpt2")
    model.train()
    check_packing(model)


def test_no_hook_stays_on_the_head_of_a_model_that_raises():
    model = build("llama")
    hook = model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(ZeroDivisionError):
        run_for_logits(model, batch, torch.tensor([[True, False, True]]))
    hook.remove()
    assert model(**batch).logits.shape == (1, 3, 300)


@pytest.mark.parametrize("what", ["attn", "experts"])
def test_kernels_of_the_hub_are_not_asked_for(model_folder, what):
    file = model_folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), f"{what}_implementation": "owner/kernels"}))
    with pytest.warns(UserWarning, match="'owner/kernels'"):
        config = checked_config(str(model_folder))
    assert getattr(config, f"_{what}_implementation") != "owner/kernels"


def edited(folder, name="config.json", **values):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return str(folder)


HOW = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    "values", [{"quantization_config": HOW}, {"text_config": {"quantization_config": HOW}}], ids=str
)
def test_quantised_weights_are_refused_wherever_it_says_so(model_folder, values):
    with pytest.raises(ModelError, match="bitsandbytes"):
        checked_config(edited(model_folder, **values))


@pytest.mark.parametrize("name, size, fits", [
    ("num_hidden_layers", 3, True), ("num_hidden_layers", 10**4, False), ("num_hidden_layers", 0, False),
    ("vocab_size", 300, True), ("vocab_size", 10**7, False), ("vocab_size", 0, False), ("hidden_size", 10**6, False),
])  # fmt: skip
def test_sizes_are_those_that_the_weights_can_have(model_folder, name, size, fits):
    source = edited(model_folder, **{name: size})
    if fits:
        checked_config(source)
        return
    with pytest.raises(ModelError, match=name):
        checked_config(source)


def test_code_of_the_folders_own_is_seen_in_both_files(model_folder):
    edited(model_folder, auto_map={"AutoConfig": "a.B"})
    source = edited(model_folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["c.D", None]})
    assert set(code_wanted(source)) == {"AutoConfig", "AutoTokenizer"}
