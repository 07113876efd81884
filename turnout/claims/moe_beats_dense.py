"""Claim: at equal active FLOPs and steps, a sparse model beats the dense one."""

import time

from turnout.claims.claim import Claim, Evidence
from turnout.claims.trial import SEEDS, Note, small, trial
from turnout.models.lm import MoEConfig

_STEPS, _TOP_K, _HIDDEN, _EXPERTS = 600, 2, 96, 8


def moe_beats_dense(*, note: Note = None) -> Claim:
    """At equal active FLOPs and steps the sparse model has fewer held-out bits per byte than the dense one.

    Both see the same batches in the same order; the dense feed-forward is K·F + E/3 wide, so that with the
    router's product counted it never has the fewer FLOPs.

    >>> moe_beats_dense.__name__  # the run itself takes a minute: turnout verify moe_beats_dense
    'moe_beats_dense'

    Source: Fedus et al., 2021, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
    Efficient Sparsity", figure 1 and table 1. We compare at 2 layers of width 64 and 0.6 million tokens.
    """
    began = time.perf_counter()
    moe = MoEConfig(num_experts=_EXPERTS, top_k=_TOP_K, hidden=_HIDDEN, router="TopK")
    sparse_model = small(moe, hidden=_TOP_K * _HIDDEN)
    dense_model = small(None, hidden=_TOP_K * _HIDDEN + -(-_EXPERTS // 3))
    sparse, dense = [], []
    for seed in SEEDS:
        run = trial(sparse_model, seed=seed, steps=_STEPS, note=note, name="sparse", aux_weight=0.01, z_weight=0.001)
        sparse.append(run.bits_per_byte)
        dense.append(trial(dense_model, seed=seed, steps=_STEPS, note=note, name="dense").bits_per_byte)
    evidence = Evidence("held-out bits per byte", "below", tuple(sparse), tuple(dense), "dense, equal active FLOPs")
    return Claim(
        name="moe_beats_dense",
        statement="At equal active FLOPs and steps a mixture of experts has fewer held-out bits per byte than dense.",
        source="Fedus et al., 2021, Switch Transformers",
        evidence=(evidence,),
        seconds=time.perf_counter() - began,
        note=f"2 layers, width 64, {_EXPERTS} experts, top {_TOP_K}, {_STEPS} steps of 1,024 tokens",
    )
