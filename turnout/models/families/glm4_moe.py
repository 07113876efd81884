"""Glm4MoeForCausalLM: grouped-query attention, the router of DeepSeek-V3, shared experts, partly rotated heads."""

from turnout.models.config import LMConfig, MoEConfig
from turnout.models.families.deepseek import ALIASES, group_limits, read_groups, silent, write_groups
from turnout.models.families.family import Family, Keys, Names, moe_of, read_backbone, write_backbone


def _read(keys: Keys) -> LMConfig:
    fields, hidden = read_backbone(keys), keys["moe_intermediate_size"]
    moe = MoEConfig(
        keys["n_routed_experts"],
        keys["num_experts_per_tok"],
        hidden,
        **read_groups(keys),
        shared_hidden=hidden * keys["n_shared_experts"],
        layers=tuple(range(keys.get("first_k_dense_replace") or 0, fields["layers"])),
        activation=fields["activation"],
    )
    qk_norm = "head" if keys.get("use_qk_norm") else "none"
    return LMConfig(**fields, qk_norm=qk_norm, qkv_bias=bool(keys.get("attention_bias")), moe=moe)


def _write(config: LMConfig) -> dict[str, object]:
    moe, keys = moe_of(config), write_backbone(config)
    own: dict[str, object] = {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "n_shared_experts": max(1, (moe.shared_hidden or 0) // moe.hidden),
        "first_k_dense_replace": sum(not config.is_routed(n) for n in range(config.layers)),
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm == "head",
        "head_dim": config.head_width,
        "partial_rotary_factor": config.rope_share,
        "num_nextn_predict_layers": 0,
    }
    return keys | write_groups(config) | own


_NAMES = Names(shared="shared_experts")
FAMILY = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    routed=True,
    defaults={
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    read=_read,
    write=_write,
    layouts=(_NAMES, _NAMES.in_memory),
    limits=group_limits,
    aliases=ALIASES,
    silent=silent,
    exact_gate=True,
)
