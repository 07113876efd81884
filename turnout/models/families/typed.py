"""The keys of a config.json that are read, each with the type that it must have."""

import types
from collections.abc import Mapping
from typing import Any

from turnout.errors import CheckpointError, word
from turnout.reading import check_fields

__all__ = ["check_types"]

_WHOLE = (
    "attention_chunk_size decoder_sparse_step first_k_dense_replace head_dim hidden_size intermediate_size "
    "kv_lora_rank max_position_embeddings max_window_layers moe_intermediate_size n_embd n_group n_head n_inner "
    "n_layer n_positions n_routed_experts n_shared_experts no_rope_layer_interval "
    "num_attention_heads num_experts num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts "
    "num_mtp_layers num_nextn_predict_layers "
    "original_max_position_embeddings q_lora_rank query_pre_attn_scalar qk_nope_head_dim qk_rope_head_dim "
    "shared_expert_intermediate_size shared_intermediate_size sliding_window sliding_window_pattern "
    "topk_group v_head_dim vocab_size"
).split()
_NUMBERS = (
    "attention_multiplier attn_logit_softcapping clip_qkv embedding_multiplier final_logit_softcapping "
    "initializer_range layer_norm_epsilon logits_scaling partial_rotary_factor rope_local_base_freq "
    "residual_multiplier rms_norm_eps rope_theta routed_scaling_factor swiglu_alpha swiglu_limit"
).split()
_FLAGS = (
    "add_cross_attention attention_bias is_causal lm_head_bias mlp_bias norm_topk_prob qkv_bias rope_interleave "
    "scale_attn_by_inverse_layer_idx scale_attn_weights tie_word_embeddings "
    "use_bidirectional_attention use_qk_norm use_sliding_window"
).split()
_TEXTS = (
    "activation_function dtype hidden_act hidden_activation model_type scoring_func topk_method torch_dtype".split()
)
_ROPE = "attention_factor beta_fast beta_slow factor high_freq_factor low_freq_factor mscale mscale_all_dim".split()
_OTHERS = {
    "architectures": list[str] | None,
    "auto_map": dict[str, Any] | None,
    "layer_types": list[str] | None,
    "mlp_only_layers": list[int] | None,
    "no_rope_layers": list[int] | None,
    "quantization_config": dict[str, Any] | None,
    "rope_parameters": dict[str, Any] | None,
    "rope_scaling": dict[str, Any] | None,
}
_KINDS: dict[str, types.UnionType] = {
    **dict.fromkeys(_WHOLE, int | None),
    **dict.fromkeys(_NUMBERS, float | None),
    **dict.fromkeys(_FLAGS, bool | None),
    **dict.fromkeys(_TEXTS, str | None),
    **_OTHERS,
}
_ROPE_KINDS: dict[str, types.UnionType] = {
    **dict.fromkeys((*_ROPE, "rope_theta", "partial_rotary_factor"), float | None),
    **dict.fromkeys(("type", "rope_type"), str | None),
    **dict.fromkeys(("long_factor", "short_factor"), list[float] | None),
    "original_max_position_embeddings": int | None,
    # One for each kind of layers.
    **dict.fromkeys(("full_attention", "sliding_attention"), dict[str, Any] | None),
}
# The largest side of a tensor that anybody has; lists of layers are made before any size is compared.
_MOST = 1 << 31


def check_types(keys: Mapping[str, Any], where: str = "config.json") -> None:
    """Refuses a config.json with a key of another type than transformers writes, or of no possible size.

    Raises:
        CheckpointError: names the key, its value and its type.

    >>> check_types({"hidden_size": "64"})
    Traceback (most recent call last):
    turnout.errors.CheckpointError: a key must have its type in config.json; got 'hidden_size' is '64', which must...

    Source: the configurations of transformers.
    """

    def refuse(problem: str) -> CheckpointError:
        fix = "restore config.json from a copy"
        return CheckpointError(word("a key", got=problem, allowed="have its type", where=where, fix=fix))

    check_fields(keys, _KINDS, refuse)
    for name in ("rope_scaling", "rope_parameters"):
        given = keys.get(name) or {}
        for each in (given, *(inside for inside in given.values() if isinstance(inside, dict))):
            check_fields(each, _ROPE_KINDS, lambda problem, name=name: refuse(f"{name}: {problem}"))
    for name in _WHOLE:
        least = 1 if name in ("decoder_sparse_step", "no_rope_layer_interval") else 0
        if keys.get(name) is not None and not least <= keys[name] < _MOST:
            raise refuse(f"{name!r} is {keys[name]}, which must be from {least} to below {_MOST:,}")
