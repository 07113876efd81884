"""GemmaForCausalLM: embeddings times the root of the width, norms that store their weights less one, GELU's gate."""

from typing import Any

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, read_backbone, refusal, write_activation, write_backbone
from turnout.models.rope import attention_scale


def read_gemma(keys: Keys, activation: str = "hidden_activation") -> dict[str, Any]:
    """The fields that all Gemmas have; ``activation`` is the key that names theirs."""
    keys.fixed(use_bidirectional_attention=False)
    bias = bool(keys.get("attention_bias"))
    return read_backbone(keys, activation=activation) | {
        "norm": "rms_plus_one",
        "embedding_scale": keys["hidden_size"] ** 0.5,
        "embedding_rounded": True,
        "qkv_bias": bias,
        "out_bias": bias,
    }


def write_gemma(config: LMConfig) -> dict[str, object]:
    """The keys of ``read_gemma``."""
    return write_backbone(config) | {
        "hidden_activation": write_activation(config.activation),
        "head_dim": config.head_width,
        "attention_bias": config.qkv_bias,
    }


def gemma_limits(config: LMConfig) -> list[str]:
    """What transformers refuses in a Gemma after the first."""
    if config.width % config.heads == 0:
        return []
    return [f"width={config.width} is not a multiple of heads={config.heads}; transformers refuses that in a Gemma"]


def read_query_scale(keys: Keys) -> float:
    """What products of queries and keys are multiplied with."""
    scalar = keys["query_pre_attn_scalar"]
    if scalar < 1:
        fix = "restore config.json from a copy"
        raise refusal("the key 'query_pre_attn_scalar'", repr(scalar), "be at least 1", fix)
    return scalar**-0.5


def write_query_scale(config: LMConfig) -> int:
    """The key of ``read_query_scale``, the nearest whole number there is."""
    return max(1, round(attention_scale(config) ** -2))


def _read(keys: Keys) -> LMConfig:
    fields, other = read_gemma(keys, "hidden_act"), keys.get("hidden_activation")
    # The first Gemma was published with "gelu" where its tanh approximation was meant, which transformers knows.
    if fields["activation"] == "geglu":
        fields["activation"] = "geglu_tanh"
    if other is not None and read_gemma(keys)["activation"] != fields["activation"]:
        allowed = f"be left out, or what hidden_act is, {keys.get('hidden_act')!r}: transformers 5 reads that alone"
        fix = "keep the one of the two that the model was trained with"
        raise refusal("the key 'hidden_activation'", repr(other), allowed, fix)
    return LMConfig(**fields)


FAMILY = Family(
    "gemma",
    "GemmaForCausalLM",
    routed=False,
    defaults={
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=write_gemma,
)
