"""Who is next: those that wait, the oldest of each tenant, and the tenants in turn."""

from collections import deque
from collections.abc import Iterator

from turnout.serve.engine.answer import Answer

__all__ = ["Turns"]


class Turns:
    """Requests that wait for a slot. One that had to give its slot up goes before all others.

    Source: Nagle, 1987, "On Packet Switches with Infinite Storage" (a queue for each, served in turn).
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Answer]] = {}
        self._again: list[Answer] = []

    def __len__(self) -> int:
        return len(self._again) + sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Answer]:
        yield from self._again
        for queue in self._queues.values():
            yield from queue

    def add(self, answer: Answer) -> None:
        """It waits behind its tenant's others."""
        self._queues.setdefault(answer.request.tenant, deque()).append(answer)

    def again(self, answer: Answer) -> None:
        """It waits before all others, the older ones first."""
        self._again.append(answer)
        self._again.sort(key=lambda one: one.ticket.number)

    def first(self) -> Answer | None:
        """Whose turn it is; None where nobody waits."""
        if self._again:
            return self._again[0]
        return next((queue[0] for queue in self._queues.values()), None)

    def take(self, answer: Answer) -> None:
        """It waits no longer; its tenant comes after all other tenants."""
        if answer in self._again:
            self._again.remove(answer)
            return
        tenant = answer.request.tenant
        queue = self._queues.pop(tenant)
        queue.remove(answer)
        if queue:
            self._queues[tenant] = queue
