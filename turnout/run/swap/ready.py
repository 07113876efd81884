"""What a compiled step asks between a layer's routing and its experts: which of them are in slots, and in which."""

import ctypes

from turnout.run.swap.experts import ExpertCache

__all__ = ["Ready"]

_WORD = ctypes.c_int64
_CALL = ctypes.CFUNCTYPE(_WORD, *[_WORD] * 5)


class Ready:
    """The function whose address stands in a step's tables (``turnout.run.compiled.feed.brought``).

    Args:
        cache: what it asks.

    Source: none; plain bookkeeping.
    """

    def __init__(self, cache: ExpertCache) -> None:
        errors: list[BaseException] = []

        def ready(layer: int, experts_at: int, count: int, done: int, slots_at: int) -> int:
            """Writes the slots of the first of these experts, and gives how many; 0 where they cannot be had."""
            try:
                count = min(count, cache.limit)
                wanted = (_WORD * count).from_address(experts_at)[:]
                (_WORD * count).from_address(slots_at)[:] = cache.take(layer, wanted, more=done > 0)
            except BaseException as error:  # nothing is raised through compiled code: the step ends, and ``check`` does
                errors.append(error)
                return 0
            return count

        self._errors, self._kept = errors, _CALL(ready)
        self.cache = cache
        self.address = int(ctypes.cast(self._kept, ctypes.c_void_p).value or 0)

    def check(self) -> None:
        """Raises what kept a step from its end.

        Raises:
            TurnoutError: as ``ExpertCache.take``.
        """
        if self._errors:
            error = self._errors.pop()
            self._errors.clear()
            raise error
