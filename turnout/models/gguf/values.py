"""What a GGUF file says of its model beside the tensors: sizes, rotary frequencies, experts."""

from collections.abc import Mapping
from typing import Any

import torch

from turnout.models.config import LMConfig
from turnout.models.families.family import moe_of
from turnout.models.families.meaning import router_meaning
from turnout.models.gguf.architectures import Architecture
from turnout.models.rope import Rope, attention_scale

__all__ = ["describe", "notes"]

# Architectures whose experts have their width under the name of dense layers.
_ONE_WIDTH = ("llama", "olmoe", "granitemoe")


def describe(writer: Any, config: LMConfig, its: Architecture) -> None:
    """Adds the values of a model.

    Args:
        writer: ``gguf.GGUFWriter`` of this architecture.
        config: of the model.
        its: the architecture.
    """
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_head_count(config.heads)
    if config.norm == "layer":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    one = config.moe is not None and its.name in _ONE_WIDTH
    writer.add_feed_forward_length(moe_of(config).hidden if one else config.dense_hidden)
    _heads(writer, config)
    if not config.learned_positions:
        _rope(writer, config, its)
    _scales(writer, config, its)
    if config.moe is not None:
        _experts(writer, config, its)


def notes(config: LMConfig, dtype: torch.dtype) -> tuple[str, ...]:
    """Where llama.cpp itself rounds or chooses otherwise than transformers does in this dtype."""
    scaling: Mapping[str, Any] = config.rope_scaling or {}
    found = []
    if scaling.get("rope_type") == "longrope":
        before = scaling["original_max_position_embeddings"]
        found.append(
            f"llama.cpp takes the frequencies of long texts wherever its context is above {before}, transformers where "
            "the text is"
        )
    if scaling.get("rope_type") == "yarn" and scaling.get("truncate") is False:
        found.append("llama.cpp rounds the borders of YaRN's ramp, which this model does not")
    if dtype != torch.float32 and config.embedding_rounded and config.embedding_scale != 1:
        found.append("llama.cpp does not round the number that embeddings are multiplied by")
    return tuple(found)


def _heads(writer: Any, config: LMConfig) -> None:
    if config.mla is None:
        writer.add_head_count_kv(config.key_heads)
        writer.add_key_length(config.head_width)
        writer.add_value_length(config.head_width)
        return
    mla = config.mla
    # The latent is the one key that all heads share, and the value.
    writer.add_head_count_kv(1)
    writer.add_key_length(mla.kv_rank + mla.rope_dim)
    writer.add_value_length(mla.kv_rank)
    writer.add_key_length_mla(mla.nope_dim + mla.rope_dim)
    writer.add_value_length_mla(mla.v_dim)
    writer.add_kv_lora_rank(mla.kv_rank)
    if mla.q_rank is not None:
        writer.add_q_lora_rank(mla.q_rank)


def _rope(writer: Any, config: LMConfig, its: Architecture) -> None:
    import gguf

    writer.add_rope_dimension_count(config.rotated_width)
    writer.add_rope_freq_base(config.rope_theta)
    if config.local_rope_theta is not None:
        writer.add_rope_freq_base_swa(config.local_rope_theta)
    elif its.name == "gemma3":  # which takes another base of its own where it is told none
        writer.add_rope_freq_base_swa(config.rope_theta)
    scaling: Mapping[str, Any] = config.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_beta_fast(float(scaling.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(scaling.get("beta_slow") or 1))
        if config.mla is not None:
            writer.add_rope_scaling_yarn_log_mul(0.1 * float(scaling.get("mscale_all_dim") or 0))
    if kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(float(Rope(config).magnitude))


def _scales(writer: Any, config: LMConfig, its: Architecture) -> None:
    if its.windows and config.window is not None:
        writer.add_sliding_window(config.window)
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if its.name in ("granite", "granitemoe"):
        writer.add_attention_scale(attention_scale(config))
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_logit_scale(config.logit_divisor)


def _experts(writer: Any, config: LMConfig, its: Architecture) -> None:
    import gguf

    moe = moe_of(config)
    name, options = router_meaning(moe)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    if its.name not in _ONE_WIDTH:
        writer.add_expert_feed_forward_length(moe.hidden)
    if its.name == "qwen2moe" and moe.shared_hidden is not None:
        writer.add_expert_shared_feed_forward_length(moe.shared_hidden)
    if its.name not in ("deepseek2", "glm4moe"):
        return
    writer.add_leading_dense_block_count(sum(not config.is_routed(n) for n in range(config.layers)))
    writer.add_expert_shared_count((moe.shared_hidden or 0) // moe.hidden)
    writer.add_expert_weights_scale(float(options.get("scale", 1.0)))
    writer.add_expert_weights_norm(bool(options.get("renormalize")))
    sigmoid = name == "GroupLimited" and options.get("scores") == "sigmoid"
    kinds = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(kinds.SIGMOID if sigmoid else kinds.SOFTMAX)
    if options.get("num_groups", 1) > 1:
        writer.add_expert_group_count(int(options["num_groups"]))
        writer.add_expert_group_used_count(int(options["top_groups"]))
