"""Claim: giving tokens without a place another expert, and free places to other tokens, saves what dropping loses."""

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import taught
from turnout.claims.trial import trial
from turnout.decide.token import Rectify
from turnout.layers import MoE
from turnout.models import LM
from turnout.reshape import upcycle

_EXPERTS, _DEVICES, _STEPS = 8, 4, 60


def rectify() -> Claim:
    """A dense model upcycled to 8 experts, one a token, with as many places as tokens, trained for 100 steps more.

    >>> rectify().off
    'tokens without a place are dropped'

    Source: Zeng et al., 2024, "Turn Waste into Worth: Rectifying Top-k Router of MoE", table 1.
    """
    bits = "held-out bits per byte"
    return Claim(
        name="rectify",
        statement="In an upcycled model an expert on the same device for tokens without a place, and free places for "
        "next choices, save most of what dropping tokens loses.",
        source="Zeng et al., 2024, Turn Waste into Worth",
        off="tokens without a place are dropped",
        switched={"intra-device": "dropped", "fill-in": "dropped"},
        rows=(
            Row(bits, "below", "intra-device", "dropped", "tokens without a place are dropped"),
            Row(bits, "below", "fill-in", "dropped", "tokens without a place are dropped"),
            Row(bits, "below", "both", "intra-device", "without fill-in", headline=True),
        ),
        measure=_measure,
        seconds=40,
        note=f"2 layers, width 64, {_EXPERTS} experts that began as one, {_DEVICES} devices, {_STEPS} steps",
    )


def _measure(seed: int) -> Values:
    arms = {"dropped": (False, False), "intra-device": (True, False), "fill-in": (False, True), "both": (True, True)}
    return {name: _run(seed, *how) for name, how in arms.items()}


def _run(seed: int, intra: bool, fill: bool) -> float:
    lm, _ = upcycle(taught(seed, routed=False), num_experts=_EXPERTS, top_k=2, seed=seed)
    assert isinstance(lm, LM)
    start = torch.Generator().manual_seed(seed)
    for block in lm.blocks:
        moe = block.ff
        assert isinstance(moe, MoE)
        how = {"devices": _DEVICES, "intra_device": intra, "fill_in": fill}
        moe.router = Rectify(lm.config.width, _EXPERTS, top_k=1, **how, generator=start)
    return trial(lm, seed=seed, steps=_STEPS, lr=1e-3, min_lr=1e-4, aux_weight=0.02, z_weight=0.0).bits_per_byte
