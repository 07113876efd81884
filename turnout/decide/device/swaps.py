"""Swaps: a pipeline's orders made better by moving what its makespan hangs on."""

import random
from collections.abc import Sequence

from turnout.solve.pipeline import durations, stage_needs
from turnout.solve.timeline import ends
from turnout.types.stage_costs import StageCosts

__all__ = ["Orders"]

_SLACK = 1e-9
Order = list[list[int]]


class Orders:
    """The orders of a pipeline whose backward is split: what they take, and what they take at best nearby.

    Tasks are numbered as ``solve.pipeline`` does: F of stage s and microbatch m is s M + m, then all I, then all W.
    """

    def __init__(
        self, costs: StageCosts, rank_of_stage: Sequence[int], microbatches: int, memory: float, *, barrier: bool
    ) -> None:
        self.m, self.count, self.memory, self.barrier = microbatches, costs.stages * microbatches, memory, barrier
        self.duration = durations(costs, microbatches)
        self.needs = stage_needs(tuple(rank_of_stage), microbatches, costs.send)
        held = costs.held_S
        self.change = [held, [(costs.kept - 1) * one for one in held], [-costs.kept * one for one in held]]

    def value(self, order: Order) -> tuple[float, list[float]]:
        """What is made small, makespan or longest span, and when each task ends; infinite where it cannot run."""
        end = ends(order, self.duration, self.needs)
        if end is None:
            return float("inf"), []
        if self.barrier:
            return max(end[each[-1]] for each in order if each), end
        spans = [end[each[-1]] - end[each[0]] + self.duration[each[0]] for each in order if each]
        return max(spans), end

    def fits(self, order: Order) -> bool:
        """Whether no device ever holds more than it may."""
        return all(self._peak(each) <= self.memory + _SLACK for each in order)

    def _peak(self, order: list[int]) -> float:
        now = most = 0.0
        for task in order:
            now += self.change[task // self.count][task % self.count // self.m]
            most = max(most, now)
        return most

    def climb(self, order: Order, *, tries: int, rng: random.Random) -> tuple[float, Order]:
        """The best orders found by moving tasks along the critical path; what is as good is taken too, to get on."""
        now, end = self.value(order)
        best, kept = now, order
        for _ in range(tries):
            moved = self._moved(order, end, rng)
            if moved is None:
                break
            rank, line = moved
            if not self._allowed(line):
                continue
            other = [line if r == rank else each for r, each in enumerate(order)]
            value, times = self.value(other)
            if value <= now + _SLACK:
                order, now, end = other, value, times
                if now < best - _SLACK:
                    best, kept = now, order
        return best, kept

    def _moved(self, order: Order, end: list[float], rng: random.Random) -> tuple[int, list[int]] | None:
        """A device's order with a task of a critical block moved; None where no block has two tasks to exchange."""
        blocks = [block for block in self._blocks(order, end) if block[2] - block[1] >= 1]
        if not blocks:
            return None
        rank, first, last = rng.choice(blocks)
        line = list(order[rank])
        kind = rng.random()
        if kind < 0.6:
            at = rng.randrange(first, last)
            line[at], line[at + 1] = line[at + 1], line[at]
        elif kind < 0.8:
            line.insert(first, line.pop(rng.randint(first + 1, last)))
        else:
            line.insert(last, line.pop(rng.randint(first, last - 1)))
        return rank, line

    def _blocks(self, order: Order, end: list[float]) -> list[tuple[int, int, int]]:
        """(device, first, last place) of the runs without a wait on the path that what is made small hangs on."""
        last = max(range(len(order)), key=lambda r: self._taken(order[r], end))
        rank_of, place_of = {}, {}
        for rank, line in enumerate(order):
            for place, task in enumerate(line):
                rank_of[task], place_of[task] = rank, place
        blocks = []
        rank, at = last, len(order[last]) - 1
        while True:
            stop = at
            while at and end[order[rank][at - 1]] >= self._begin(order[rank][at], end) - _SLACK:
                at -= 1
            blocks.append((rank, at, stop))
            task = order[rank][at]
            tight = [need for need, lag in self.needs[task] if end[need] + lag >= self._begin(task, end) - _SLACK]
            if not tight:
                return blocks
            rank, at = rank_of[tight[0]], place_of[tight[0]]

    def _begin(self, task: int, end: list[float]) -> float:
        return end[task] - self.duration[task]

    def _taken(self, line: list[int], end: list[float]) -> float:
        if not line:
            return 0.0
        return end[line[-1]] - (0.0 if self.barrier else self._begin(line[0], end))

    def _allowed(self, line: list[int]) -> bool:
        """Whether every microbatch of a stage goes F, I, W, and memory is enough."""
        done: set[int] = set()
        now = 0.0
        for task in line:
            kind = task // self.count
            if kind and task - self.count not in done:
                return False
            done.add(task)
            now += self.change[kind][task % self.count // self.m]
            if now > self.memory + _SLACK:
                return False
        return True
