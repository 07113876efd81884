"""Phi3ForCausalLM: a Mistral with one tensor for queries, keys and values, partly rotated heads and long RoPE."""

import math
from collections.abc import Mapping
from typing import Any

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, Names, read_backbone, refusal, write_backbone

# What the first Phi-3 models called it; transformers reads all three as the last.
_LONG = ("su", "yarn", "longrope")


def _read(keys: Keys) -> LMConfig:
    # Its layers have no biases, whatever these say.
    keys.fixed(attention_bias=False, mlp_bias=False, lm_head_bias=False)
    given, window = dict(keys.get("rope_scaling") or keys.filled("rope_parameters") or {}), keys.get("sliding_window")
    if (given.get("rope_type") or given.get("type")) not in _LONG:
        return LMConfig(**read_backbone(keys), window=window)
    plain = {"rope_type": "default", **{name: given.get(name) for name in ("rope_theta", "partial_rotary_factor")}}
    fields = read_backbone(keys.but(rope_scaling=plain))
    before = keys["original_max_position_embeddings"]  # this key wins over that of the scaling
    return LMConfig(**(fields | {"rope_scaling": _read_long(given, before, fields["max_seq"])}), window=window)


def _read_long(given: Mapping[str, Any], before: int, longest: int) -> dict[str, object]:
    """The scaling, with the magnitude that transformers works out where none is given."""
    if before < 2:
        fix = "restore config.json from a copy"
        raise refusal("original_max_position_embeddings", str(before), "be at least 2", fix)
    magnitude, factor = given.get("attention_factor"), given.get("factor")
    if magnitude is None:
        factor = longest / before if factor is None else factor
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(before))
    factors = {name: given[name] for name in ("short_factor", "long_factor") if given.get(name) is not None}
    said = {"rope_type": "longrope", "original_max_position_embeddings": before, "attention_factor": float(magnitude)}
    return said | factors


def _write(config: LMConfig) -> dict[str, object]:
    keys = write_backbone(config) | {"sliding_window": config.window, "partial_rotary_factor": config.rope_share}
    scaling: Mapping[str, Any] = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] != "longrope":
        return keys
    before = scaling["original_max_position_embeddings"]
    short: dict[str, object] = {"type": "longrope", **{name: scaling[name] for name in ("short_factor", "long_factor")}}
    # transformers 4 takes these three keys and no more; only another magnitude than theirs needs to be said.
    if _read_long(short, before, config.max_seq)["attention_factor"] != scaling["attention_factor"]:
        short["attention_factor"] = scaling["attention_factor"]
    return keys | {"rope_scaling": short, "original_max_position_embeddings": before}


def _limits(config: LMConfig) -> list[str]:
    kind = (config.rope_scaling or {}).get("rope_type", "longrope")
    return [] if kind == "longrope" else [f"rope_scaling is {kind!r}; transformers takes 'longrope' alone in a Phi-3"]


_NAMES = Names(qkv="qkv_proj", gate_up="gate_up_proj")
FAMILY = Family(
    "phi3",
    "Phi3ForCausalLM",
    routed=False,
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    read=_read,
    write=_write,
    layouts=(_NAMES, _NAMES),
    limits=_limits,
)
