"""GGUF files: a small Llama written by the gguf package, its values in another dtype, and how often it is read."""

import gguf
import numpy as np
import pytest
import torch

import plopfast as pf

HIDDEN, INNER, KV, LAYERS = 32, 64, 16, 2
TOKENS = ["<s>", "<|endoftext|>", "a", "b", "ab"]
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (KV, HIDDEN), "attn_v": (KV, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER), "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
}  # fmt: skip
QUANTISED = "ffn_down"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Its path and the values that were written, by name."""
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path / "cache"))
    path, random = tmp_path / "small.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("small")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    values = {
        "token_embd": random.standard_normal((len(TOKENS), HIDDEN)),
        "output_norm": random.standard_normal(HIDDEN),
    }
    for layer in range(LAYERS):
        values |= {f"blk.{layer}.{name}": random.standard_normal(shape) for name, shape in SHAPES.items()}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    for name, value in values.items():
        if name.endswith(QUANTISED):
            packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, values


def test_its_values_are_those_of_the_file(small):
    path, values = small
    model, tokenizer = pf.load_model(path)
    block = model.model.layers[1]
    torch.testing.assert_close(block.mlp.down_proj.weight, torch.from_numpy(values["blk.1.ffn_down"]), rtol=0, atol=0)
    torch.testing.assert_close(block.self_attn.v_proj.weight, torch.from_numpy(values["blk.1.attn_v"]), rtol=0, atol=0)
    assert model.config.num_hidden_layers == LAYERS and tokenizer("abab")["input_ids"][-2:] == [4, 4]


def test_it_is_read_once_and_then_kept(small, monkeypatch):
    """transformers reads it three times, and makes the table of tensor names for each module."""
    path, made = small[0], []

    def counting(function):
        return lambda *arguments: (made.append(function.__name__), function(*arguments))[1]

    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, counting(getattr(gguf, name)))
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    for _ in range(2):
        pf.load_model(path)
        assert sorted(made) == ["GGUFReader", "get_tensor_name_map"]
        assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before, "the package is as it was"
