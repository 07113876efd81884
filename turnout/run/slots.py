"""Slots: the experts of a layer where not all of them are in memory at once, as executors see them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from turnout.types import ExpertWeights, Packed, PackedWeights

__all__ = ["Slots"]

_Stack = Tensor | Packed


@dataclasses.dataclass(eq=False)
class Slots:
    """The experts of one layer's pass. Executors ask for some of them in ascending order, and use the slots.

    Which executor runs, and how it groups rows, is decided by ``like``: as it would be with all experts in memory, so
    that the results are the same to the bit.

    Args:
        like: all E experts as they would be in memory; of the matrices nothing but shape, strides and dtype is true.
        held: the slots, in the same order of axes.
        limit: how many experts can be asked for at once.
        take: (experts, more) -> their slots, which stay until it is called again; ``more`` in the same pass.

    >>> weights = ExpertWeights(torch.zeros(4, 3, 8), torch.zeros(4, 4, 3))
    >>> slots = Slots(weights, weights, limit=2, take=lambda experts, more: [e % 2 for e in experts])
    >>> [(slice_, there) for slice_, there in slots.some([0, 1, 3])]
    [(slice(0, 2, None), [0, 1]), (slice(2, 3, None), [1])]

    Source: none; plain bookkeeping.
    """

    like: ExpertWeights | PackedWeights
    held: ExpertWeights | PackedWeights
    limit: int
    take: Callable[[list[int], bool], list[int]]
    _last: tuple[list[int], list[int]] | None = None

    @property
    def whole(self) -> ExpertWeights:
        """``like`` of experts that are in no few bits."""
        assert isinstance(self.like, ExpertWeights)
        return self.like

    def some(self, experts: Sequence[int]) -> Iterator[tuple[slice, list[int]]]:
        """Which of them are there, and in which slots: as many at a time as fit."""
        for start in range(0, len(experts), self.limit):
            now = list(experts[start : start + self.limit])
            yield slice(start, start + len(now)), self._there(now)

    def _there(self, experts: list[int]) -> list[int]:
        if self._last is None or self._last[0] != experts:
            self._last = experts, self.take(experts, self._last is not None)
        return self._last[1]

    def stack(self, stack: _Stack) -> _Stack:
        """The slots' matrices of a stack of ``like``."""
        like, held = self.like, self.held
        if isinstance(like, PackedWeights) and isinstance(held, PackedWeights):
            return held.up if stack is like.up else held.down
        assert isinstance(like, ExpertWeights) and isinstance(held, ExpertWeights)
        return held.up_EDH if stack is like.up_EDH else held.down_EFD

    def place(self, experts: Sequence[int], slots: Sequence[int]) -> Tensor:
        """(E,) the slot of each of these experts, -1 of others."""
        place_E = torch.full((self.like.num_experts,), -1, dtype=torch.int64, device="cpu")
        place_E[torch.tensor(experts)] = torch.tensor(slots)
        return place_E

    def gathered(self, stack: _Stack, experts: Sequence[int]) -> Tensor:
        """A copy of these experts' matrices, one after the other, in the strides of ``stack``."""
        held = self.stack(stack)
        assert isinstance(held, Tensor)
        parts = [held.transpose(1, 2)[torch.tensor(slots)] for _, slots in self.some(experts)]
        return torch.cat(parts).transpose(1, 2)

    def written_out(self, dtype: torch.dtype, expert_N: Tensor | None = None) -> ExpertWeights:
        """As ``PackedWeights.written_out``."""
        like, held = self.like, self.held
        assert isinstance(like, PackedWeights) and isinstance(held, PackedWeights)
        index_N = torch.arange(like.num_experts) if expert_N is None else expert_N
        parts = [held.written_out(dtype, torch.tensor(slots)) for _, slots in self.some(index_N.tolist())]
        biases = (None if bias is None else bias[index_N].to(dtype) for bias in (like.up_bias_EH, like.down_bias_ED))
        up, down = (
            torch.cat([pair[which].transpose(1, 2) for pair in ((one.up_EDH, one.down_EFD) for one in parts)])
            for which in (0, 1)
        )
        return ExpertWeights(up.transpose(1, 2), down.transpose(1, 2), *biases, activation=like.activation)
