"""ExFlow: experts placed by inter-layer affinity keep tokens on their device."""

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.scale.walks import walks
from turnout.decide.device.place import by_affinity
from turnout.decide.device.place import exflow as program
from turnout.types import Placement

__all__ = ["exflow"]

_REPORTED = 0.33  # of the routing between devices is left at best: "up to 67 %" less


def _measure(seed: int) -> Values:
    small, large = walks(4, 8, seed, alpha=0.1), walks(12, 64, seed, alpha=0.1)
    solved = program(small.step_LEE, devices=2, seconds=20)
    found = by_affinity(small.step_LEE, devices=2)
    plain = Placement.contiguous(small.num_experts_L, devices=2)
    wide = by_affinity(large.step_LEE, devices=8, kicks=40)
    wide_plain = Placement.contiguous(large.num_experts_L, devices=8)
    return {
        "program": small.crossing(solved.placement),
        "contiguous": small.crossing(plain),
        "over the program": small.crossing(found) - small.crossing(solved.placement),
        "contiguous over": small.crossing(plain) - small.crossing(solved.placement),
        "affinity, 64": large.crossing(wide),
        "contiguous, 64": large.crossing(wide_plain),
        "left": small.crossing(solved.placement) / small.crossing(plain),
        "left of all": 1.0,
    }


def exflow() -> Claim:
    """ExFlow's integer program, and the search that takes its place where it is too large, against contiguous experts.

    >>> exflow().name
    'exflow'

    Source: Yao et al., 2024, "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model
    Inference".
    """
    against = "experts in their order"
    return Claim(
        name="exflow",
        statement="an integer program over recorded routes places experts so that far fewer tokens change the device",
        source='Yao et al., 2024, "Exploiting Inter-Layer Expert Affinity"',
        off="the experts in their order, whatever the routes",
        switched={
            "program": "contiguous",
            "over the program": "contiguous over",
            "affinity, 64": "contiguous, 64",
        },
        rows=(
            Row("share of steps to another device, 4 layers of 8 experts", "below", "program", "contiguous", against),
            Row("our search above the program's share", "within", "over the program", "contiguous over", against,
                bound=1e-6),
            Row("share of steps to another device, 12 layers of 64", "below", "affinity, 64", "contiguous, 64",
                against),
            Row("of what crossed before, 0.33 in the paper", "within", "left", "left of all", "all of it",
                bound=_REPORTED, headline=True),
        ),
        measure=_measure,
        seconds=8,
        note="{left} of the crossing steps are left: that is a property of the routes, here tokens that walk at random "
        "with few successors an expert, and not of the method, whose share is proved to be the least",
        limits=(-1e-6, 10.0),
        simulated=True,
    )  # fmt: skip
