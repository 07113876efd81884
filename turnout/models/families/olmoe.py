"""OlmoeForCausalLM: experts in every layer, weights as the softmax gives them, a norm over all heads at once."""

from turnout.models.config import LMConfig, MoEConfig
from turnout.models.families.family import (
    Family,
    Keys,
    moe_of,
    read_backbone,
    renormalizes,
    softmax_router,
    write_activation,
    write_backbone,
)


def _read(keys: Keys) -> LMConfig:
    keys.fixed(clip_qkv=None)
    fields, bias = read_backbone(keys), bool(keys.get("attention_bias"))
    num_experts, top_k = keys["num_experts"], keys["num_experts_per_tok"]
    renormalize = bool(keys.get("norm_topk_prob"))
    moe = MoEConfig(
        num_experts,
        top_k,
        fields["hidden"],
        **softmax_router(keys, renormalize=renormalize, top_k=top_k, num_experts=num_experts),
        activation=fields["activation"],
    )
    # Its norms are as wide as the model, so that heads can have no other width.
    return LMConfig(**(fields | {"head_dim": None}), qk_norm="full", qkv_bias=bias, out_bias=bias, moe=moe)


def _write(config: LMConfig) -> dict[str, object]:
    moe, keys = moe_of(config), write_backbone(config)
    keys.pop("head_dim", None)
    return keys | {
        "intermediate_size": moe.hidden,
        "hidden_act": write_activation(moe.activation),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": renormalizes(config),
        "attention_bias": config.qkv_bias,
        "clip_qkv": None,
    }


FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    routed=True,
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "num_experts": 64,
    },
    read=_read,
    write=_write,
    aliases={"num_local_experts": "num_experts"},
)
