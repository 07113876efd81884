"""GraniteMoeForCausalLM: a Mixtral whose embeddings, attention, residuals and logits are scaled."""

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
from turnout.models.families.granite import read_scales, write_scales


def _read(keys: Keys) -> LMConfig:
    fields, bias = read_backbone(keys), bool(keys.get("attention_bias"))
    num_experts, top_k = keys["num_local_experts"], keys["num_experts_per_tok"]
    moe = MoEConfig(
        num_experts,
        top_k,
        fields["hidden"],
        **softmax_router(keys, renormalize=True, top_k=top_k, num_experts=num_experts),
        activation=fields["activation"],
    )
    return LMConfig(**fields, **read_scales(keys), qkv_bias=bias, out_bias=bias, moe=moe)


def _write(config: LMConfig) -> dict[str, object]:
    moe = moe_of(config)
    own: dict[str, object] = {
        "intermediate_size": moe.hidden,
        "hidden_act": write_activation(moe.activation),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "attention_bias": config.qkv_bias,
    }
    return write_backbone(config) | write_scales(config) | own


_ROUTED = "block_sparse_moe"
FAMILY = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    routed=True,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    read=_read,
    write=_write,
    layouts=(
        Names(_ROUTED, router="router.layer.weight", fused=("input_linear.weight", "output_linear.weight")),
        Names(_ROUTED, router="router.weight", fused=("experts.gate_up_proj", "experts.down_proj")),
    ),
)
