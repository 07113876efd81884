"""Experts on their way into slots: threads read them while passes go on, and whoever waits reads along."""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable
from typing import Literal

__all__ = ["Load", "Loads"]


@dataclasses.dataclass(eq=False)
class Load:
    """One expert that is to come into a slot.

    Args:
        layer: its layer, of those with experts.
        expert: its number there.
        slot: where it goes.
        ahead: whether no pass had asked for it when it set out.

    >>> Load(0, 3, 1, ahead=True).state
    'waits'

    Source: none; plain bookkeeping.
    """

    layer: int
    expert: int
    slot: int
    ahead: bool
    state: Literal["waits", "comes", "there", "failed", "dropped"] = "waits"
    error: BaseException | None = None


class Loads:
    """A queue of loads and the threads that work it off; closing it ends them.

    The threads know nothing of whoever asks, so that what is no longer used can be given up with them.

    Args:
        read: reads the expert of a load into its slot; called by several threads, never twice for one load.
        threads: how many there are, 0 or more; without any, whoever waits reads alone.

    >>> done = []
    >>> loads = Loads(lambda load: done.append(load.expert), threads=0)
    >>> wanted = [Load(0, expert, expert, ahead=False) for expert in (2, 5)]
    >>> loads.put(wanted, urgent=True)
    >>> loads.finish(wanted)
    >>> done
    [2, 5]

    Source: none; a queue with two ends.
    """

    def __init__(self, read: Callable[[Load], object], *, threads: int) -> None:
        self._read = read
        self._queue: collections.deque[Load] = collections.deque()
        self._change = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True, name="experts") for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, loads: Iterable[Load], *, urgent: bool) -> None:
        """Loads to be done in this order, before all others where they are urgent."""
        with self._change:
            if urgent:
                self._queue.extendleft(reversed(list(loads)))
            else:
                self._queue.extend(loads)
            self._change.notify_all()

    def finish(self, loads: Iterable[Load]) -> None:
        """Returns when all of them are there or have failed: does those that nobody has begun, and waits for others."""
        for load in loads:
            if self._begin(load):
                self._do(load)
        with self._change:
            for load in loads:
                while load.state == "comes":
                    self._change.wait()

    def drop(self, load: Load) -> None:
        """Takes back one that nobody waits for; its slot is free when this returns."""
        with self._change:
            if load.state == "waits":
                if load in self._queue:  # else it was never put there
                    self._queue.remove(load)
                load.state = "dropped"
            while load.state == "comes":
                self._change.wait()

    def close(self) -> None:
        """Ends the threads, after what they are reading; what waits is dropped."""
        with self._change:
            self._closed = True
            for load in self._queue:
                load.state = "dropped"
            self._queue.clear()
            self._change.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _begin(self, load: Load) -> bool:
        """Whether it waited, and is the caller's now."""
        with self._change:
            if load.state != "waits":
                return False
            self._queue.remove(load)
            load.state = "comes"
            return True

    def _do(self, load: Load) -> None:
        state: Literal["there", "failed"] = "there"
        try:
            self._read(load)
        except BaseException as error:  # whoever waits for it raises it, in the thread that asked
            load.error, state = error, "failed"
        with self._change:
            load.state = state
            self._change.notify_all()

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._queue and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                load = self._queue.popleft()
                load.state = "comes"
            self._do(load)
