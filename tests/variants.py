"""Small language models of every kind, with weights large enough for differences to be seen."""

import dataclasses

import pytest
import torch

from turnout.models import LM, LMConfig, MLAConfig, MoEConfig

TINY = LMConfig(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, hidden=40, max_seq=48)
LATENT = {"attention": "mla", "kv_heads": None, "mla": MLAConfig(kv_rank=12, rope_dim=6, nope_dim=10, v_dim=14)}
ROUTED = MoEConfig(num_experts=5, top_k=2, hidden=24)
VARIANTS = {
    "dense": {},
    "tied": {"tie_embeddings": True},
    "wide heads": {"head_dim": 10, "qkv_bias": True, "out_bias": True, "ff_bias": True},
    "head norm": {"qk_norm": "head"},
    "full norm": {"qk_norm": "full", "kv_heads": None},
    "window": {"window": 5, "window_layers": (1,)},
    "sinks": {"sinks": True, "window": 5, "window_layers": (0,)},
    "sinks, one key head": {"sinks": True, "kv_heads": 1, "head_dim": 10, "attention_scale": 0.7, "window": 30},
    "latent": LATENT,
    "latent queries": {**LATENT, "mla": dataclasses.replace(LATENT["mla"], q_rank=9, interleaved=False)},
    "half turned": {"rope_share": 0.5},
    "norms after": {"norm_place": "after", "qk_norm": "full", "residual_scale": 0.5},
    "norms on both sides": {"norm_place": "both", "moe": dataclasses.replace(ROUTED, layers=(1,))},
    "a layer without rope": {"rope_layers": (1,), "window": 5, "window_layers": (0,)},
    "gemma": {
        "norm": "rms_plus_one",
        "norm_place": "both",
        "qk_norm": "head",
        "window": 5,
        "window_layers": (0,),
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "local_rope_theta": 50.0,
        "activation": "geglu_tanh",
        "embedding_scale": 32**0.5,
        "embedding_rounded": True,
        "attention_softcap": 1.5,
        "logit_softcap": 4.0,
        "tie_embeddings": True,
    },
    "gpt-2": {
        "heads": 32,
        "kv_heads": None,
        "rope_layers": (),
        "learned_positions": True,
        "norm": "layer",
        "qkv_bias": True,
        "out_bias": True,
        "ff_bias": True,
        "activation": "gelu_tanh",
    },
    "gpt-2 with experts": {
        "rope_layers": (),
        "learned_positions": True,
        "norm": "layer",
        "moe": dataclasses.replace(ROUTED, activation="gelu_tanh", bias=True),
    },
    "latent, capped": {**LATENT, "attention_softcap": 0.7, "norm": "rms_plus_one"},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "moe": {"moe": ROUTED},
    "moe in one layer": {"moe": dataclasses.replace(ROUTED, layers=(1,), shared_hidden=12, shared_gate=True)},
    "loss-free": {"moe": dataclasses.replace(ROUTED, router="LossFree", shared_hidden=12)},
    "hash": {"moe": dataclasses.replace(ROUTED, router="Hash")},
    "gpt-oss": {
        "sinks": True,
        "qkv_bias": True,
        "out_bias": True,
        "window": 6,
        "window_layers": (0,),
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
        "moe": dataclasses.replace(ROUTED, activation="swiglu_oai", bias=True, router_options={"bias": True}),
    },
    "biased experts": {"moe": dataclasses.replace(ROUTED, bias=True, shared_hidden=12)},
    "groups of softmax": {
        "moe": MoEConfig(
            6, 2, 24, router="GroupLimited",
            router_options={"num_groups": 3, "top_groups": 2, "scores": "softmax", "group_score": "max", "bias": False},
        ),
    },
    "groups": {
        "moe": MoEConfig(6, 2, 24, router="GroupLimited", router_options={"num_groups": 3, "top_groups": 2}),
    },
}  # fmt: skip
every_variant = pytest.mark.parametrize("name", VARIANTS)


def make(name: str, seed: int = 0) -> LM:
    """The variant with weights large enough for differences to be seen."""
    lm = LM(dataclasses.replace(TINY, **VARIANTS[name], init_std=0.2), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, parameter in lm.named_parameters():
            if parameter.ndim == 1 or key.endswith("_bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return lm


def ids(batch: int, seq: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))
