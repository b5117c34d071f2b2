"""Every class that transformers maps to causal language models, built tiny and random from its own configuration.

    names()                  model type -> class name, all that this transformers maps
    build("qwen3_next")      the model, some 50,000 weights in float32

Sizes are set by the names that configurations give them (SIZES), in nested configurations too. Lists with an entry a layer
are cut, so that each kind of layer stays. OWN holds what single families need beside that, and CANNOT those that can't be
built, with the reason. So families of later versions are built without being listed.
"""

import json
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, LAYERS, HEADS, WIDTH = 160, 4, 4, 32

SIZES: list[tuple[int, str]] = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (
        LAYERS,
        "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers "
        "num_blocks depth",
    ),
    (
        WIDTH,
        "hidden_size d_model n_embd dim emb_dim embed_dim embedding_dim model_dim embedding_size lru_width input_hidden_size attention_hidden_size adapter_in_dim adapter_input_size adapter_out_dim hidden_size_global "
        "mamba_hidden_size word_embed_proj_dim decoder_hidden_size encoder_hidden_size out_hidden_size text_hidden_size "
        "output_hidden_size hidden_dim ple_embed_dim router_hidden_size axial_norm_dim",
    ),
    (
        HEADS,
        "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads n_routed_experts num_experts "
        "num_local_experts moe_num_experts n_experts index_n_heads swa_num_attention_heads linear_num_heads indexer_n_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads n_head_kv kv_n_heads linear_num_key_heads num_experts_per_tok moe_k "
        "num_experts_per_token moe_topk moe_top_k top_k num_codebooks n_group num_expert_group swa_num_key_value_heads "
        "num_kv_shared_layers mamba_n_groups n_groups n_mamba_heads num_dense_layers hc_count zero_expert_num",
    ),
    (
        1,
        "topk_group first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts num_nextn_predict_layers indexer_kv_heads",
    ),
    (
        8,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim rotary_dim "
        "hidden_size_per_layer_input mamba_n_heads mamba_d_head mamba_head_dim mamba_num_heads index_head_dim d_kv "
        "global_head_dim kv_channels swa_head_dim linear_head_dim swa_v_head_dim dim_head attention_head_size index_topk "
        "indexer_head_dim laurel_rank d_rel ssm_num_heads hc_lowrank adapter_rank",
    ),
    (
        16,
        "q_lora_rank kv_lora_rank moe_intermediate_size expert_ffn_hidden_size mamba_d_state state_size ssm_state_size "
        "shared_expert_intermediate_size moe_shared_expert_intermediate_size o_lora_rank time_step_rank mamba_dt_rank "
        "shared_intermediate_size attention_head_dim pronunciation_embed_dim shape_embed_dim",
    ),
    (
        48,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size d_inner dim_ff dff d_ff "
        "intermediate_size_mlp feed_forward_size mlp_dim",
    ),
    (
        64,
        "sliding_window sliding_window_size attention_window_size local_attention chunk_size attention_chunk_size window_size "
        "mamba_d_ssm rel_extent mamba_chunk_size local_attn_chunk_length lsh_attn_chunk_length",
    ),
    (
        128,
        "max_position_embeddings n_positions max_seq_len n_ctx max_source_positions max_target_positions max_sequence_length "
        "model_max_length pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base",
    ),
]
VALUES: dict[str, int] = {name: size for size, names_ in SIZES for name in names_.split()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# sizes that configurations may leave open, and that some models don't take so
OPEN = {
    "head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "indexer_n_heads",
    "indexer_kv_heads", "indexer_head_dim",
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": {"head_dim": 16}},
    "dots3_note_text": {"head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    # all tokens: of equal scores, other batches choose others
    **{family: {"index_topk": 16} for family in ("deepseek_v32", "glm_moe_dsa", "hy_v4")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 32, "ext_pw_out_channel": 32}},
    "qwen4_exp": {"text_config": {"indexer_budget": 16, "indexer_compress_ratio": 2}},
    "qwen4_exp_text": {"indexer_budget": 16, "indexer_compress_ratio": 2},
    "reformer": {"hash_seed": 0, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"attention_hidden_size": 64, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"attention_hidden_size": 64, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
CANNOT: dict[str, str] = {
    "gemma3n": "its vision tower is a timm model, and timm is not installed",
    "gemma4_assistant": "an assistant: its layers read the keys and values of another model",
    "gemma4_unified_assistant": "an assistant: its layers read the keys and values of another model",
}


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
    layers = next(
        (known[n] for n in ("num_hidden_layers", "n_layer", "n_layers", "decoder_layers") if n in known), None
    )
    for name, value in known.items():
        part = vars(default).get(name)  # configurations that differ by layer refuse getattr
        if isinstance(part, transformers.PreTrainedConfig):
            given[name] = _tiny(type(part), own.get(name, {})).to_dict()
        elif name == "per_layer_config":
            given[name] = {key: _sized(layer) for key, layer in (value or {}).items() if int(key) < LAYERS}
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            given[name] = 0.0  # a forward pass in training mode is the same each time
        elif name in TOKENS:
            given[name] = TOKENS[name]
        elif isinstance(value, list) and len(value) == layers and name not in own:
            given[name] = [VALUES.get(name, one) if isinstance(one, int) else one for one in _cut(value)]
        elif name in VALUES and ((value is None and name in OPEN) or _is_size(value)):
            given[name] = VALUES[name]
    if "kv_lora_rank" in given and "num_key_value_heads" in given:  # latent attention: each head has its own
        given["num_key_value_heads"] = HEADS
    if "is_decoder" in known and not known.get("is_encoder_decoder"):
        given["is_decoder"] = True
    given |= {name: value for name, value in own.items() if not isinstance(value, dict) or name not in given}
    return config_class(**given)


def _sized(layer: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: VALUES.get(name, value) for name, value in layer.items()}
    if "kv_lora_rank" in layer and "num_key_value_heads" in layer:
        sizes["num_key_value_heads"] = HEADS
    return sizes


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _cut(by_layer: list[Any]) -> list[Any]:
    """LAYERS entries, of each kind one where there are kinds, and the last as it was."""
    kinds = list(dict.fromkeys(by_layer)) if all(isinstance(one, str) for one in by_layer) else by_layer
    cut = (kinds * LAYERS)[:LAYERS] if len(kinds) <= LAYERS else kinds[:LAYERS]
    return cut if cut[-1] == by_layer[-1] or not isinstance(cut[-1], str) else [*cut[:-1], by_layer[-1]]


def build(model_type: str, seed: int = 0) -> nn.Module:
    """A tiny model in float32, in evaluation mode. Biases, norms and gates are random too, so that none can hide."""
    torch.manual_seed(seed)
    config = config_of(model_type)
    own = getattr(transformers, names()[model_type]).config_class
    parts = [part for part in vars(config).values() if own is not None and type(part) is own]
    if parts and type(config) is not own:  # MusicgenForCausalLM, which takes the decoder's part alone
        model = getattr(transformers, names()[model_type])(parts[0]).float().eval()
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not parameter.any():  # some gates begin as zeros
                parameter.normal_(std=0.02)
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * (0.5 if name.endswith("bias") else 0.1))
    return model


def described(model_type: str) -> str:
    """The tiny configuration as JSON, for a reader who wants to build it alone."""
    return json.dumps(config_of(model_type).to_diff_dict(), default=str)
