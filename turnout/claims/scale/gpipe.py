"""Claim: cut into many microbatches, a batch keeps the devices of a pipeline nearly always busy."""

import random

from turnout.claims.claim import Claim, Row, Values
from turnout.decide import device
from turnout.solve import pipeline
from turnout.types import StageCosts

_RANKS, _PARTS = 8, 4  # stages, and microbatches a stage: the paper's M >= 4 K
_ONE = 1


def gpipe() -> Claim:
    """The bubble is (K - 1) / (M + K - 1): small from M = 4 K on. The off arm is a batch that is not cut.

    >>> gpipe().off
    'the batch in one piece'

    Source: Huang et al., 2019, "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism".
    """
    return Claim(
        name="gpipe",
        statement="Microbatches let a pipeline's stages work at a time: the idle share is (K - 1) / (M + K - 1), which "
        "is small once there are four microbatches a stage.",
        source="Huang et al., 2019, GPipe",
        off="the batch in one piece",
        switched={"idle": "idle, one piece", "time": "time, one piece"},
        rows=(
            Row("idle share", "below", "idle", "idle, one piece", "the batch in one piece"),
            Row("time over that of one device", "within", "time", "time, one piece", "one piece", bound=0.16),
            Row("idle share", "within", "idle", "idle, one piece", "'negligible', M >= 4 K", bound=0.2, headline=True),
        ),
        measure=_measure,
        seconds=1,
        note=f"{_RANKS} even stages, {_PARTS * _RANKS} microbatches, times of F, I and W drawn for each seed; the "
        "formula is met to {formula error:.0e}. Messages and the engine's own time are not in it",
        limits=(0.0, 1.001),
        simulated=True,
    )


def _measure(seed: int) -> Values:
    rng = random.Random(seed)
    forward, input, weight = (rng.uniform(0.5, 1.5) for _ in "FIW")
    many, alone = _PARTS * _RANKS, forward + input + weight
    whole = StageCosts.even(_RANKS, forward=forward, input=input, weight=weight)
    # The batch is the same: one piece of it takes as long as all microbatches.
    piece = StageCosts.even(_RANKS, forward=forward * many, input=input * many, weight=weight * many)
    cut, one = pipeline(device.gpipe(_RANKS, many), whole), pipeline(device.gpipe(_RANKS, _ONE), piece)
    device_alone = _RANKS * many * alone
    return {
        "idle": cut.bubble,
        "idle, one piece": one.bubble,
        "time": cut.makespan / device_alone,
        "time, one piece": one.makespan / device_alone,
        "formula error": abs(cut.bubble - (_RANKS - 1) / (many + _RANKS - 1)),
    }
