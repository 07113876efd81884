"""Claim: what the routers of earlier layers made of a token helps the next one, against the same router without it."""

import dataclasses

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.trial import small, trial
from turnout.models import LM, MoEConfig

_LAYERS, _STEPS, _EXPERTS, _K, _HIDDEN, _MEMORY = 4, 120, 16, 2, 32, 32


def recurrent_router() -> Claim:
    """Bits per byte of a language model of 4 layers whose routers share a recurrent cell, or forget between layers.

    >>> recurrent_router().off
    'each layer from nothing'

    Source: Qiu et al., 2024, "Layerwise Recurrent Router for Mixture-of-Experts", tables 1 and 4.
    """
    bits = "held-out bits per byte"
    return Claim(
        name="recurrent_router",
        statement="A router that remembers the layers before routes better than the same router that does not.",
        source="Qiu et al., 2024, Layerwise Recurrent Router",
        off="each layer from nothing",
        switched={"recurrent": "nothing"},
        rows=(
            Row(bits, "below", "recurrent", "nothing", "each layer from nothing"),
            Row(bits, "below", "recurrent", "linear", "a linear router", headline=True),
        ),
        measure=_measure,
        seconds=40,
        note=f"{_LAYERS} layers, width 64, {_EXPERTS} experts of {_HIDDEN}, top {_K}, memory {_MEMORY}, {_STEPS} steps",
    )


def _measure(seed: int) -> Values:
    return {name: _run(seed, name) for name in ("recurrent", "nothing", "linear")}


def _run(seed: int, name: str) -> float:
    options: dict[str, object] = {} if name == "linear" else {"hidden": _MEMORY, "std": 0.5}
    moe = MoEConfig(_EXPERTS, _K, _HIDDEN, router="TopK" if name == "linear" else "RMoE", router_options=options)
    lm = LM(dataclasses.replace(small(moe, hidden=_K * _HIDDEN), layers=_LAYERS), seed=seed)
    for router in lm.routers if name == "nothing" else ():
        router.needs_carry = False  # pyrefly: ignore[bad-argument-type]
    return trial(lm, seed=seed, steps=_STEPS, aux_weight=0.01, z_weight=0.0, eval_tokens=16_384).bits_per_byte
