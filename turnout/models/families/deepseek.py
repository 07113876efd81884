"""DeepseekV3ForCausalLM and DeepseekV2ForCausalLM: latent attention, shared experts, experts in groups."""

import dataclasses
from typing import Any

from turnout.models.config import LMConfig, MLAConfig, MoEConfig
from turnout.models.families.family import (
    Family,
    Keys,
    Names,
    moe_of,
    read_backbone,
    refusal,
    softmax_router,
    write_backbone,
)
from turnout.models.families.meaning import router_meaning


def _read_body(keys: Keys, router: dict[str, Any], *, interleaved: bool) -> LMConfig:
    fields, bias = read_backbone(keys), bool(keys.get("attention_bias"))
    hidden = keys["moe_intermediate_size"]
    moe = MoEConfig(
        keys["n_routed_experts"],
        keys["num_experts_per_tok"],
        hidden,
        **router,
        shared_hidden=hidden * keys["n_shared_experts"],
        layers=tuple(range(keys.get("first_k_dense_replace") or 0, fields["layers"])),
        activation=fields["activation"],
    )
    mla = MLAConfig(
        kv_rank=keys["kv_lora_rank"],
        rope_dim=keys["qk_rope_head_dim"],
        nope_dim=keys["qk_nope_head_dim"],
        v_dim=keys["v_head_dim"],
        q_rank=keys.get("q_lora_rank"),
        interleaved=interleaved,
    )
    fields |= {"head_dim": None, "kv_heads": None, "attention": "mla", "mla": mla}
    return LMConfig(**fields, qkv_bias=bias, out_bias=bias, moe=moe)


def _write_body(config: LMConfig) -> dict[str, object]:
    moe, mla = moe_of(config), config.mla or MLAConfig(1, 2, 1, 1)
    dense = [n for n in range(config.layers) if not config.is_routed(n)]
    backbone = {name: value for name, value in write_backbone(config).items() if name != "head_dim"}
    return backbone | {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "n_shared_experts": max(1, (moe.shared_hidden or 0) // moe.hidden),
        "first_k_dense_replace": len(dense),
        "kv_lora_rank": mla.kv_rank,
        "q_lora_rank": mla.q_rank,
        "qk_rope_head_dim": mla.rope_dim,
        "qk_nope_head_dim": mla.nope_dim,
        "v_head_dim": mla.v_dim,
        "attention_bias": config.qkv_bias,
    }


def read_groups(keys: Keys) -> dict[str, Any]:
    """The router of DeepSeek-V3, which others took over."""
    options = {
        "num_groups": keys.get("n_group") or 1,
        "top_groups": keys.get("topk_group") or 1,
        "renormalize": bool(keys.get("norm_topk_prob", True)),
        "scale": float(keys["routed_scaling_factor"]),
    }
    return {"router": "GroupLimited", "router_options": options}


def write_groups(config: LMConfig) -> dict[str, object]:
    """The keys of ``read_groups``."""
    options = router_meaning(moe_of(config))[1]
    return {
        "n_group": options.get("num_groups", 1),
        "topk_group": options.get("top_groups", 1),
        "norm_topk_prob": options.get("renormalize", True),
        "routed_scaling_factor": options.get("scale", 1.0),
    }


def _read_v3(keys: Keys) -> LMConfig:
    if keys.get("model_type", "deepseek_v3") != "deepseek_v3":  # its own code has more ways than transformers' has
        keys.fixed(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    keys.fixed(head_dim=keys["qk_rope_head_dim"])  # by which transformers turns queries and keys
    return _read_body(keys, read_groups(keys), interleaved=bool(keys.get("rope_interleave", True)))


def _write_v3(config: LMConfig) -> dict[str, object]:
    own: dict[str, object] = {
        "rope_interleave": config.mla is None or config.mla.interleaved,
        "num_nextn_predict_layers": 0,
    }
    return _write_body(config) | write_groups(config) | own


def group_limits(config: LMConfig) -> list[str]:
    """Why transformers' group scores would fail."""
    moe = moe_of(config)
    groups = router_meaning(moe)[1].get("num_groups", 1)
    if moe.num_experts // groups < 2:
        return [f"groups of one expert (num_groups={groups}); its router adds the two best of a group"]
    return []


def _read_v2(keys: Keys) -> LMConfig:
    # transformers does not look at this key; the code the model was published with does, and scales otherwise then.
    keys.fixed(norm_topk_prob=False)
    method, scale = keys.get("topk_method") or "greedy", float(keys.get("routed_scaling_factor") or 1.0)
    if method not in ("greedy", "group_limited_greedy"):
        fix = "load it as the architecture that its tensors belong to"
        raise refusal("the key 'topk_method'", repr(method), "be 'greedy' or 'group_limited_greedy'", fix)
    if method == "greedy" and scale == 1:
        top_k, num_experts = keys["num_experts_per_tok"], keys["n_routed_experts"]
        router = softmax_router(keys, renormalize=False, top_k=top_k, num_experts=num_experts)
        return _read_body(keys, router, interleaved=True)
    groups, top_groups = (1, 1) if method == "greedy" else (keys["n_group"], keys["topk_group"])
    options = {"num_groups": groups, "top_groups": top_groups, "scale": scale} | _SOFTMAX
    return _read_body(keys, {"router": "GroupLimited", "router_options": options}, interleaved=True)


def _write_v2(config: LMConfig) -> dict[str, object]:
    options = router_meaning(moe_of(config))[1]
    groups = options.get("num_groups", 1)
    own: dict[str, object] = {"topk_method": "greedy" if groups == 1 else "group_limited_greedy"}
    if groups > 1:
        own |= {"n_group": groups, "topk_group": options["top_groups"]}
    own |= {"routed_scaling_factor": options.get("scale", 1.0), "norm_topk_prob": False}
    return _write_body(config) | own


def _limits_v2(config: LMConfig) -> list[str]:
    if config.width % config.heads == 0:
        return []
    return [f"width={config.width} is not a multiple of heads={config.heads}; transformers refuses that in it"]


def silent(config: LMConfig) -> LMConfig | None:
    """With a shared expert, of the smallest width there is, which makes nothing."""
    moe = config.moe
    if moe is None or moe.shared_hidden is not None:
        return None
    return dataclasses.replace(config, moe=dataclasses.replace(moe, shared_hidden=moe.hidden))


# Second names of keys, in transformers 5.
ALIASES = {"num_local_experts": "n_routed_experts"}
# The router of the second version, but for its sizes.
_SOFTMAX = {"scores": "softmax", "group_score": "max", "bias": False, "renormalize": False}
_NAMES = Names(shared="shared_experts")
_SIZES = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "first_k_dense_replace": 3}
_RANKS = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128}
V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    routed=True,
    defaults={
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        **_SIZES,
        **_RANKS,
    },
    read=_read_v3,
    write=_write_v3,
    layouts=(_NAMES, _NAMES.in_memory),
    limits=group_limits,
    aliases=ALIASES,
    also_called=("kimi_k2",),
    silent=silent,
    exact_gate=True,
)
V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    routed=True,
    defaults={
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1407,
        **_SIZES,
        **_RANKS,
        "max_position_embeddings": 2048,
        "first_k_dense_replace": 0,
    },
    read=_read_v2,
    write=_write_v2,
    layouts=(_NAMES, _NAMES.in_memory),
    limits=_limits_v2,
    aliases={"num_experts": "n_routed_experts"},
    silent=silent,
    exact_gate=True,
)
