"""What a configuration computes, however it is written: the form in which two of them are compared."""

from typing import Any

from turnout.fields import plain
from turnout.models.config import LMConfig, MoEConfig
from turnout.models.rope import attention_scale

__all__ = ["meaning", "router_meaning"]

# Router options that change training, or chance, but not what a trained model computes.
_TRAINING_ONLY = ("std", "generator", "rate", "jitter", "seed")
_GROUPS = {
    "num_groups": 1,
    "top_groups": 1,
    "renormalize": True,
    "scale": 1.0,
    "scores": "sigmoid",
    "group_score": "top2",
    "bias": True,
}
# Softmax over all experts, then the k largest: what is left of groups without any of it.
_PLAIN = {"num_groups": 1, "scale": 1.0, "scores": "softmax", "bias": False}


def meaning(config: LMConfig) -> dict[str, Any]:
    """What a configuration computes, by field: equal for two that compute the same, however they are written."""
    fields = plain(config)
    moe_fields = fields.pop("moe") or {}
    mla_fields = fields.pop("mla") or {}
    del fields["init_std"]
    routed = [n for n in range(config.layers) if config.is_routed(n)]
    fields |= {"kv_heads": config.key_heads, "head_dim": config.head_width, "hidden": config.dense_hidden}
    fields |= {
        "window": [config.window_of(n) for n in range(config.layers)],
        "attention_scale": attention_scale(config),
        "rope_layers": "all" if all(map(config.is_turned, range(config.layers))) else config.rope_layers,
        "rope_share": config.rotated_width,
        "embedding_rounded": config.embedding_rounded and config.embedding_scale != 1,
    }
    turned_layers = [n for n in range(config.layers) if config.is_turned(n)]
    turned = [config.rope_of(n) for n in turned_layers] or [(1e4, None)]  # of no meaning where nothing turns
    for name, values in (("rope_theta", [r[0] for r in turned]), ("rope_scaling", [plain(r[1]) for r in turned])):
        fields[name] = values if any(value != values[0] for value in values) else values[0]
    if not turned_layers:
        fields["rope_share"] = config.head_width
    del fields["window_layers"], fields["local_rope_theta"]
    if len(routed) == config.layers:
        for name in ("hidden", "activation", "ff_bias"):
            del fields[name]
    if config.moe is None:
        moe_fields = {}
    else:
        moe_fields["layers"] = "all" if len(routed) == config.layers else tuple(routed)
        moe_fields.pop("router_options")
        moe_fields["router"], options = router_meaning(config.moe)
        moe_fields |= {f"router_options.{name}": value for name, value in options.items()}
    return fields | {f"mla.{k}": v for k, v in mla_fields.items()} | {f"moe.{k}": v for k, v in moe_fields.items()}


def router_meaning(moe: MoEConfig) -> tuple[str, dict[str, Any]]:
    """What a router computes after training: the plainest router that does, and its options, all spelt out."""
    name, options = moe.router, {k: v for k, v in moe.router_options.items() if k not in _TRAINING_ONLY}
    if options.get("capacity_factor") is None:
        options.pop("capacity_factor", None)
        options.pop("priority", None)
    if name == "LossFree":
        name, options = "GroupLimited", {"renormalize": False, **options}
    if name in ("Switch", "GShard"):
        options.setdefault("renormalize", name == "GShard")
        name = "TopK"
    if name == "GroupLimited":
        options = {**_GROUPS, **options}
        if options["num_groups"] == options["top_groups"]:
            options |= {"num_groups": 1, "top_groups": 1, "group_score": "top2"}
        learns = not options["renormalize"] or moe.top_k > 1  # TopK refuses what does not
        if learns and all(options[key] == value for key, value in _PLAIN.items()):
            options = {key: value for key, value in options.items() if key == "renormalize" or key not in _GROUPS}
            name = "TopK"
    if name == "TopK":
        given = options.get("renormalize")
        renormalize = bool(moe.top_k > 1 if given is None else given) or moe.num_experts == 1
        options |= {"renormalize": renormalize, "bias": options.get("bias", False)}
    return name, options
