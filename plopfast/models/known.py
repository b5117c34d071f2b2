"""Shapes of well-known models, as the config.json of their hub repositories has them. No file is read to build one."""

from typing import Any

_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
_LLAMA32 = _LLAMA3 | {"max_position_embeddings": 131072, "tie_word_embeddings": True}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "head_dim": 128,
}


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip


KNOWN: dict[str, tuple[str, dict[str, Any]]] = {  # name: (hub repository, what its config.json says of shapes)
    "meta-llama-3-8b": ("meta-llama/Meta-Llama-3-8B", _LLAMA3 | _sizes(4096, 14336, 32, 32, 8)),
    "meta-llama-3-70b": ("meta-llama/Meta-Llama-3-70B", _LLAMA3 | _sizes(8192, 28672, 80, 64, 8)),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", _LLAMA32 | _sizes(2048, 8192, 16, 32, 8)),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", _LLAMA32 | _sizes(3072, 8192, 28, 24, 8)),
    "mistral-7b-v0.3": (
        "mistralai/Mistral-7B-v0.3",
        {"model_type": "mistral", "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None}
        | _sizes(4096, 14336, 32, 32, 8),
    ),
    "qwen2.5-7b": (
        "Qwen/Qwen2.5-7B",
        {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072} | _sizes(3584, 18944, 28, 28, 4),
    ),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", _QWEN3 | {"tie_word_embeddings": True} | _sizes(1024, 3072, 28, 16, 8)),
    "qwen3-8b": ("Qwen/Qwen3-8B", _QWEN3 | _sizes(4096, 12288, 36, 32, 8)),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M",
        {"model_type": "llama", "vocab_size": 49152, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
         "tie_word_embeddings": True} | _sizes(576, 1536, 30, 9, 3),
    ),
}  # fmt: skip


def known(name: str) -> dict[str, Any] | None:
    """The entry of a name or of a hub repository, in any case; None where there is none."""
    for short, (repository, shapes) in KNOWN.items():
        if name.lower() in (short, repository.lower()):
            return shapes
    return None
