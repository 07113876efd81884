"""Keys and values of rows of unequal lengths, set aside in advance: what a compiled step reads and writes."""

import torch
from torch import Tensor

from turnout.models.lm import LM

__all__ = ["Rings", "Taken"]

# Room grows by so many positions at least, and by a quarter: what has been copied stays a share of what was written.
_PAGE = 64


class Rings:
    """For each layer keys and values (B, heads, slots, width): position p of a row lies in slot p.

    A layer with a window keeps no more than that many: position p lies in slot p mod window, where the position that it
    no longer sees was. The order of slots is of no meaning to attention.
    """

    def __init__(self, lm: LM, batch: int, room: int) -> None:
        config, dtype = lm.config, lm.embedding.dtype
        self.windows = [config.window_of(layer) for layer in range(len(lm.blocks))]
        self.room = min(-(-room // _PAGE) * _PAGE, config.max_seq)
        self._most = config.max_seq
        self.pairs_L: list[tuple[Tensor, Tensor]] = []
        for window in self.windows:
            shape = (batch, config.key_heads, self.slots(window), config.head_width)
            self.pairs_L.append((torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)))

    def slots(self, window: int | None) -> int:
        """How many a layer has."""
        return self.room if window is None else min(window, self.room)

    @property
    def memory_bytes(self) -> int:
        """What is set aside in all."""
        return sum(part.numel() * part.element_size() for pair in self.pairs_L for part in pair)

    def grow(self, end: int) -> bool:
        """Makes room for ``end`` positions a row; whether anything moved."""
        if end <= self.room:
            return False
        self.room = min(max(end, self.room + max(_PAGE, self.room // 4)), self._most)
        for layer, (window, (keys, values)) in enumerate(zip(self.windows, self.pairs_L, strict=True)):
            if self.slots(window) > keys.shape[2]:
                self.pairs_L[layer] = self._grown(keys, window), self._grown(values, window)
        return True

    def _grown(self, held_BGSW: Tensor, window: int | None) -> Tensor:
        batch, heads, before, width = held_BGSW.shape
        room = held_BGSW.new_empty(batch, heads, self.slots(window), width)
        room[:, :, :before] = held_BGSW
        return room

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        self.pairs_L = [(keys[row_N], values[row_N]) for keys, values in self.pairs_L]

    def fill(self, layer: int, new_BGSW: tuple[Tensor, Tensor], length_B: list[int]) -> None:
        """Takes the first positions of each row, padding after them."""
        window, end = self.windows[layer], new_BGSW[0].shape[2]
        for held_BGSW, new in zip(self.pairs_L[layer], new_BGSW, strict=True):
            if window is None or end <= window:
                held_BGSW[:, :, :end] = new
                continue
            for row, length in enumerate(length_B):
                place_S = torch.arange(max(0, length - window), length)
                held_BGSW[row][:, place_S % window] = new[row][:, place_S]


class Taken:
    """What a model's first forward pass takes for a ``Cache``: it puts keys and values into rings."""

    def __init__(self, rings: Rings, length_B: list[int]) -> None:
        self.length = 0
        self.real_BP: Tensor | None = None
        self._rings, self._length_B = rings, length_B

    def update(self, layer: int, a_BHSP: Tensor, b_BHSP: Tensor) -> tuple[Tensor, Tensor]:
        """The same, which is all that there is yet."""
        self._rings.fill(layer, (a_BHSP, b_BHSP), self._length_B)
        return a_BHSP, b_BHSP

    def advance(self, count: int, real_BP: Tensor | None = None) -> "Taken":
        """Nothing comes after it."""
        self.length, self.real_BP = self.length + count, real_BP
        return self
