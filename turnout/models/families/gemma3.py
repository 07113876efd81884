"""Gemma3ForCausalLM: a Gemma 2 with norms over heads in place of attention's softcap, and a rotary base by layer."""

from typing import Any

from turnout.models.config import LMConfig
from turnout.models.families.family import WHOLE, WINDOWED, Family, Keys, read_kinds, read_scaling, refusal, write_kinds
from turnout.models.families.gemma import (
    gemma_limits,
    read_gemma,
    read_query_scale,
    write_gemma,
    write_query_scale,
)

_THETA, _LOCAL_THETA = 1e6, 1e4


def _read(keys: Keys) -> LMConfig:
    # What transformers keeps, and does not apply: scores are not capped, and stretched layers say their own length.
    keys.fixed(attn_logit_softcapping=None, original_max_position_embeddings=None)
    every = keys.get("sliding_window_pattern", 6)
    if not every:
        fix = "restore config.json from a copy"
        raise refusal("the key 'sliding_window_pattern'", repr(every), "be at least 1", fix)
    fields = read_gemma(keys) | _read_rope(keys)
    return LMConfig(
        **fields,
        **read_kinds(keys, lambda layer: (layer + 1) % every != 0),
        norm_place="both",
        qk_norm="head",
        attention_scale=read_query_scale(keys),
        logit_softcap=keys.get("final_logit_softcapping"),
    )


def _read_rope(keys: Keys) -> dict[str, Any]:
    """The rotary bases of the layers that see everything, perhaps stretched, and of the windowed ones."""
    given = keys.get("rope_parameters") or {}
    if not set(given) <= {WHOLE, WINDOWED}:
        allowed = f"give rotary parameters for {WHOLE!r} and {WINDOWED!r}: transformers looks at no others"
        raise refusal("the key 'rope_parameters'", repr(given)[:200], allowed, "write them for both kinds of layers")
    whole = {**(given.get(WHOLE) or {}), **(keys.get("rope_scaling") or {})}
    whole.pop("truncate", None)  # transformers looks for it beside the kinds of layers, and finds none
    local = given.get(WINDOWED) or {}
    theta, scaling, share = read_scaling(keys, whole, keys.get("rope_theta") or _THETA)
    local_theta, local_scaling, local_share = read_scaling(
        keys, local, keys.get("rope_local_base_freq") or _LOCAL_THETA
    )
    if local_scaling is not None or (share, local_share) != (1, 1):
        allowed = "leave the windowed layers unstretched, and turn whole heads"
        fix = "nothing: it is the model's own, and no published Gemma 3 has it"
        raise refusal("the key 'rope_parameters'", repr(given)[:200], allowed, fix)
    return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local_theta}


def _write(config: LMConfig) -> dict[str, object]:
    scaling = dict(config.rope_scaling or {})
    local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
    return (
        write_gemma(config)
        | write_kinds(config, 4096)
        | {
            "query_pre_attn_scalar": write_query_scale(config),
            "final_logit_softcapping": config.logit_softcap,
            # transformers 5 reads rope_parameters, 4 the others.
            "rope_local_base_freq": local,
            "rope_parameters": {
                WHOLE: {"rope_type": "default", **scaling, "rope_theta": config.rope_theta},
                WINDOWED: {"rope_type": "default", "rope_theta": local},
            },
        }
    )


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    routed=False,
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    read=_read,
    write=_write,
    limits=gemma_limits,
)
