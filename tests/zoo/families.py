"""Every class that transformers maps to causal language models, built tiny and random from its own configuration.

    names()                  model type -> class name, all that this transformers maps
    build("qwen3_next")      the model, some 100,000 weights in float32

Sizes are set by the names that configurations give them (SIZES), in nested configurations too, and OWN holds what single
families need beside that. So families of later versions are built without being listed.
"""

import json
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, LAYERS, HEADS, WIDTH = 160, 4, 4, 32

SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    LAYERS: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers",
    WIDTH: "hidden_size d_model n_embd dim embed_dim model_dim embedding_size lru_width attention_hidden_size input_hidden_size "
           "mamba_hidden_size word_embed_proj_dim decoder_hidden_size encoder_hidden_size",
    HEADS: "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads "
           "num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads n_routed_experts num_experts "
           "num_local_experts moe_num_experts n_experts index_n_heads",
    2: "num_key_value_heads num_kv_heads n_head_kv linear_num_key_heads num_experts_per_tok moe_k num_experts_per_token "
       "moe_topk top_k num_codebooks n_group",
    1: "topk_group first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts num_nextn_predict_layers",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim rotary_dim "
       "hidden_size_per_layer_input mamba_d_head mamba_head_dim index_head_dim d_kv global_head_dim attention_head_dim kv_channels",
    16: "q_lora_rank kv_lora_rank moe_intermediate_size expert_ffn_hidden_size mamba_d_state state_size ssm_state_size "
        "shared_expert_intermediate_size moe_shared_expert_intermediate_size o_lora_rank time_step_rank mamba_dt_rank "
        "shared_intermediate_size",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size d_inner dim_ff intermediate_size_mlp "
        "ffn_config.ffn_hidden_size",
    128: "max_position_embeddings n_positions max_seq_len n_ctx max_source_positions max_target_positions max_sequence_length",
    64: "sliding_window attention_window_size local_attention chunk_size attention_chunk_size window_size",
}  # fmt: skip
VALUES: dict[str, Any] = {name: size for size, names_ in SIZES.items() for name in names_.split()}
VALUES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
ELSEWHERE = {"id2label", "label2id"}

OWN: dict[str, dict[str, Any]] = {}


def names() -> dict[str, str]:
    """Model type -> class name."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(model_type: str) -> Any:
    """The tiny configuration of a model type."""
    return _tiny(CONFIG_MAPPING[model_type], OWN.get(model_type, {}))


def _tiny(config_class: Any, own: dict[str, Any]) -> Any:
    try:
        default = config_class()
    except Exception:  # some have no default that they would take
        default = None
    known = default.to_dict() if default is not None else {}
    given: dict[str, Any] = {}
    for name, value in known.items():
        part = getattr(default, name, None)
        if isinstance(part, transformers.PreTrainedConfig):
            given[name] = _tiny(type(part), own.get(name, {})).to_dict()
        elif name in VALUES and (value is None or isinstance(value, int)) and not isinstance(value, bool):
            if value is not None or name.endswith("token_id"):
                given[name] = VALUES[name]
    given |= {name: value for name, value in own.items() if not isinstance(value, dict) or name not in given}
    return config_class(**given)


def build(model_type: str, seed: int = 0) -> nn.Module:
    """A tiny model in float32, in evaluation mode. Biases and norms are random too, so that neither can hide."""
    torch.manual_seed(seed)
    config = config_of(model_type)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * (0.5 if name.endswith("bias") else 0.1))
    return model


def described(model_type: str) -> str:
    """The tiny configuration as JSON, for a reader who wants to build it alone."""
    return json.dumps(config_of(model_type).to_diff_dict(), default=str)
