"""MoETuner: clusters of even load, then the device of each cluster by where its tokens go."""

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.scale.walks import walks
from turnout.decide.device.place import both, by_load
from turnout.decide.device.place import moetuner as programs
from turnout.types import Placement

__all__ = ["moetuner"]

_REPORTED = 1 / 1.093  # of the time on one node


def _measure(seed: int) -> Values:
    told = walks(8, 16, seed, alpha=0.2)
    plain = Placement.contiguous(told.num_experts_L, devices=4)
    tuned = programs(told.load_LE, told.step_LEE, devices=4, seconds=2)
    load = by_load(told.load_LE, devices=4)
    joint = both(told.load_LE, told.step_LEE, devices=4, balance=1.05)
    found = {
        "busiest": told.imbalance(tuned) - 1,
        "busiest, contiguous": told.imbalance(plain) - 1,
        "crossing": told.crossing(tuned),
        "crossing, load alone": told.crossing(load),
        "joint crossing": told.crossing(joint),
        "joint busiest": told.imbalance(joint) - 1,
        "time": told.imbalance(tuned) * (1 + told.crossing(tuned)),
        "time, contiguous": told.imbalance(plain) * (1 + told.crossing(plain)),
    }
    return found | {"time over": found["time"] / found["time, contiguous"], "time over, contiguous": 1.0}


def moetuner() -> Claim:
    """MoETuner's two programs against one aim alone, and the joint search that may still change the clusters.

    >>> moetuner().name
    'moetuner'

    Source: Go & Mahajan, 2025, "MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement and Token
    Routing".
    """
    return Claim(
        name="moetuner",
        statement="clusters of experts of even load, put where their tokens go on to: even devices and less traffic",
        source='Go & Mahajan, 2025, "MoETuner"',
        off="experts in their order; clusters by load alone, their devices as they come",
        switched={
            "busiest": "busiest, contiguous",
            "crossing": "crossing, load alone",
            "joint crossing": "crossing, load alone",
            "joint busiest": "busiest, contiguous",
        },
        rows=(
            Row("busiest device above the mean", "below", "busiest", "busiest, contiguous", "experts in their order"),
            Row("share of steps to another device", "below", "crossing", "crossing, load alone", "load alone"),
            Row("share of steps to another device, both at once", "below", "joint crossing", "crossing",
                "clusters first"),
            Row("busiest device above the mean, both at once", "below", "joint busiest", "busiest, contiguous",
                "experts in their order"),
            Row("time of a layer, busiest device x (1 + crossing share), over that of experts in their order", "within",
                "time over", "time over, contiguous", "experts in their order", bound=_REPORTED, headline=True),
        ),
        measure=_measure,
        seconds=15,
        note="time is a model, in units of an even layer without traffic: {time} against {time, contiguous}",
        simulated=True,
    )  # fmt: skip
