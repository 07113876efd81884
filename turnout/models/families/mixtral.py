"""MixtralForCausalLM: experts in every layer, softmax over the chosen ones."""

from turnout.models.config import LMConfig, MoEConfig
from turnout.models.families.family import (
    Family,
    Keys,
    Names,
    moe_of,
    read_backbone,
    softmax_router,
    write_activation,
    write_backbone,
)


def _read(keys: Keys) -> LMConfig:
    fields = read_backbone(keys)
    num_experts, top_k = keys["num_local_experts"], keys["num_experts_per_tok"]
    moe = MoEConfig(
        num_experts,
        top_k,
        fields["hidden"],
        **softmax_router(keys, renormalize=True, top_k=top_k, num_experts=num_experts),
        activation=fields["activation"],
    )
    return LMConfig(**fields, window=keys.get("sliding_window"), moe=moe)


def _write(config: LMConfig) -> dict[str, object]:
    moe = moe_of(config)
    return write_backbone(config) | {
        "intermediate_size": moe.hidden,
        "hidden_act": write_activation(moe.activation),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": config.window,
    }


_NAMES = Names(routed="block_sparse_moe", gate="w1", up="w3", down="w2")
FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    routed=True,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    read=_read,
    write=_write,
    layouts=(_NAMES, _NAMES.in_memory),
    aliases={"num_experts": "num_local_experts"},
)
