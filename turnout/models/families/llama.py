"""LlamaForCausalLM: dense, no norms on queries and keys, biases everywhere in attention or nowhere."""

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, read_backbone, write_backbone


def _read(keys: Keys) -> LMConfig:
    bias = bool(keys.get("attention_bias"))
    return LMConfig(**read_backbone(keys), qkv_bias=bias, out_bias=bias, ff_bias=bool(keys.get("mlp_bias")))


def _write(config: LMConfig) -> dict[str, object]:
    return write_backbone(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.ff_bias}


def _limits(config: LMConfig) -> list[str]:
    if config.width % config.heads == 0:
        return []
    return [f"width={config.width} is not a multiple of heads={config.heads}; transformers refuses that in a Llama"]


FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
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
    limits=_limits,
)
