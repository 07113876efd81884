"""Qwen3MoeForCausalLM: routed experts, a norm over each head's queries and keys; some layers may be dense."""

from turnout.models.config import LMConfig, MoEConfig
from turnout.models.families.family import (
    Family,
    Keys,
    moe_of,
    read_backbone,
    read_routed_layers,
    renormalizes,
    softmax_router,
    write_backbone,
    write_routed_layers,
)


def _read(keys: Keys) -> LMConfig:
    fields = read_backbone(keys)
    num_experts = keys["num_experts"]
    top_k, bias = keys["num_experts_per_tok"], bool(keys.get("attention_bias"))
    renormalize = bool(keys.get("norm_topk_prob"))
    moe = MoEConfig(
        num_experts,
        top_k,
        keys["moe_intermediate_size"],
        **softmax_router(keys, renormalize=renormalize, top_k=top_k, num_experts=num_experts),
        layers=read_routed_layers(keys),
        activation=fields["activation"],
    )
    window = keys.get("sliding_window") if keys.get("use_sliding_window") else None
    return LMConfig(**fields, window=window, qk_norm="head", qkv_bias=bias, out_bias=bias, moe=moe)


def _write(config: LMConfig) -> dict[str, object]:
    moe = moe_of(config)
    own: dict[str, object] = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "norm_topk_prob": renormalizes(config),
        "attention_bias": config.qkv_bias,
        "head_dim": config.head_width,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
    }
    return write_backbone(config) | write_routed_layers(config) | own


FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    routed=True,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    read=_read,
    write=_write,
    aliases={"num_local_experts": "num_experts"},
)
