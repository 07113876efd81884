"""SmolLM3ForCausalLM: a Llama with layers that have no RoPE, every fourth unless it says which."""

from typing import Any

from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, read_backbone, refusal, write_backbone, write_window

_KINDS = ("sliding_attention", "full_attention")
_RESTORE = "restore config.json from a copy"


def _read(keys: Keys) -> LMConfig:
    bias, turned = bool(keys.get("attention_bias")), _read_turned(keys)
    fields = read_backbone(keys) | _read_window(keys, turned)
    biases = {"qkv_bias": bias, "out_bias": bias, "ff_bias": bool(keys.get("mlp_bias"))}
    return LMConfig(**fields, **biases, rope_layers="all" if len(turned) == fields["layers"] else turned)


def _read_turned(keys: Keys) -> tuple[int, ...]:
    """The layers with RoPE: those with a 1 in ``no_rope_layers``."""
    count, marks = keys["num_hidden_layers"], keys.get("no_rope_layers")
    if marks is None:
        step = int(keys.number("no_rope_layer_interval", 4))
        return tuple(n for n in range(count) if (n + 1) % step)
    if len(marks) < count or not set(marks) <= {0, 1}:
        allowed = f"hold a 1 (RoPE) or 0 (none) for each of the {count} layers"
        raise refusal("the key 'no_rope_layers'", repr(marks)[:200], allowed, _RESTORE)
    return tuple(n for n in range(count) if marks[n])


def _read_window(keys: Keys, turned: tuple[int, ...]) -> dict[str, Any]:
    """The layers without RoPE have the window, unless ``layer_types`` says which."""
    count, window = keys["num_hidden_layers"], keys.get("sliding_window")
    window = window if keys.get("use_sliding_window") else None
    kinds = keys.get("layer_types")
    if kinds is None:
        kinds = [_KINDS[window is None or n in turned] for n in range(count)]
    # Without use_sliding_window some kernels of transformers look through a window there, and others do not.
    if len(kinds) != count or not set(kinds) <= set(_KINDS[window is None :]):
        names = " or ".join(repr(kind) for kind in _KINDS[window is None :])
        allowed = f"name {names} for each of the {count} layers"
        raise refusal("the key 'layer_types'", repr(kinds)[:200], allowed, _RESTORE)
    layers = tuple(n for n in range(count) if kinds[n] == _KINDS[0])
    return {"window": window, "window_layers": layers} if layers else {}


def _write(config: LMConfig) -> dict[str, object]:
    window = write_window(config)
    window.pop("max_window_layers")
    own: dict[str, object] = {"attention_bias": config.qkv_bias, "mlp_bias": config.ff_bias}
    own["no_rope_layers"] = [int(config.is_turned(n)) for n in range(config.layers)]
    return write_backbone(config) | window | own


FAMILY = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    routed=False,
    defaults={
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=_write,
)
