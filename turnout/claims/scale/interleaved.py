"""Claim: several stages on each device divide the bubble of a pipeline, for as many times the messages."""

import random

from turnout.claims.claim import Claim, Row, Values
from turnout.decide import device
from turnout.solve import pipeline
from turnout.types import StageCosts

_RANKS, _MICROBATCHES, _CHUNKS, _SEND = 8, 16, 2, 0.02


def interleaved() -> Claim:
    """The bubble is (p - 1) / (v m + p - 1). The off arm has v = 1: plain 1F1B.

    >>> interleaved().simulated
    True

    Source: Narayanan et al., 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM".
    """
    return Claim(
        name="interleaved",
        statement="With v stages on each device the pipeline's bubble falls to about a v-th, and a step takes at least "
        "a tenth less where microbatches are few, at a memory comparable to 1F1B's.",
        source="Narayanan et al., 2021, Megatron-LM",
        off="one stage a device",
        switched={"idle": "idle, v = 1", "time": "time, v = 1"},
        rows=(
            Row("idle share", "below", "idle", "idle, v = 1", "one stage a device"),
            Row("time over 1F1B's", "within", "time", "time, v = 1", "10+ % throughput", bound=1 / 1.1, headline=True),
            Row("held over 1F1B's", "within", "held", "held, all", "all microbatches", bound=1.5, headline=True),
        ),
        measure=_measure,
        seconds=1,
        note=f"{_RANKS} devices, {_MICROBATCHES} microbatches, v = {_CHUNKS}, F, I and W drawn for each seed, a "
        f"message {_SEND:.0%} of a stage's F. It holds {{held:.2f}} of 1F1B's and sends {_CHUNKS} times as many",
        limits=(0.0, 3.0),
        simulated=True,
    )


def _measure(seed: int) -> Values:
    rng = random.Random(seed)
    forward, input, weight = (rng.uniform(0.7, 1.3) for _ in "FIW")
    costs = StageCosts.even(_RANKS, forward=forward, input=input, weight=weight, send=_SEND * forward)
    flat = pipeline(device.one_f_one_b(_RANKS, _MICROBATCHES), costs)
    finer = StageCosts.cut(costs, _CHUNKS)
    looped = pipeline(device.interleaved(_RANKS, _MICROBATCHES, chunks=_CHUNKS), finer)
    breadth = pipeline(device.looped_breadth_first(_RANKS, _MICROBATCHES, chunks=_CHUNKS), finer)
    return {
        "idle": looped.bubble,
        "idle, v = 1": flat.bubble,
        "time": looped.makespan / flat.makespan,
        "time, v = 1": 1.0,
        "held": looped.peak_R.max() / flat.peak_R.max(),
        "held, all": breadth.peak_R.max() / flat.peak_R.max(),
    }
