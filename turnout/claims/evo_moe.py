"""Claim: experts spawned from one that was trained for a while end below experts that start at random."""

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.trial import small, trial
from turnout.models import LM, MoEConfig
from turnout.reshape.to_sparse.diversify import diversify

_ONE, _MANY, _HIDDEN, _EXPERTS, _MASKED = 40, 160, 96, 8, 0.1
_LR, _LAST = 3e-3, 3e-4
_GATE = "DenseToSparse"


def evo_moe() -> Claim:
    """One expert for a fifth of the steps, then eight masked copies of it, against copies as they are and random ones.

    All arms see as many steps, and end in a gate that is annealed over half of the steps that it has.

    >>> evo_moe().off
    'copies without masks'

    Source: Nie et al., 2021, "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate".
    """
    bits, random = "held-out bits per byte", "experts that start at random"
    return Claim(
        name="evo_moe",
        statement="Experts spawned from a trained one by random masks end below plain copies and below random ones.",
        source="Nie et al., 2021, EvoMoE",
        off="copies without masks",
        switched={"masked": "copies"},
        rows=(
            Row(bits, "below", "masked", "copies", "copies without masks"),
            Row(bits, "below", "masked", "random", random, headline=True),
        ),
        measure=_measure,
        seconds=23,
        note=f"2 layers, width 64, {_EXPERTS} experts of {_HIDDEN}, {_MASKED:.0%} of weights masked, {_ONE} + {_MANY} "
        "steps of 1,024 tokens, one expert a token at the end; no noise, which the claim dense_to_sparse measures. "
        "Masks of 30 and 50 % and longer runs were tried on seed 0 and were no better (docs/log.md)",
    )


def _measure(seed: int) -> Values:
    one, found = LM(small(None, hidden=_HIDDEN), seed=seed), {}
    trial(one, seed=seed, steps=_ONE, lr=_LR, min_lr=_LR, warmup=_ONE // 2)
    for name, masked in (("masked", _MASKED), ("copies", 0.0)):
        options = {"router": _GATE, "router_options": _gate(_MANY), "seed": seed}
        many, _ = diversify(one, num_experts=_EXPERTS, top_k=1, masked=masked, **options)  # type: ignore[arg-type]
        done = trial(many, seed=seed + 1000, steps=_MANY, lr=_LR, min_lr=_LAST, z_weight=0.0)
        found[name] = done.bits_per_byte
    moe = MoEConfig(_EXPERTS, 1, _HIDDEN, router=_GATE, router_options=_gate(_ONE + _MANY))
    fresh = LM(small(moe, hidden=_HIDDEN), seed=seed)
    found["random"] = trial(fresh, seed=seed + 1000, steps=_ONE + _MANY, z_weight=0.0).bits_per_byte
    return found


def _gate(steps: int) -> dict[str, object]:
    return {"steps": steps // 2, "noise": 0.0}
