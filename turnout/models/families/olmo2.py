"""Olmo2ForCausalLM: norms after attention and feed-forward instead of before, and over all heads' queries and keys."""

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, read_backbone, write_backbone


def _read(keys: Keys) -> LMConfig:
    bias = bool(keys.get("attention_bias"))
    return LMConfig(**read_backbone(keys), norm_place="after", qk_norm="full", qkv_bias=bias, out_bias=bias)


def _write(config: LMConfig) -> dict[str, object]:
    return write_backbone(config) | {"attention_bias": config.qkv_bias}


FAMILY = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    routed=False,
    defaults={
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    read=_read,
    write=_write,
)
