"""Settings that other tools have and plopfast has not, or means differently: the reason, or what to use instead."""

from collections.abc import Sequence

from .errors import nearest

_LOW_RANK = "plopfast trains low-rank updates alone"
_READ = "adapters of PEFT that hold it are loaded, evaluated and merged"
_DTYPE = "give --dtype bfloat16 or float16, the type of frozen weights and activations; adapters are always float32"
_ROWS = "give --train FILE, or --train owner/name:split for a data set of the hub"
_LEARN = "give --learn assistant, last or all, what is learned of messages; of pairs it is the completion"
_STEPS = "give --eval-every and --save-every, which count steps"
_LAYERS = "give --rule the names of the modules, with commas"
_NOTHING_LIKE = (
    "per_device_eval_batch_size", "eval_batch_size", "dataloader_num_workers", "dataloader_pin_memory", "remove_unused_columns",
    "logging_dir", "logging_strategy", "run_name", "push_to_hub", "hub_model_id", "hub_strategy", "do_train", "do_eval", "tf32",
    "flash_attention", "xformers_attention", "sdp_attention", "attn_implementation", "flash_attn", "adam_beta1", "adam_beta2",
    "adam_epsilon", "fan_in_fan_out", "lora_fan_in_fan_out", "use_cache", "strict", "special_tokens", "max_prompt_length",
    "preprocessing_num_workers", "overwrite_cache", "plot_loss", "dataset_prepared_path", "pad_to_sequence_len", "use_peft",
)  # fmt: skip
WHY_NOT = {
    **dict.fromkeys(_NOTHING_LIKE, "plopfast has nothing like it: leave it out"),
    "modules_to_save": f"{_LOW_RANK}, no whole modules; {_READ}",
    "bias": f"{_LOW_RANK}, no biases; {_READ}",
    "trainable_token_indices": f"{_LOW_RANK}, no rows of the embedding",
    "lora_bias": f"{_LOW_RANK}, and these have no bias",
    "layer_replication": "plopfast trains the layers that the model has",
    **dict.fromkeys(("bf16", "fp16", "torch_dtype"), _DTYPE),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "dataset_path", "data_path", "data"), _ROWS),
    **dict.fromkeys(
        ("train_on_inputs", "completion_only_loss", "assistant_only_loss", "train_on_responses_only"), _LEARN
    ),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "save_strategy", "evals_per_epoch", "saves_per_epoch"), _STEPS
    ),
    **dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"), _LAYERS),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "start with torchrun, and give --parallel fsdp"),
    **dict.fromkeys(("template", "chat_template"), "the model's own chat template is used"),
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern"), "--budget with --ranks proportional shares ranks out by the scores"
    ),
    "warmup_steps": "give a share of the steps, such as --warmup 0.1",
    "group_by_length": "rows of similar length are in one batch as it is",
    "val_set_size": "give --valid FILE (default: every 20th training row)",
    "bnb_4bit_quant_type": "give --quantize nf4, the one kind of 4 bits",
    "bnb_4bit_compute_dtype": "give --dtype, the type that products are computed in",
    "init_lora_weights": "give --init kaiming, gaussian, orthogonal or eva",
    "dataset_text_field": "give --columns text=NAME",
    "logging_steps": "every step is in the run folder's metrics.jsonl",
    "wandb_project": "give --log-to wandb, which logs to the project plopfast",
    "resume_from_checkpoint": "give --resume and --out DIR",
    "overwrite_output_dir": "give --overwrite",
    "adapter_name_or_path": "give --adapter DIR to plopfast eval, generate or merge",
    "lora_model_dir": "give --adapter DIR to plopfast eval, generate or merge",
    "finetuning_type": "plopfast trains LoRA; --full trains all weights",
    "peft_type": "plopfast trains LoRA",
    "task_type": "plopfast trains causal language models",
    "trust_remote_code": "plopfast runs no code of a model's files",
    "do_sample": "give --temperature: 0 takes the likeliest token, above 0 tokens are drawn",
    "top_k": "give --top-p or --temperature",
}


def why_not(name: str) -> str:
    """Why plopfast has no such setting, or what to use instead; "" for a name that no known tool has."""
    return WHY_NOT.get(name.strip("-").partition("=")[0].replace("-", "_"), "")


def hint(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown setting: why there is none, or the most similar known one, or nothing."""
    why = why_not(name)
    return f": {why}" if why else nearest(name, known)
