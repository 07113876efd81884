"""GraniteForCausalLM: a Llama whose embeddings, attention, residuals and logits are scaled."""

from typing import Any

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, read_backbone, write_backbone
from turnout.models.rope import attention_scale


def read_scales(keys: Keys) -> dict[str, Any]:
    """The four scales of a Granite, of LMConfig."""
    return {
        "embedding_scale": keys.number("embedding_multiplier", 1.0),
        "attention_scale": keys.number("attention_multiplier", 1.0),
        "residual_scale": keys.number("residual_multiplier", 1.0),
        "logit_divisor": keys.number("logits_scaling", 1.0),
    }


def write_scales(config: LMConfig) -> dict[str, object]:
    """The keys of ``read_scales``."""
    return {
        "embedding_multiplier": config.embedding_scale,
        "attention_multiplier": attention_scale(config),
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logit_divisor,
    }


def _read(keys: Keys) -> LMConfig:
    bias = bool(keys.get("attention_bias"))
    fields = read_backbone(keys) | read_scales(keys)
    return LMConfig(**fields, qkv_bias=bias, out_bias=bias, ff_bias=bool(keys.get("mlp_bias")))


def _write(config: LMConfig) -> dict[str, object]:
    own: dict[str, object] = {"attention_bias": config.qkv_bias, "mlp_bias": config.ff_bias}
    return write_backbone(config) | write_scales(config) | own


FAMILY = Family(
    "granite",
    "GraniteForCausalLM",
    routed=False,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    read=_read,
    write=_write,
)
