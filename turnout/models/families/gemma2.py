"""Gemma2ForCausalLM: norms on both sides, softcaps on attention and logits, every other layer windowed."""

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, read_kinds, write_kinds
from turnout.models.families.gemma import (
    gemma_limits,
    read_gemma,
    read_query_scale,
    write_gemma,
    write_query_scale,
)


def _read(keys: Keys) -> LMConfig:
    return LMConfig(
        **read_gemma(keys),
        **read_kinds(keys, lambda layer: layer % 2 == 0),
        norm_place="both",
        attention_scale=read_query_scale(keys),
        attention_softcap=keys.get("attn_logit_softcapping"),
        logit_softcap=keys.get("final_logit_softcapping"),
    )


def _write(config: LMConfig) -> dict[str, object]:
    return (
        write_gemma(config)
        | write_kinds(config, 4096)
        | {
            "query_pre_attn_scalar": write_query_scale(config),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    )


FAMILY = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    routed=False,
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    read=_read,
    write=_write,
    limits=gemma_limits,
)
