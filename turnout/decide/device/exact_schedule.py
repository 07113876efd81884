"""Exact schedule: the least makespan of a small pipeline, by integer programming; what searches are held against."""

import itertools

import numpy as np

from turnout.decide.device.looped import check_counts
from turnout.errors import UsageError, word
from turnout.types.schedule import Action, Schedule
from turnout.types.stage_costs import StageCosts

__all__ = ["exact_schedule"]

_WHERE = "turnout.decide.device.exact_schedule"
_MOST = 60  # tasks; beyond that the program does not end


def exact_schedule(
    costs: StageCosts, microbatches: int, *, memory: float | None = None, seconds: float = 60.0
) -> Schedule:
    """The schedule with the least makespan for a stage on each device, F, I and W apart.

    Microbatches are alike, so that each kind goes in their order on every device; what is open is which of two kinds'
    tasks goes first, a variable of {0, 1} for each such pair of a device.

    Args:
        costs: of p stages, one a device.
        microbatches: m, with 3 p m <= 60.
        memory: the most that a device's microbatches may hold; None for any.
        seconds: the most that it may take.

    Returns:
        The schedule; no other is shorter by more than a millionth.

    Raises:
        UsageError: too large, or not proven in time, or no schedule fits.

    >>> from turnout.solve import pipeline
    >>> pipeline(exact_schedule(StageCosts.even(2), 2), StageCosts.even(2)).makespan
    7.0

    Source: Manne, 1960, "On the Job-Shop Scheduling Problem"; for pipelines Qi et al., 2024, "Zero Bubble Pipeline
    Parallelism", appendix on the integer program. HiGHS solves it.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    check_counts("exact_schedule", costs.stages, microbatches)
    tasks = 3 * costs.stages * microbatches
    if tasks > _MOST:
        fix = "use search, or fewer microbatches"
        raise UsageError(word("3 p m", got=tasks, allowed=f"be at most {_MOST}", where=_WHERE, fix=fix))
    program = _Program(costs, microbatches, float("inf") if memory is None else memory)
    rows, low = program.rows()
    size = tasks + 1 + len(program.pairs)
    integrality = np.r_[np.zeros(tasks + 1), np.ones(len(program.pairs))]
    bounds = Bounds(np.zeros(size), np.r_[np.full(tasks + 1, program.horizon), np.ones(len(program.pairs))])
    aim = np.zeros(size)
    aim[tasks] = 1.0
    options = {"time_limit": seconds, "mip_rel_gap": 1e-6}
    constraint = LinearConstraint(rows, low, np.inf)
    found = milp(aim, integrality=integrality, bounds=bounds, constraints=constraint, options=options)
    if found.status != 0:
        got, fix = str(found.message), "raise memory or seconds, or take fewer microbatches"
        raise UsageError(word("the program", got=got, allowed="be solved", where=_WHERE, fix=fix))
    return program.schedule(found.x)


class _Program:
    """Starts of all tasks, then the makespan, then for each pair of a device whether the first goes first."""

    def __init__(self, costs: StageCosts, microbatches: int, memory: float) -> None:
        self.costs, self.m, self.memory = costs, microbatches, memory
        stages = range(costs.stages)
        self.took: dict[str, tuple[float, ...]] = {"F": costs.forward_S, "I": costs.input_S, "W": costs.weight_S}
        names = itertools.product(stages, list[str]("FIW"), range(microbatches))
        self.number: dict[tuple[int, str, int], int] = {name: place for place, name in enumerate(names)}
        # Of two kinds' tasks the earlier kind of a lower microbatch is before; the other way round it is open.
        self.pairs: dict[tuple[tuple[int, str, int], tuple[int, str, int]], int] = {
            pair: len(self.number) + 1 + place
            for place, pair in enumerate(
                ((s, early, a), (s, late, b))
                for s in stages
                for early, late in (("F", "I"), ("F", "W"), ("I", "W"))
                for a in range(microbatches)
                for b in range(a)
            )
        }
        # Anything done one after the other ends by then.
        self.horizon = sum(self.time(name) for name in self.number) + 2 * costs.stages * costs.send

    def time(self, name: tuple[int, str, int]) -> float:
        return self.took[name[1]][name[0]] + self.costs.overhead

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """(K, size) and (K,): rows that are at least the bounds."""
        rows: list[dict[int, float]] = []
        low: list[float] = []
        for before, after, lag in self._precedences():
            rows.append({self.number[after]: 1.0, self.number[before]: -1.0})
            low.append(self.time(before) + lag)
        for name, task in self.number.items():
            rows.append({len(self.number): 1.0, task: -1.0})
            low.append(self.time(name))
        for (first, second), variable in self.pairs.items():
            a, b = self.number[first], self.number[second]
            rows += [{b: 1.0, a: -1.0, variable: -self.horizon}, {a: 1.0, b: -1.0, variable: self.horizon}]
            low += [self.time(first) - self.horizon, self.time(second)]
        for row, bound in self._memory():
            rows.append(row)
            low.append(bound)
        table = np.zeros((len(rows), len(self.number) + 1 + len(self.pairs)))
        for place, row in enumerate(rows):
            for column, value in row.items():
                table[place, column] = value
        return table, np.array(low)

    def _precedences(self) -> list[tuple[tuple[int, str, int], tuple[int, str, int], float]]:
        found = []
        for s, m in itertools.product(range(self.costs.stages), range(self.m)):
            found += [((s, "F", m), (s, "I", m), 0.0), ((s, "I", m), (s, "W", m), 0.0)]
            found += [((s, kind, m - 1), (s, kind, m), 0.0) for kind in "FIW" if m]
            if s:
                found.append(((s - 1, "F", m), (s, "F", m), self.costs.send))
                found.append(((s, "I", m), (s - 1, "I", m), self.costs.send))
        return found

    def _memory(self) -> list[tuple[dict[int, float], float]]:
        """After each F: what earlier microbatches' I and W have not freed is within the memory."""
        found = []
        for s, m in itertools.product(range(self.costs.stages), range(self.m)):
            if self.memory == float("inf"):
                break
            held, kept = self.costs.held_S[s], self.costs.kept
            row: dict[int, float] = {}
            freed = 0.0
            for b in range(m):
                for kind, share in (("I", 1 - kept), ("W", kept)):
                    row[self.pairs[(s, "F", m), (s, kind, b)]] = -share * held  # 1: the F is before, nothing is freed
                    freed += share * held
            found.append((row, (m + 1) * held - freed - self.memory - 1e-9))
        return found

    def schedule(self, values: np.ndarray) -> Schedule:
        """The schedule of a solution, whose variables say which of two tasks of a device is before."""
        orders = []
        for s in range(self.costs.stages):
            names = [name for name in self.number if name[0] == s]
            # Where a task stands: how many are before it, which precedences and pairs say without rounding.
            place = dict.fromkeys(names, 0)
            for one, other in itertools.combinations(names, 2):
                place[other if self._before(one, other, values) else one] += 1
            orders.append(tuple(Action(s, kind, m) for _, kind, m in sorted(names, key=place.__getitem__)))
        return Schedule("Exact", tuple(orders), tuple(range(self.costs.stages)), self.m)

    def _before(self, one: tuple[int, str, int], other: tuple[int, str, int], values: np.ndarray) -> bool:
        if one[1] == other[1]:
            return one[2] < other[2]
        if "FIW".index(one[1]) > "FIW".index(other[1]):
            return not self._before(other, one, values)
        pair = (one, other)
        return bool(values[self.pairs[pair]] > 0.5) if pair in self.pairs else True
