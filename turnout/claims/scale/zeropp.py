"""Claim: units of microbatches let a pipeline over sharded parameters gather them seldom and wait little."""

import random

from turnout.claims.claim import Claim, Row, Values
from turnout.decide import device
from turnout.solve import pipeline
from turnout.types import Action, Schedule, StageCosts

_RANKS, _MICROBATCHES, _UNIT, _CHUNKS = 4, 32, 8, 2
_GATHER, _SLOW = 1.0, 2.0  # how long a stage's parameters take to gather, in its forwards; and over a slow wire


def zeropp() -> Claim:
    """Gathers fall as 1 / U and so does what is waited for. The off arm has units of one microbatch.

    >>> zeropp().off
    'units of one microbatch'

    Source: Tang et al., 2024, "ZeroPP: Unleashing Exceptional Parallelism Efficiency through Tensor-Parallelism-Free
    Methodology" (later "Adaptive Blockwise Task-interleaved Pipeline Parallelism").
    """
    time, breadth = "time over 1F1B's on sharded parameters", "time over breadth-first's in units of U"
    return Claim(
        name="zeropp",
        statement="Parameters gathered once for a unit of microbatches, with I and W in the gaps of the next unit: "
        "less traffic, less waiting, and faster than breadth-first and than 1F1B on sharded parameters.",
        source="Tang et al., 2024, ZeroPP",
        off="units of one microbatch",
        switched={"gathers": "gathers, U = 1", "time": "time, U = 1"},
        rows=(
            Row("gathers of a device a microbatch", "below", "gathers", "gathers, U = 1", "units of one"),
            Row(time, "below", "time", "time, U = 1", "units of one"),
            Row(time, "within", "time, slow", "sharded 1f1b", "up to 68 % more", bound=1 / 1.68, headline=True),
            Row(breadth, "within", "over breadth", "breadth", "up to 30 % more", bound=1 / 1.30, headline=True),
        ),
        measure=_measure,
        seconds=1,
        note=f"{_RANKS} devices, {_MICROBATCHES} microbatches, U = {_UNIT}, v = {_CHUNKS}; gathering a stage takes "
        f"{_GATHER:g} of its forward, {_SLOW:g} over a slow wire, and for 1F1B happens twice a microbatch, beside the "
        "computing: the 68 % are what that costs. Breadth-first in units of as many microbatches holds {held:.2f} of "
        "what we hold and takes {breadth over ours:.2f} of our time, not 1.30; on all microbatches at once "
        "{whole over ours:.2f}, holding {held, whole:.2f} as much. The order within a unit is ours",
        limits=(0.0, 20.0),
        simulated=True,
    )


def _measure(seed: int) -> Values:
    rng = random.Random(seed)
    forward, input, weight = (rng.uniform(0.9, 1.1) for _ in "FIW")
    units, ones = (device.zeropp(_RANKS, _MICROBATCHES, unit=unit, chunks=_CHUNKS) for unit in (_UNIT, 1))
    flat = _sharded(device.one_f_one_b(_RANKS, _MICROBATCHES))
    time: dict[str, float] = {}
    for name, gather in (("time", _GATHER), ("time, slow", _SLOW)):
        whole = StageCosts.even(
            _RANKS, forward=forward, input=input, weight=weight, gather=gather * forward, parameters=1.0
        )
        finer = StageCosts.cut(whole, _CHUNKS)
        alone = pipeline(flat, whole).makespan
        time |= {
            name: pipeline(units, finer).makespan / alone,
            f"{name}, U = 1": pipeline(ones, finer).makespan / alone,
        }
    whole = StageCosts.even(
        _RANKS, forward=forward, input=input, weight=weight, gather=_GATHER * forward, parameters=1.0
    )
    finer = StageCosts.cut(whole, _CHUNKS)
    # Its gathers are taken as hidden and its parameters as not held: what favours it.
    some, all_at_once = (
        pipeline(device.looped_breadth_first(_RANKS, m, chunks=_CHUNKS), finer) for m in (_UNIT, _MICROBATCHES)
    )
    ours = pipeline(units, finer)
    breadth = some.makespan * _MICROBATCHES / _UNIT
    each = _RANKS * _MICROBATCHES
    return time | {
        "gathers": units.count("UNSHARD") / each,
        "gathers, U = 1": ones.count("UNSHARD") / each,
        "sharded 1f1b": 1.0,
        "over breadth": ours.makespan / breadth,
        "breadth": 1.0,
        "breadth over ours": breadth / ours.makespan,
        "whole over ours": all_at_once.makespan / ours.makespan,
        "held": some.peak_R.max() / ours.peak_R.max(),
        "held, whole": all_at_once.peak_R.max() / ours.peak_R.max(),
    }


def _sharded(schedule: Schedule) -> Schedule:
    """The same with every stage's parameters gathered for each action and dropped after it."""
    orders = []
    for order in schedule.actions:
        line = []
        for action in order:
            line += [Action(action.stage, "UNSHARD"), action, Action(action.stage, "RESHARD")]
        orders.append(tuple(line))
    return Schedule(f"{schedule.name}, sharded", tuple(orders), schedule.rank_of_stage, schedule.microbatches)
