"""How long a scheme takes when workers straggle: rounds are ended by the master, early where the code bears it."""

import dataclasses

import numpy as np

from turnout.errors import ShapeError, UsageError, word
from turnout.train.coding.sequential import Scheme

__all__ = ["Race", "gilbert_elliot", "race"]

_WHERE = "turnout.train.coding"


@dataclasses.dataclass(frozen=True, eq=False)
class Race:
    """What a run took.

    Args:
        total_s: all rounds together.
        waited: in how many rounds the master waited for everyone.
        missed: answers that were not waited for.

    >>> Race(1.0, 0, 3).missed
    3

    Source: none; plain bookkeeping.
    """

    total_s: float
    waited: int
    missed: int


def gilbert_elliot(workers: int, rounds: int, *, begin: float, end: float, seed: int) -> np.ndarray:
    """(rounds, workers), whether a worker straggles: a chain of two states for each, from its stationary state.

    Args:
        workers: how many.
        rounds: how many.
        begin: the chance that one who does not straggles in the next round, from 0 to 1.
        end: the chance that one who does no longer does, above 0 to 1; 1 / end rounds is the mean length.
        seed: of the chance.

    Raises:
        UsageError: a chance out of range.

    >>> late = gilbert_elliot(1000, 50, begin=0.05, end=0.5, seed=0)
    >>> late.shape, bool(abs(late.mean() - 0.05 / 0.55) < 0.01)
    ((50, 1000), True)

    Source: Gilbert, 1960, "Capacity of a Burst-Noise Channel"; Elliott, 1963.
    """
    if not (0 <= begin <= 1 and 0 < end <= 1):
        got, fix = f"begin={begin}, end={end}", "pass begin=0.05, end=0.5"
        where = f"{_WHERE}.gilbert_elliot"
        raise UsageError(word("the chances", got=got, allowed="be from 0 to 1, end above 0", where=where, fix=fix))
    chance = np.random.default_rng(seed)
    late_W = chance.random(workers) < begin / (begin + end)
    rows = []
    for _ in range(rounds):
        rows.append(late_W)
        late_W = np.where(late_W, chance.random(workers) >= end, chance.random(workers) < begin)
    return np.stack(rows)


def race(
    scheme: Scheme,
    slowdown_RW: np.ndarray,
    *,
    fixed_s: float,
    work_s: float,
    patience: float = 1.0,
) -> Race:
    """Plays all rounds; the scheme is played in place, and its gradients can be asked for afterwards.

    A worker takes (fixed + work x load) x its slowdown. The master looks after (1 + patience) x the fastest worker's
    time: if the scheme bears the loss of those who are late, the round ends there (or with the last, where none is
    late), else with the slowest worker of all.

    Args:
        scheme: new.
        slowdown_RW: (rounds, n), at least 1; rounds are jobs and the scheme's delay.
        fixed_s: of a round, whatever the load.
        work_s: for all data of a job, on one worker.
        patience: mu, above 0.

    Raises:
        ShapeError: slowdowns for other workers.

    >>> from turnout.train.coding import Coded
    >>> slow = np.ones((3, 4)); slow[1, 2] = 9.0
    >>> [race(Coded(4, s), slow, fixed_s=0.0, work_s=4.0).total_s for s in (0, 1)]
    [11.0, 8.0]

    Source: Krishnan, Ebrahimi & Khisti, 2023, "Sequential Gradient Coding For Straggler Mitigation".
    """
    if slowdown_RW.ndim != 2 or slowdown_RW.shape[1] != scheme.workers:
        got, allowed = f"{slowdown_RW.shape}", f"be (rounds, {scheme.workers})"
        fix = "make them for as many workers as the scheme has"
        raise ShapeError(word("slowdown_RW", got=got, allowed=allowed, where=f"{_WHERE}.race", fix=fix))
    total, waited, missed = 0.0, 0, 0
    for slow_W in slowdown_RW:
        time_W = (fixed_s + work_s * scheme.load) * slow_W
        look = (1 + patience) * float(time_W.min())
        late_W = time_W > look
        if late_W.any() and not scheme.bears(late_W):
            late_W, waited = np.zeros_like(late_W), waited + 1
            total += float(time_W.max())
        else:
            total += look if late_W.any() else float(time_W.max())
        missed += int(late_W.sum())
        scheme.take(late_W)
    return Race(total, waited, missed)
