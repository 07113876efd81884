"""Keys and values of rows of unequal lengths, set aside in advance: what a compiled step reads and writes."""

import torch
from torch import Tensor

from turnout.models.lm import LM
from turnout.run.pages import in_large_pages

__all__ = ["Rings", "Taken"]

# Room grows by so many positions at least, and by a quarter: what has been copied stays a share of what was written.
_PAGE = 64


class Rings:
    """For each layer what attention looks at, (B, heads, slots, width): position p of a row lies in slot p.

    That is keys and values; of latent attention latents and the rotated keys that all heads share, side by side in the
    same memory. A layer with a window keeps no more than that many: position p lies in slot p mod window, where the
    position that it no longer sees was. The order of slots is of no meaning to attention.
    """

    def __init__(self, lm: LM, batch: int, room: int) -> None:
        config, dtype = lm.config, lm.embedding.dtype
        self.windows = [config.window_of(layer) for layer in range(len(lm.blocks))]
        self.room = min(-(-room // _PAGE) * _PAGE, config.max_seq)
        self._most, self.latent = config.max_seq, None if config.mla is None else config.mla.kv_rank
        heads, width = config.key_heads, config.head_width
        if config.mla is not None:
            heads, width = 1, config.mla.kv_rank + config.mla.rope_dim
        shapes = [(batch, heads, self.slots(window), width) for window in self.windows]
        self._held_L = [tuple(torch.empty(shape, dtype=dtype, device="cpu") for _ in self._parts) for shape in shapes]
        in_large_pages(part for held in self._held_L for part in held)

    @property
    def _parts(self) -> range:
        """The memories of a layer."""
        return range(2 if self.latent is None else 1)

    @property
    def pairs_L(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer keys and values, or latents and rotated keys."""
        if self.latent is None:
            return [(held[0], held[1]) for held in self._held_L]
        return [(held[0][..., : self.latent], held[0][..., self.latent :]) for held in self._held_L]

    @property
    def looked_L(self) -> list[tuple[Tensor, Tensor]]:
        """(B · heads, slots, width) for each layer what queries meet, and what is summed."""
        if self.latent is None:
            return [(held[0].flatten(0, 1), held[1].flatten(0, 1)) for held in self._held_L]
        both_L = [held[0].flatten(0, 1) for held in self._held_L]
        return [(both, both[..., : self.latent]) for both in both_L]

    def slots(self, window: int | None) -> int:
        """How many a layer has."""
        return self.room if window is None else min(window, self.room)

    def hold(self, length: int) -> bool:
        """Whether every layer has a slot for each of so many positions."""
        return all(length <= self.slots(window) for window in self.windows)

    @property
    def memory_bytes(self) -> int:
        """What is set aside in all."""
        return sum(part.nbytes for held in self._held_L for part in held)

    def grow(self, end: int) -> bool:
        """Makes room for ``end`` positions a row; whether anything moved."""
        if end <= self.room:
            return False
        self.room = min(max(end, self.room + max(_PAGE, self.room // 4)), self._most)
        for layer, (window, held) in enumerate(zip(self.windows, self._held_L, strict=True)):
            if self.slots(window) > held[0].shape[2]:
                self._held_L[layer] = tuple(self._grown(part, window) for part in held)
        return True

    def _grown(self, held_BGSW: Tensor, window: int | None) -> Tensor:
        batch, heads, before, width = held_BGSW.shape
        room = held_BGSW.new_empty(batch, heads, self.slots(window), width)
        room[:, :, :before] = held_BGSW
        return room

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        self._held_L = [tuple(part[row_N] for part in held) for held in self._held_L]

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
