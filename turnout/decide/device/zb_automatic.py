"""The zero-bubble heuristic: a schedule for measured times and a limit of memory, as the paper's authors find it."""

import dataclasses
import itertools

from turnout.decide.device.looped import check_counts
from turnout.errors import UsageError, word
from turnout.solve.pipeline import pipeline
from turnout.types.schedule import Action, Schedule
from turnout.types.stage_costs import StageCosts

__all__ = ["zb_automatic"]

_WHERE = "turnout.decide.device.zb_automatic"


def zb_automatic(costs: StageCosts, microbatches: int, *, memory: float | None = None) -> Schedule:
    """ZB-1p and ZB-2p: as many forwards ahead as memory and the first backward allow; W goes where a device waits.

    Microbatch by microbatch a wave of forwards runs down the devices and a wave of backwards up. Before each, a device
    that would wait does a W, if it fits, or if the wait would make it the device that has waited longest. Three choices
    are tried both ways, and the best span kept: whether the forwards ahead may keep the first backward waiting, whether
    a device well ahead may leave a forward out, and whether W also fills the gaps that are too short for it.

    Args:
        costs: of p stages, one a device.
        microbatches: m.
        memory: the most that a device's microbatches may hold, in the unit of ``costs.activation_S``; None for what p
            microbatches hold, 1F1B's (ZB-1p). Twice that is ZB-2p.

    Returns:
        The schedule.

    Raises:
        UsageError: no room for a microbatch.

    >>> zb_automatic(StageCosts.even(2), 3, memory=4).to_csv().splitlines()[0]
    '0F0,0F1,0F2,0I0,0W0,0I1,0W1,0I2,0W2'

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism", section 3.1, and the authors' program, for what that
    leaves open.
    """
    check_counts("zb_automatic", costs.stages, microbatches)
    room = costs.stages * max(costs.held_S) if memory is None else memory
    if room < max(costs.held_S):
        allowed = f"hold a microbatch, {max(costs.held_S):g},"
        raise UsageError(word("memory", got=memory, allowed=allowed, where=_WHERE, fix="raise it, or cut stages finer"))
    best: tuple[float, Schedule] | None = None
    for late, skip, fill in itertools.product((True, False), repeat=3):
        lanes = _Lanes(costs, microbatches, room, late=late, skip=skip, fill=fill)
        lanes.run()
        name = "ZB1P" if memory is None else "ZB2P"
        found = Schedule(name, tuple(map(tuple, lanes.order)), tuple(range(costs.stages)), microbatches)
        span = pipeline(found, costs).span
        if best is None or span < best[0]:
            best = span, found
    assert best is not None
    return best[1]


@dataclasses.dataclass
class _Lanes:
    """The devices on their way through a step."""

    costs: StageCosts
    microbatches: int
    room: float
    late: bool
    skip: bool
    fill: bool

    def __post_init__(self) -> None:
        stages, costs = self.costs.stages, self.costs
        self.took = {"F": costs.forward_S, "I": costs.input_S, "W": costs.weight_S}
        held, kept = costs.held_S, costs.kept
        self.adds = {"F": held, "I": [(kept - 1) * one for one in held], "W": [-kept * one for one in held]}
        self.done = {kind: [0] * stages for kind in "FIW"}
        self.end: dict[tuple[str, int, int], float] = {}
        self.clock, self.idle, self.holds = [0.0] * stages, [0.0] * stages, [0.0] * stages
        self.order: list[list[Action]] = [[] for _ in range(stages)]

    def run(self) -> None:
        stages = range(self.costs.stages)
        self._ahead()
        for stage in reversed(stages):
            self._put(stage, "I")
        for _ in range(1, self.microbatches):
            due = [self._due(stage) for stage in stages]
            for stage in reversed(stages[:-1]):
                due[stage] = due[stage] and due[stage + 1]
            for stage in stages:
                if due[stage]:
                    self._fill(stage, "F")
                    self._put(stage, "F")
            for stage in reversed(stages):
                self._fill(stage, "I")
                if stage == 0 and self.done["F"][0] == self.microbatches:
                    self._weights(0)
                self._put(stage, "I")
        for stage in stages:
            self._weights(stage)

    def _ahead(self) -> None:
        """The forwards before the first backward: of device s always more than of s + 1, while there are any."""
        costs, stages = self.costs, self.costs.stages
        for stage in range(stages):
            self._put(stage, "F")
        more = [0] * stages
        back = self.clock[-1] + costs.input_S[-1]
        for stage in reversed(range(stages - 1)):
            back += costs.send
            clock, holds, each = self.clock[stage], self.holds[stage], costs.held_S[stage]
            while 1 + more[stage] < self.microbatches and holds + each <= self.room:
                if clock >= back if not self.late else clock + costs.forward_S[stage] > back:
                    break
                clock, holds, more[stage] = clock + costs.forward_S[stage], holds + each, more[stage] + 1
            back = max(clock, back) + costs.input_S[stage]
        for stage in range(1, stages):
            more[stage] = min(more[stage], max(more[stage - 1] - 1, 0))
        for stage in range(stages):
            for _ in range(more[stage]):
                self._put(stage, "F")

    def _due(self, stage: int) -> bool:
        """Whether a forward is done in this wave."""
        done = self.done["F"]
        if done[stage] >= self.microbatches:
            return False
        if not self.skip or stage + 1 == self.costs.stages or done[stage] < done[stage + 1] + 2:
            return True
        behind = (
            self.clock[stage + 1] + self.costs.forward_S[stage + 1] + self.costs.input_S[stage + 1] + self.costs.send
        )
        if self.clock[stage] >= behind:
            return False
        over = self.holds[stage] + self.costs.held_S[stage] - self.room
        freed, time = self.costs.kept * self.costs.held_S[stage], self.clock[stage] + self.costs.forward_S[stage]
        for _ in range(self.done["I"][stage] - self.done["W"][stage]):
            if over <= 1e-9:
                break
            over, time = over - freed, time + self.costs.weight_S[stage]
        if time <= behind:
            return True
        return behind - self.clock[stage] > max(self.idle) - self.idle[stage]

    def _fill(self, stage: int, kind: str) -> None:
        """W, where memory needs it or the device would wait for what comes next."""
        while self.holds[stage] + self.adds[kind][stage] > self.room + 1e-9 and self._pending(stage):
            self._put(stage, "W")
        arrival = self._arrival(stage, kind)
        while self._pending(stage) and self.clock[stage] + self.costs.weight_S[stage] <= arrival:
            self._put(stage, "W")
        gap = arrival - self.clock[stage]
        if self._pending(stage) and gap > 0 and (self.fill or gap > max(self.idle) - self.idle[stage]):
            self._put(stage, "W")

    def _weights(self, stage: int) -> None:
        while self._pending(stage):
            self._put(stage, "W")

    def _pending(self, stage: int) -> bool:
        return self.done["W"][stage] < self.done["I"][stage]

    def _arrival(self, stage: int, kind: str) -> float:
        """When what the next F or I needs from another device is there; 0 where it needs nothing."""
        other = stage - 1 if kind == "F" else stage + 1
        if not 0 <= other < self.costs.stages:
            return 0.0
        return self.end[kind, other, self.done[kind][stage]] + self.costs.send

    def _put(self, stage: int, kind: str) -> None:
        begin = self.clock[stage] if kind == "W" else max(self.clock[stage], self._arrival(stage, kind))
        if self.done["F"][stage]:
            self.idle[stage] += begin - self.clock[stage]
        microbatch = self.done[kind][stage]
        self.clock[stage] = self.end[kind, stage, microbatch] = begin + self.took[kind][stage] + self.costs.overhead
        self.holds[stage] += self.adds[kind][stage]
        self.done[kind][stage] += 1
        self.order[stage].append(Action(stage, kind, microbatch))
