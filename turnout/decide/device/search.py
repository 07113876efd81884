"""Search: a pipeline schedule for stages as they are, uneven, with messages, within a memory; by the simulator."""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Literal

from turnout.decide.device.dual_pipe_v import dual_pipe_v
from turnout.decide.device.gpipe import gpipe
from turnout.decide.device.greedy import Policy, greedy
from turnout.decide.device.interleaved import interleaved, looped_breadth_first
from turnout.decide.device.looped import check_counts, rounds
from turnout.decide.device.one_f_one_b import one_f_one_b
from turnout.decide.device.swaps import Orders
from turnout.decide.device.v_pattern import v_half, v_min
from turnout.decide.device.zb_automatic import zb_automatic
from turnout.decide.device.zbv import zbv
from turnout.decide.device.zero_bubble import interleaved_zero_bubble, zb_h1, zb_h2
from turnout.errors import UsageError, word
from turnout.solve.pipeline import pipeline
from turnout.types.schedule import Action, Schedule
from turnout.types.stage_costs import StageCosts

__all__ = ["Found", "known_schedules", "search"]

_WHERE = "turnout.decide.device.search"
_SLACK = 1e-9


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        schedule: the best one.
        time: its makespan, or longest span, in the costs' unit.
        known: the best of the published schedules that fit, by name and time; None where none fits.
        tried: how many schedules were played.

    >>> found = search(StageCosts.even(2), 2, 4)
    >>> found.time <= found.known[1], found.schedule.microbatches
    (True, 4)

    Source: none; plain bookkeeping.
    """

    schedule: Schedule
    time: float
    known: tuple[str, float] | None
    tried: int


def search(
    costs: StageCosts,
    ranks: int,
    microbatches: int,
    *,
    memory: float | None = None,
    barrier: bool = True,
    tries: int = 200,
    seed: int = 0,
) -> Found:
    """A schedule for these costs that is at least as good as every published one that fits, and as good as we can.

    It begins with the published schedules and with greedy plays under many policies, changes what each device takes
    ahead, and then moves tasks along the critical path. Each step is judged by the simulator.

    Args:
        costs: of S stages, a multiple of the devices; uneven ones are what it is for.
        ranks: p devices, which hold S / p stages each: one after the other in turns and, for two, also as a V.
        microbatches: m.
        memory: the most that the microbatches of a device may hold, in the costs' unit; None for any.
        barrier: whether all devices wait for each other after the step: then the makespan is made small, else the
            longest span.
        tries: how many plays each part of the search may take; fewer for pipelines of more than a thousand tasks.
        seed: of the moves.

    Returns:
        The best schedule, with what the best published one takes.

    Raises:
        UsageError: counts that do not go together, or a memory that cannot hold a microbatch.

    >>> uneven = StageCosts((1.0, 2.0, 1.5), (1.0, 2.0, 1.5), (1.0, 2.0, 1.5), send=0.5)
    >>> found = search(uneven, 3, 4, memory=2)
    >>> found.time, found.known
    (28.0, ('ZB2P', 36.0))

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism", sections 3 and 6, for the aim; Giffler and Thompson,
    1960, for plays; Nowicki and Smutnicki, 1996, "A Fast Taboo Search Algorithm for the Job Shop Problem", for moves.
    """
    check_counts("search", ranks, microbatches)
    _check(costs, ranks, memory)
    run = _Search(costs, ranks, microbatches, float("inf") if memory is None else memory, barrier, tries, seed)
    for schedule in run.published:
        if run.fits(schedule):
            run.take(schedule)
    known = None if run.best is None else (run.best[1].name, run.best[0])
    for holders in _holders(costs.stages, ranks):
        run.improve(holders)
    if run.best is None:
        got, fix = f"memory {memory:g}", "raise it, or cut stages finer"
        allowed = "be enough for some order of its microbatches"
        raise UsageError(word("memory", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return Found(run.best[1], run.best[0], known, run.tried)


def known_schedules(
    costs: StageCosts, ranks: int, microbatches: int, *, memory: float | None = None
) -> Iterator[Schedule]:
    """The published schedules for so many stages a device that fit into a memory.

    >>> [schedule.name for schedule in known_schedules(StageCosts.even(2), 2, 4)]
    ['GPipe', '1F1B', 'ZBH1', 'ZBH2', 'ZB2P']

    Source: each schedule's own.
    """
    p, m = ranks, microbatches
    room = float("inf") if memory is None else memory
    for schedule in _published(costs, p, m, memory):
        if float(pipeline(schedule, costs).peak_R.max()) <= room + _SLACK:
            yield schedule


def _published(costs: StageCosts, p: int, m: int, memory: float | None) -> Iterator[Schedule]:
    chunks = costs.stages // p
    if chunks == 1:
        yield from (gpipe(p, m), one_f_one_b(p, m), zb_h1(p, m), zb_h2(p, m))
        most = max(costs.held_S)
        room = m * most if memory is None else memory
        if room >= most:
            yield zb_automatic(costs, m, memory=room)
        return
    yield looped_breadth_first(p, m, chunks=chunks)
    if m % rounds(p, m) == 0:
        yield interleaved(p, m, chunks=chunks)
        yield interleaved_zero_bubble(p, m, chunks=chunks)
    if chunks == 2:
        yield from (zbv(p, m), v_half(p, m), v_min(p, m))
        if m >= 2 * p:
            yield dual_pipe_v(p, m)


def _holders(stages: int, ranks: int) -> list[tuple[int, ...]]:
    looped = tuple(range(ranks)) * (stages // ranks)
    return [looped] + ([(*range(ranks), *reversed(range(ranks)))] if stages == 2 * ranks and ranks > 1 else [])


def _check(costs: StageCosts, ranks: int, memory: float | None) -> None:
    if costs.stages % ranks:
        fix, allowed = f"cut the network into {ranks} or {2 * ranks} stages", f"be a multiple of the {ranks} devices"
        raise UsageError(word("the costs' stages", got=costs.stages, allowed=allowed, where=_WHERE, fix=fix))
    if memory is None:
        return
    least = max(sum(costs.held_S[rank::ranks]) for rank in range(ranks))
    if memory < least and costs.stages == ranks:
        fix = f"pass memory={least:g} at least, or cut stages finer"
        allowed = f"hold a microbatch, {least:g},"
        raise UsageError(word("memory", got=memory, allowed=allowed, where=_WHERE, fix=fix))


@dataclasses.dataclass
class _Search:
    """The best so far, and how to get further."""

    costs: StageCosts
    ranks: int
    m: int
    memory: float
    barrier: bool
    tries: int
    seed: int
    best: tuple[float, Schedule] | None = None
    tried: int = 0

    def __post_init__(self) -> None:
        # What a play takes grows with the tasks; a large pipeline gets fewer of them, never fewer than a twentieth.
        tasks = 3 * self.costs.stages * self.m
        self.plays = max(self.tries // 20, min(self.tries, int(self.tries * 1000 / tasks)))
        self.rng = random.Random(self.seed)
        room = None if self.memory == float("inf") else self.memory
        self.published = list(_published(self.costs, self.ranks, self.m, room))

    def fits(self, schedule: Schedule) -> bool:
        """Whether no device ever holds more than it may."""
        return float(pipeline(schedule, self.costs).peak_R.max()) <= self.memory + _SLACK

    def take(self, schedule: Schedule) -> float:
        """Keeps the schedule if it is better than what there is."""
        times = pipeline(schedule, self.costs)
        self.tried += 1
        time = times.makespan if self.barrier else times.span
        if self.best is None or time < self.best[0] - _SLACK:
            self.best = time, schedule
        return time

    def improve(self, holders: tuple[int, ...]) -> None:
        """All of the search for one way of holding the stages."""
        orders = Orders(self.costs, holders, self.m, self.memory, barrier=self.barrier)
        starts = [
            (orders.value(line)[0], line)
            for schedule in self.published
            if schedule.rank_of_stage == holders and orders.fits(line := self._split(schedule))
        ]
        starts += self._refilled(holders, orders)
        plays = self._plays(holders, orders)
        starts += [(value, line) for value, line, _ in plays]
        if plays:
            starts.append(self._ahead(holders, orders, plays[0]))
        starts.sort(key=lambda start: start[0])
        for _, start in starts[:3]:
            _, line = orders.climb(start, tries=self.plays, rng=self.rng)
            self.tried += self.plays
            for fused in (False, True):
                self.take(self._schedule(line, holders, fused=fused))

    def _refilled(self, holders: tuple[int, ...], orders: Orders) -> list[tuple[float, list[list[int]]]]:
        """The published schedules' F and I in their order, with W where these costs leave room for it."""
        found = []
        for schedule in _published(
            self.costs, self.ranks, self.m, None if self.memory == float("inf") else self.memory
        ):
            if schedule.rank_of_stage != holders:
                continue
            lines = [[task for task in line if task < 2 * orders.count] for line in self._split(schedule)]
            for patience, even in ((0.5, False), (1.0, False), (1.0, True)):
                policy = Policy((self.memory,) * self.ranks, patience=patience, even=even, line_R=lines)
                line = greedy(self.costs, holders, self.m, self.memory, policy)
                self.tried += 1
                if line is not None:
                    found.append((orders.value(line)[0], line))
        return found

    def _plays(self, holders: tuple[int, ...], orders: Orders) -> list[tuple[float, list[list[int]], Policy]]:
        """Greedy plays under many policies, the best first."""
        held = [sum(self.costs.held_S[s] for s in range(len(holders)) if holders[s] == r) for r in range(self.ranks)]
        flat = tuple((self.ranks - r) * held[r] for r in range(self.ranks))
        twice = tuple(max(2 * each - held[r], held[r]) for r, each in enumerate(flat))
        aheads = [(self.memory,) * self.ranks, flat, twice]
        found = []
        deeps = (True, False) if len(holders) > self.ranks else (True,)
        firsts: tuple[Literal["turns", "I", "F"], ...] = ("turns", "I", "F")
        choices = itertools.product((0.0, 1.0, 0.5), aheads, firsts, deeps, (0.0, 0.5, 1.0))
        for patience, ahead, first, deep, wait in itertools.islice(choices, self.plays):
            policy = Policy(ahead, first, deep, patience, wait)
            line = greedy(self.costs, holders, self.m, self.memory, policy)
            self.tried += 1
            if line is not None:
                found.append((orders.value(line)[0], line, policy))
        return sorted(found, key=lambda one: one[0])

    def _ahead(
        self, holders: tuple[int, ...], orders: Orders, start: tuple[float, list[list[int]], Policy]
    ) -> tuple[float, list[list[int]]]:
        """The best play with other numbers of microbatches taken ahead, changed device by device."""
        value, line, policy = start
        most = sum(self.costs.held_S) * self.m
        for _ in range(self.plays):
            rank = self.rng.randrange(self.ranks)
            step = self.costs.held_S[rank] * self.rng.choice((-2, -1, 1, 2))
            ahead = list(policy.ahead_R)
            ahead[rank] = min(max(min(ahead[rank], most) + step, self.costs.held_S[rank]), self.memory)
            other = dataclasses.replace(
                policy,
                ahead_R=tuple(ahead),
                patience=self.rng.choice((policy.patience, self.rng.random())),
                wait=self.rng.choice((policy.wait, self.rng.random())),
            )
            played = greedy(self.costs, holders, self.m, self.memory, other)
            self.tried += 1
            if played is not None and (now := orders.value(played)[0]) <= value:
                value, line, policy = now, played, other
        return value, line

    def _split(self, schedule: Schedule) -> list[list[int]]:
        """The schedule's orders as tasks, with B as I and W."""
        count = self.costs.stages * self.m
        orders = []
        for order in schedule.actions:
            line = []
            for action in order:
                for stage, kind, microbatch, _ in action.parts or (action,):
                    task = stage * self.m + (microbatch or 0)
                    line += [task + count * place for place in {"F": (0,), "I": (1,), "W": (2,), "B": (1, 2)}[kind]]
            orders.append(line)
        return orders

    def _schedule(self, orders: list[list[int]], holders: tuple[int, ...], *, fused: bool) -> Schedule:
        """The tasks as a schedule; fused, an I with its W behind it is a B, which saves an action's overhead."""
        count = self.costs.stages * self.m
        actions = []
        for line in orders:
            done: list[Action] = []
            for task in line:
                kind, (stage, m) = "FIW"[task // count], divmod(task % count, self.m)
                if fused and kind == "W" and done and done[-1] == (stage, "I", m, ()):
                    done[-1] = Action(stage, "B", m)
                else:
                    done.append(Action(stage, kind, m))
            actions.append(tuple(done))
        return Schedule("Searched", tuple(actions), holders, self.m)
