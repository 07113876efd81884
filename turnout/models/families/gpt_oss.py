"""GptOssForCausalLM: sinks, every other layer windowed, biases everywhere, clamped experts in every layer."""

from turnout.models.config import LMConfig, MoEConfig
from turnout.models.families.family import (
    Family,
    Keys,
    Names,
    moe_of,
    read_backbone,
    read_kinds,
    softmax_router,
    write_backbone,
    write_kinds,
)
from turnout.types.weights import OAI_LIMIT, OAI_SLOPE

_WINDOW = 128


def _read(keys: Keys) -> LMConfig:
    keys.fixed(hidden_act="silu", swiglu_alpha=OAI_SLOPE, swiglu_limit=OAI_LIMIT)
    fields, bias = read_backbone(keys), bool(keys.get("attention_bias", True))
    num_experts, top_k = keys["num_local_experts"], keys["num_experts_per_tok"]
    router = softmax_router(keys, renormalize=True, top_k=top_k, num_experts=num_experts)
    router["router_options"] |= {"bias": True}
    moe = MoEConfig(num_experts, top_k, fields["hidden"], **router, activation="swiglu_oai", bias=True)
    return LMConfig(
        **fields, **read_kinds(keys, lambda layer: layer % 2 == 0), qkv_bias=bias, out_bias=bias, sinks=True, moe=moe
    )


def _write(config: LMConfig) -> dict[str, object]:
    moe = moe_of(config)
    return write_backbone(config) | {
        "intermediate_size": moe.hidden,
        "hidden_act": "silu",
        "swiglu_alpha": OAI_SLOPE,
        "swiglu_limit": OAI_LIMIT,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "head_dim": config.head_width,
        "attention_bias": config.qkv_bias,
        **write_kinds(config, _WINDOW),
    }


_NAMES = Names(router="router.weight", fused=("experts.gate_up_proj", "experts.down_proj"), alternating=True)
FAMILY = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    routed=True,
    defaults={
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": _WINDOW,
    },
    read=_read,
    write=_write,
    layouts=(_NAMES, _NAMES),
    unpacks=("mxfp4",),
    aliases={"num_experts": "num_local_experts"},
)
