"""Keys of a GPT-2 ``config.json`` other than ``GPTConfig``'s fields, by what they may hold without changing the logits.

From transformers' GPT2Config, PreTrainedConfig and GenerationConfig, versions 2.0 to 5.24, from its predecessors, and
from models on the hub. transformers itself ignores every key that it does not know.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_gpt.config import GPTConfig

ALIASES = {  # transformers' general names for GPT-2's fields
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
QUANTIZED = ("quantization", "quantization_config")  # mlx-lm writes both

# Labels, outputs, precision, other tasks; generation; dropout and other settings of training; notes.
HARMLESS = frozenset(
    """
    model_type architectures transformers_version name_or_path tokenizer_class tokenizer_type torch_dtype dtype n_ctx
    task_specific_params finetuning_task custom_pipelines transformers.js_config unsloth_version unsloth_fixed
    num_labels id2label label2id problem_type prefix predict_special_tokens
    use_cache output_past output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    torchscript xla_device is_decoder tf_legacy_loss gradient_checkpointing chunk_size_feed_forward
    reorder_and_upcast_attn attn_implementation tie_last_hidden_states model_max_length
    use_flash_attention use_flash_attn use_bfloat16 fp16 bf16
    do_sample temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff
    min_length max_length min_new_tokens max_new_tokens max_time num_beams num_beam_groups diversity_penalty
    early_stopping length_penalty repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids force_words_ids constraints suppress_tokens begin_suppress_tokens
    sequence_bias num_return_sequences remove_invalid_values renormalize_logits exponential_decay_length_penalty
    penalty_alpha guidance_scale low_memory stop_strings token_healing watermarking_config dola_layers
    prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold cache_implementation cache_config output_logits
    dropout hidden_dropout hidden_dropout_prob attention_dropout attention_probs_dropout_prob classifier_dropout
    layerdrop learning_rate weight_decay warmup_steps max_steps num_train_epochs batch_size train_batch_size seed
    author license created_date date description comment language languages version model_name name url homepage
    dataset datasets tags base_model base_model_name chat_template last_updated save_step
    """.split()  # noqa: SIM905
)
# Private names of transformers; ids and texts of tokens; the head that summarises a sequence.
HARMLESS_PATTERN = re.compile(r"_\w*|\w+_token(_ids?)?|summary_\w+")

# Parts of other models: harmless if off, that is false, 0, null or empty.
OFF = frozenset(
    """
    add_cross_attention cross_attention_hidden_size is_encoder_decoder tie_encoder_decoder pruned_heads
    per_layer_config n_special use_mems sliding_window use_sliding_window use_rope rotary alibi multi_query
    parallel_attn use_parallel_residual qk_norm moe
    """.split()  # noqa: SIM905
)


def is_harmless(key: str, value: Any, config: GPTConfig) -> bool:
    """Return True if a key that is no field of ``GPTConfig`` cannot change the logits of this model."""
    if key in HARMLESS or HARMLESS_PATTERN.fullmatch(key):
        return True
    if key in OFF or value is None or isinstance(value, (dict, list)):
        return is_off(value)
    return value in other_names(config).get(key, ())


def is_off(value: Any) -> bool:
    """Return True for false, 0, null, and what holds nothing else: ``{"0": []}``."""
    values = [value]
    while values:  # no recursion: a file may nest deeply
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif value:
            return False
    return True


def other_names(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    """Return settings under names of other models, which transformers' GPT-2 does not read: harmless if they agree."""
    return {
        **dict.fromkeys(("n_vocab", "n_words", "padded_vocab_size"), (config.vocab_size,)),
        "vocab_size_or_config_json_file": (config.vocab_size, -1),  # of transformers 2
        **dict.fromkeys(("d_model", "n_embed", "embed_dim"), (config.n_embd,)),
        "intermediate_size": (config.inner_dim,),
        **dict.fromkeys(("hidden_act", "afn"), (config.activation_function,)),
        "layer_norm_eps": (config.layer_norm_epsilon,),
        "head_dim": (config.head_dim,),
        "position_embedding_type": ("absolute", "learned"),
        **dict.fromkeys(("num_heads", "n_heads", "num_key_value_heads"), (config.n_head,)),
        **dict.fromkeys(("num_layers", "n_layers"), (config.n_layer,)),
        **dict.fromkeys(("block_size", "context_length", "max_seq_len", "max_seq_length"), (config.n_positions,)),
        **dict.fromkeys(("bias", "attention_bias", "mlp_bias", "is_causal"), (True,)),
    }
