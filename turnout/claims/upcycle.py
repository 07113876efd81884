"""Claim: upcycling starts exactly at the dense model, and what it copied is worth having."""

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import STEPS, sample, taught
from turnout.claims.trial import SEQ, trial
from turnout.layers import MoE
from turnout.models import LM, LMConfig
from turnout.paths import Bank, FeedForward
from turnout.reshape.to_sparse.upcycle import upcycle as reshape

_AFTER = 150
_SIZES = ((8, 2, 1), (8, 4, 2), (16, 8, 4), (16, 8, 8))  # E, K, G
_LR = {"lr": 2e-3, "min_lr": 2e-4}


def upcycle() -> Claim:
    """The upcycled model computes what the dense one does, and after more steps is below what has not its experts.

    The start is compared with the published scaling, which spreads G over all weights (exact for the paper's squared
    ReLU, and for SwiGLU not); the end with random experts in the same network, with the dense model trained on, and at
    equal FLOPs (16 experts of half the width). All see the same batches at the same learning rates.

    >>> upcycle().off
    'random experts in the place of copies'

    Source: Komatsuzaki et al., 2023, "Sparse Upcycling"; He et al., 2024, "Upcycling Large Language Models
    into Mixture of Experts", for shards, virtual groups and the scaling that is the control.
    """
    bits, start, dense = "held-out bits per byte", "largest relative difference at the start, G = 1 to 8", "dense, on"
    spread = "G^(1/3) on gate, value and down product"
    trained = "the dense model, trained on"
    return Claim(
        name="upcycle",
        statement="Upcycling starts exactly at the dense model; after the same steps more it has fewer bits per byte "
        "than with random experts, and than the dense model.",
        source="Komatsuzaki et al., 2023, Sparse Upcycling; He et al., 2024, Upcycling LLMs into MoE",
        off="random experts in the place of copies",
        switched={"start": "start, spread", "upcycled": "random experts"},
        rows=(
            Row(start, "within", "start", "start, spread", spread, bound=1e-5),
            Row(bits, "below", "upcycled", "random experts", "the same network with random experts"),
            Row(f"{bits}, the same steps", "below", "upcycled", dense, trained, headline=True),
            Row(f"{bits}, the same FLOPs", "below", "equal FLOPs", dense, trained, headline=True),
        ),
        measure=_measure,
        seconds=30,
        note=f"2 layers, width 64, 8 copies, top 2, {STEPS} + {_AFTER} steps of 1,024 tokens; with the same steps it "
        "has {flops ratio:.2f} times the dense FLOPs a token",
    )


def _measure(seed: int) -> Values:
    lm, batches = taught(seed, routed=False), sample(seed, rows=8)
    new, _ = reshape(lm, num_experts=8, top_k=2, batches=batches, seed=seed)
    half, _ = reshape(lm, num_experts=16, top_k=2, granularity=2, batches=batches, seed=seed)
    ratio = new.cost(seq=SEQ).flops / lm.cost(seq=SEQ).flops  # pyrefly: ignore[unsupported-operation]
    found = {
        "start": max(_start(seed, *sizes, spread=False) for sizes in _SIZES),
        "start, spread": min(_start(seed, *sizes, spread=True) for sizes in _SIZES if sizes[2] > 1),
        "flops ratio": ratio,
    }
    arms = {"upcycled": new, "random experts": _redrawn(new, seed), "equal FLOPs": half, "dense, on": lm}
    for name, model in arms.items():
        # The dense one has nothing to balance.
        found[name] = trial(model, steps=_AFTER, seed=seed + 1000, aux_weight=0.01, **_LR).bits_per_byte
    return found


def _redrawn(lm: LM, seed: int) -> LM:
    """The same model with the experts that a new one would have."""
    fresh = LM(lm.config, seed=seed)
    kept = {name: value for name, value in lm.state_dict().items() if ".bank." not in name}
    fresh.load_state_dict(fresh.state_dict() | kept)
    return fresh


@torch.no_grad()
def _start(seed: int, num_experts: int, top_k: int, shards: int, *, spread: bool) -> float:
    """How far the upcycled layer is from the dense one on random tokens, relative; weights of order one."""
    config = LMConfig(vocab_size=64, width=64, layers=1, heads=4, hidden=256, init_std=64**-0.5)
    lm = LM(config, seed=seed)
    new, _ = reshape(lm, num_experts=num_experts, top_k=top_k, granularity=shards, seed=seed)
    x_TD = torch.randn(256, 64, generator=torch.Generator().manual_seed(seed))
    dense, sparse = lm.blocks[0].ff, new.blocks[0].ff
    assert isinstance(dense, FeedForward) and isinstance(sparse, MoE)
    if spread:
        assert isinstance(sparse.bank, Bank)
        sparse.bank.down.mul_(shards ** (1 / 3 - 1))
        sparse.bank.up.mul_(shards ** (1 / 3))
    want_TD, got_TD = dense(x_TD), sparse(x_TD).output
    return float((got_TD - want_TD).norm() / want_TD.norm())
