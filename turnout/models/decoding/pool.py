"""Which pages of a memory are free, and how many hold each of the others."""

import numpy as np

__all__ = ["Pool"]


class Pool:
    """So many pages, by number; one is free when nobody holds it.

    Pages of a text are best next to each other: they are read as one. So a text that begins is given the middle of the
    largest stretch that is free, and goes on from there.

    >>> pool = Pool(4)
    >>> first = pool.take()
    >>> first, pool.take(after=first), pool.free
    (0, 1, 2)
    >>> pool.hold(first), pool.give(first), pool.give(first), pool.free
    (None, None, None, 3)

    Source: Kwon et al., 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention".
    """

    def __init__(self, count: int) -> None:
        self._held = np.zeros(count, np.int64)
        self.free = count

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._held)

    def held(self, page: int) -> int:
        """How many hold it."""
        return int(self._held[page])

    def take(self, after: int | None = None, near: int | None = None) -> int:
        """A free page, held once from here on: the one after another, or this one, if they are free."""
        assert self.free > 0
        wanted = [None if after is None else after + 1, near]
        page = next((one for one in wanted if one is not None and one < self.count and not self._held[one]), None)
        page = self._middle() if page is None else page
        self._held[page] = 1
        self.free -= 1
        return page

    def hold(self, page: int) -> None:
        """Somebody else holds it too."""
        before = self._held[page]
        assert before > 0
        self._held[page] = before + 1

    def give(self, page: int) -> None:
        """Somebody holds it no longer."""
        before = self._held[page]
        assert before > 0
        self._held[page] = before - 1
        self.free += int(before == 1)

    def grow(self, count: int) -> None:
        """So many in all."""
        self.free += count - self.count
        self._held = np.concatenate((self._held, np.zeros(count - self.count, np.int64)))

    def _middle(self) -> int:
        """Of the largest stretch of free pages the middle, or its first where it is the first of all."""
        free = np.concatenate(([0], (self._held == 0).astype(np.int8), [0]))
        change = np.flatnonzero(np.diff(free))
        starts, ends = change[::2], change[1::2]
        which = int((ends - starts).argmax())
        start, end = int(starts[which]), int(ends[which])
        return start if start == 0 else start + (end - start) // 2
