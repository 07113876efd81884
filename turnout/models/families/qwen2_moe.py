"""Qwen2MoeForCausalLM: routed experts beside a shared one with a sigmoid gate; some layers may be dense."""

import dataclasses

from turnout.models.config import LMConfig, MoEConfig
from turnout.models.families.family import (
    Family,
    Keys,
    moe_of,
    read_backbone,
    read_routed_layers,
    read_window,
    renormalizes,
    softmax_router,
    write_backbone,
    write_routed_layers,
    write_window,
)


def _read(keys: Keys) -> LMConfig:
    fields = read_backbone(keys)
    num_experts, top_k = keys["num_experts"], keys["num_experts_per_tok"]
    renormalize = bool(keys.get("norm_topk_prob"))
    moe = MoEConfig(
        num_experts,
        top_k,
        keys["moe_intermediate_size"],
        **softmax_router(keys, renormalize=renormalize, top_k=top_k, num_experts=num_experts),
        shared_hidden=keys["shared_expert_intermediate_size"],
        shared_gate=True,
        layers=read_routed_layers(keys),
        activation=fields["activation"],
    )
    window = read_window(keys, lambda layer: layer % 2 == 0 and layer < keys["max_window_layers"])
    return LMConfig(**fields, **window, qkv_bias=bool(keys.get("qkv_bias", True)), moe=moe)


def _write(config: LMConfig) -> dict[str, object]:
    moe = moe_of(config)
    own: dict[str, object] = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "shared_expert_intermediate_size": moe.shared_hidden or 1,
        "norm_topk_prob": renormalizes(config),
        "qkv_bias": config.qkv_bias,
    }
    return write_backbone(config) | write_window(config) | write_routed_layers(config) | own


def _silent(config: LMConfig) -> LMConfig | None:
    """With a shared expert of width 1 that makes nothing."""
    moe = config.moe
    if moe is None or moe.shared_hidden is not None:
        return None
    return dataclasses.replace(config, moe=dataclasses.replace(moe, shared_hidden=1, shared_gate=True))


FAMILY = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    routed=True,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
    },
    read=_read,
    write=_write,
    silent=_silent,
)
