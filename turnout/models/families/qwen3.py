"""Qwen3ForCausalLM: a norm over each head's queries and keys."""

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, read_backbone, read_window, write_backbone, write_window


def _read(keys: Keys) -> LMConfig:
    bias = bool(keys.get("attention_bias"))
    window = read_window(keys, lambda layer: layer >= keys["max_window_layers"])
    return LMConfig(**read_backbone(keys), **window, qk_norm="head", qkv_bias=bias, out_bias=bias)


def _write(config: LMConfig) -> dict[str, object]:
    own: dict[str, object] = {"attention_bias": config.qkv_bias, "head_dim": config.head_width}
    return write_backbone(config) | write_window(config) | own


FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    routed=False,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    read=_read,
    write=_write,
)
