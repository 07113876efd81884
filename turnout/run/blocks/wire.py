"""The thread that issues a process group's collectives, in the order that a plan gives; a wire made slow on purpose."""

import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from turnout.errors import UsageError, word

__all__ = ["Board", "Slow", "Wire"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Slow:
    """How much longer than it takes something is made to take: alpha + beta x, in seconds; for trials of schedules.

    A machine with fewer cores than ranks shows no overlap of what computes, but it does of what sleeps.

    Args:
        alpha_s: of each.
        beta_s: of each unit, a byte of a message or a row of a task.

    Raises:
        UsageError: a number below 0.

    >>> Slow(0.001, 1e-6)(500)
    0.0015

    Source: none; the alpha-beta model of Hockney, 1994.
    """

    alpha_s: float = 0.0
    beta_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha_s", "beta_s"):
            if not getattr(self, name) >= 0:
                fix = f"pass {name}=0 for none"
                raise UsageError(
                    word(name, got=getattr(self, name), allowed="be at least 0", where="turnout.run.Slow", fix=fix)
                )

    def __call__(self, units: float) -> float:
        """Seconds for so many units."""
        return self.alpha_s + self.beta_s * units

    def sleep(self, units: float) -> None:
        """Waits that long, without holding anything up that does not wait for it."""
        seconds = self(units)
        if seconds > 0:
            time.sleep(seconds)


class Board:
    """Which tasks of a pass are done, and when each began and ended; threads wait here for each other.

    >>> board = Board()
    >>> board.run("a", (), lambda: 3)
    3
    >>> board.wait(["a"]), sorted(board.times)
    (None, ['a'])

    Source: none; a condition variable.
    """

    def __init__(self) -> None:
        self.times: dict[Hashable, tuple[float, float]] = {}
        self._change = threading.Condition()
        self._failure: BaseException | None = None

    def wait(self, tasks: Iterable[Hashable]) -> None:
        """Returns once all of them are done.

        Raises:
            BaseException: what stopped another thread of this pass, so that none waits for it for ever.
        """
        wanted = tuple(tasks)
        with self._change:
            self._change.wait_for(lambda: self._failure is not None or all(task in self.times for task in wanted))
            if self._failure is not None:
                raise self._failure

    def is_done(self, tasks: Iterable[Hashable]) -> bool:
        """Whether all of them are done, without waiting."""
        return all(task in self.times for task in tasks)

    def wait_either(self, tasks: Iterable[Hashable], others: Iterable[Hashable]) -> None:
        """Returns once all of the ones are done, or all of the others.

        Raises:
            BaseException: as ``wait``.
        """
        one, other = tuple(tasks), tuple(others)
        with self._change:
            self._change.wait_for(lambda: self._failure is not None or self.is_done(one) or self.is_done(other))
            if self._failure is not None:
                raise self._failure

    def run(self, task: Hashable, needs: Iterable[Hashable], work: Callable[[], T]) -> T:
        """Does a task's work once what it needs is done, and says so."""
        self.wait(needs)
        began = time.perf_counter()
        result = work()
        with self._change:
            self.times[task] = (began, time.perf_counter())
            self._change.notify_all()
        return result

    def fail(self, error: BaseException) -> None:
        """Nobody need wait any longer."""
        with self._change:
            self._failure = self._failure or error
            self._change.notify_all()


Job = tuple[Hashable, Sequence[Hashable], Callable[[], int]]


class Wire:
    """One thread that does what goes over a wire, one thing after another, in the order that it is given.

    Process groups pair their collectives by the order in which they are issued: so whatever uses one group is issued
    here, by this thread alone, in an order that is the same on every rank.

    Args:
        slow: how much longer each task takes than it does, by its bytes; None for no longer.

    >>> wire, board = Wire(), Board()
    >>> done = wire.play([("a", (), lambda: 8), ("b", ("a",), lambda: 8)], board)
    >>> done.result(), list(board.times)
    (None, ['a', 'b'])

    Source: none; what Shi et al., 2024, "ScheMoE", and Gao et al., 2025, "FlowMoE", leave to flags between threads.
    """

    def __init__(self, *, slow: Slow | None = None) -> None:
        self.slow = slow
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="turnout-wire")

    def play(self, jobs: Sequence[Job], board: Board) -> Future[None]:
        """Starts on (task, what it needs, the work, which gives its bytes) one after another, and returns at once."""
        return self._thread.submit(self._play, jobs, board)

    def _play(self, jobs: Sequence[Job], board: Board) -> None:
        try:
            for task, needs, work in jobs:
                board.run(task, needs, lambda work=work: self._slowed(work))
        except BaseException as error:
            board.fail(error)
            raise

    def _slowed(self, work: Callable[[], int]) -> None:
        moved = work()
        if self.slow is not None:
            self.slow.sleep(moved)

    def close(self) -> None:
        """Ends the thread once it has nothing to do."""
        self._thread.shutdown(wait=False)
