"""The demo's sparse model and its dense twin: minutes on two CPU cores."""

import math

from turnout.models.lm import LMConfig, MoEConfig
from turnout.recipes.run import DataConfig, Run
from turnout.train.loop import TrainConfig

_WIDTH, _LAYERS, _HEADS, _VOCAB, _SEQ = 96, 4, 4, 2048, 256
_EXPERTS, _TOP_K, _EXPERT_HIDDEN = 8, 2, 128


def _train() -> TrainConfig:
    return TrainConfig(
        steps=800,
        batch=8,
        seq=_SEQ,
        lr=4e-3,
        min_lr=4e-4,
        warmup=80,
        schedule="cosine",
        weight_decay=0.1,
        clip=1.0,
        aux_weight=0.01 * _LAYERS,  # Switch adds 0.01 of every layer's; the loop averages over the layers
        z_weight=0.001,
        eval_every=100,
        eval_tokens=32_768,
        checkpoint_every=200,
    )


def tiny() -> Run:
    """A sparse language model: 4 layers, 8 experts of which each token takes 2; minutes on two CPU cores.

    Expressible as ``MixtralForCausalLM``: softmax over the chosen experts, SwiGLU, RMSNorm, RoPE, no biases.

    >>> tiny().model.moe.num_experts
    8

    Source: Jiang et al., 2024, "Mixtral of Experts", at a thirty-thousandth of its size.
    """
    return Run(
        recipe="tiny",
        data=DataConfig(held_out=0.1, limit_mb=8.0),
        model=LMConfig(
            vocab_size=_VOCAB,
            width=_WIDTH,
            layers=_LAYERS,
            heads=_HEADS,
            kv_heads=_HEADS // 2,
            hidden=_TOP_K * _EXPERT_HIDDEN,
            max_seq=_SEQ,
            tie_embeddings=True,
            moe=MoEConfig(num_experts=_EXPERTS, top_k=_TOP_K, hidden=_EXPERT_HIDDEN, router="TopK"),
        ),
        train=_train(),
    )


def tiny_dense() -> Run:
    """The dense twin of ``tiny``: the same active FLOPs a token, every parameter used by every token.

    Its feed-forward is K·F wide, plus E/3 for what the router multiplies, so that it never has the fewer FLOPs.

    >>> tiny_dense().model.moe is None
    True

    Source: Touvron et al., 2023, "LLaMA", for the architecture.
    """
    return Run(
        recipe="tiny_dense",
        data=DataConfig(held_out=0.1, limit_mb=8.0),
        model=LMConfig(
            vocab_size=_VOCAB,
            width=_WIDTH,
            layers=_LAYERS,
            heads=_HEADS,
            kv_heads=_HEADS // 2,
            hidden=_TOP_K * _EXPERT_HIDDEN + math.ceil(_EXPERTS / 3),
            max_seq=_SEQ,
            tie_embeddings=True,
        ),
        train=_train(),
    )
