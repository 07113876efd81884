"""MistralForCausalLM: a Llama without biases and, in its first version, with a window in every layer."""

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, read_backbone, write_backbone


def _read(keys: Keys) -> LMConfig:
    return LMConfig(**read_backbone(keys), window=keys.get("sliding_window"))


def _write(config: LMConfig) -> dict[str, object]:
    return write_backbone(config) | {"sliding_window": config.window}


FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    routed=False,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    read=_read,
    write=_write,
)
