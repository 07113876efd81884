"""MistralForCausalLM: a Llama without biases and, in its first version, with a window in every layer."""

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, read_backbone, refusal, write_backbone


def _read(keys: Keys) -> LMConfig:
    window, kinds = keys.get("sliding_window"), keys.get("layer_types")
    # With this key the automatic classes of transformers take another one, Ministral, which goes by it layer by layer.
    if kinds is not None and set(kinds) != {"full_attention" if window is None else "sliding_attention"}:
        allowed = "be left out, or say of every layer what sliding_window says: a Mistral has one kind of layer"
        fix = "nothing: layers of two kinds are another architecture, Ministral, which is not here"
        raise refusal("the key 'layer_types'", repr(kinds)[:200], allowed, fix)
    return LMConfig(**read_backbone(keys), window=window)


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
