"""Claim: one schedule for a whole sparse block is never longer than the four that are published."""

import random
import statistics
from collections.abc import Sequence

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.scale.block_profiles import drawn, over_bound, planned, reordered
from turnout.types import BlockCosts, BlockSchedule

_PROFILES, _BLOCKS = 8, 3
_PUBLISHED = ("none", "tutel", "fsmoe", "flowmoe")
_CLOSE = 1 + 1e-9


def block_schedule() -> Claim:
    """Planned with attention, gate, all-to-alls, experts, halves of backward passes and reductions, a step is shorter.

    The control has the same tasks and chunks with whatever is ready at random: no order, no priority.

    >>> block_schedule().simulated
    True

    Source: Gao et al., 2025, "FlowMoE", the best of what is published; what goes on from there is ours.
    """
    over, what = "makespan over the bound (busiest resource, no gap), mean of profiles", "the same tasks at random"
    return Claim(
        name="block_schedule",
        statement="One plan for all that a block does on chip and wire is never longer than the best published one.",
        source="Gao et al., 2025, FlowMoE; Hwang et al., 2023, Tutel; Pan et al., 2025, FSMoE",
        off="the same tasks and chunks, whatever is ready at random",
        switched={"ours": "random", "longest": "random longest"},
        rows=(
            Row(over, "below", "ours", "random", what),
            Row("makespan over the best of the four, worst", "within", "longest", "random longest", what, bound=_CLOSE),
            Row(over, "below", "ours", "none", "no overlap", headline=True),
            Row(over, "below", "ours", "tutel", "Tutel's best degree", headline=True),
            Row(over, "below", "ours", "fsmoe", "FSMoE's best degree and pieces", headline=True),
            Row(over, "below", "ours", "flowmoe", "FlowMoE's best degree and pieces", headline=True),
        ),
        measure=_measure,
        seconds=20,
        simulated=True,
        note=f"{_PROFILES} random profiles of {_BLOCKS} blocks, backward twice forward; all four are the best of "
        "degrees 1 to 16 and eight sizes of pieces. FlowMoE is {flowmoe:.3f} of the bound, ours {ours:.3f}",
        limits=(0.0, 20.0),
    )


def _measure(seed: int) -> Values:
    profiles = drawn(seed, _PROFILES)
    ours = _ours(profiles)
    shuffled = [_in_any_order(plan, costs, seed) for plan, costs in zip(ours, profiles, strict=True)]
    times = {method: over_bound(planned(profiles, method, _BLOCKS), profiles) for method in _PUBLISHED}
    best = [min(each) for each in zip(*times.values(), strict=True)]
    times |= {"ours": over_bound(ours, profiles), "random": over_bound(shuffled, profiles)}
    values = {name: statistics.fmean(each) for name, each in times.items()}
    for name, of in (("longest", "ours"), ("random longest", "random")):
        values[name] = max(one / least for one, least in zip(times[of], best, strict=True))
    return values


def _ours(profiles: Sequence[BlockCosts]) -> list[BlockSchedule]:
    return planned(profiles, "turnout", _BLOCKS)


def _in_any_order(plan: BlockSchedule, costs: BlockCosts, seed: int) -> BlockSchedule:
    return reordered(plan, costs, lambda task: random.Random(f"{seed} {task}").random())
