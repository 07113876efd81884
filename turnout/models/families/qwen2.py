"""Qwen2ForCausalLM: biases on queries, keys and values only."""

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, read_backbone, read_window, write_backbone, write_window


def _read(keys: Keys) -> LMConfig:
    window = read_window(keys, lambda layer: layer >= keys["max_window_layers"])
    return LMConfig(**read_backbone(keys), **window, qkv_bias=True)


def _write(config: LMConfig) -> dict[str, object]:
    return write_backbone(config) | write_window(config)


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    routed=False,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    read=_read,
    write=_write,
)
