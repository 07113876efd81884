"""Blocks of memory lent out again and again, each to one borrower at a time. Knows neither torch nor numpy."""

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Pool"]


class Pool:
    """Lends blocks of memory; a block is idle once its loan has ended, and is never guessed to be.

    A loan is an object of its own, a memoryview of the block. Whatever lies in the block holds the loan: the storage of
    a tensor made from it does, and through the storage every view, every detached or saved tensor and every numpy
    array of it. When the last of them goes so does the loan, and only its end puts the block back. No reference is
    counted, since what a count says differs between versions of Python: arguments are borrowed from 3.14 on, and
    threads without a global lock count apart.

    An idle block is in the queue and nowhere else: whoever takes it out owns it. So there is no lock that a thread, a
    fork, a signal or a collection of garbage in the middle of ``lend`` could find taken.

    Args:
        make: gives a new block of at least so many bytes, writable through the buffer protocol.
        patience: a block that has lain idle for this many loans goes back to the system.

    >>> pool = Pool(bytearray, patience=4)
    >>> first = pool.lend(8)
    >>> second = pool.lend(8)
    >>> second.obj is first.obj
    False
    >>> block = first.obj
    >>> del first
    >>> pool.lend(8).obj is block
    True

    Source: none; leases as everywhere, ended by weakref.finalize.
    """

    def __init__(self, make: Callable[[int], Any], *, patience: int) -> None:
        self._make, self._patience = make, patience
        self._idle: deque[tuple[Any, int]] = deque()  # blocks that nobody uses, and the loans that used them last
        self._loans = itertools.count()

    @property
    def idle_bytes(self) -> int:
        """What lies idle."""
        return sum(memoryview(block).nbytes for block, _ in tuple(self._idle))

    def lend(self, size: int) -> memoryview:
        """A block of at least ``size`` bytes and not an eighth more, or a new one, until nothing holds the loan."""
        loan, found, rest = next(self._loans), None, []
        while self._idle:
            try:
                block, last = self._idle.popleft()
            except IndexError:  # another thread took the last one
                break
            if found is None and size <= len(block) <= size + size // 8:
                found = block
            elif loan - last <= self._patience:
                rest.append((block, last))
        self._idle.extend(rest)
        lent = memoryview(self._make(size) if found is None else found)
        # The finalizer holds the block; at the end of the process it does not run, since threads may still compute.
        end: Any = weakref.finalize(lent, self._idle.append, (lent.obj, loan))
        end.atexit = False
        return lent
