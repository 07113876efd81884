"""Keys and values in pages: what a compiled step reads and writes, of texts that come, grow and go."""

import dataclasses
import itertools

import numpy as np
import torch
from torch import Tensor

from turnout.models.decoding.pool import Pool
from turnout.models.lm import LM
from turnout.run.compiled.tables import PAGE
from turnout.run.pages import in_large_pages

__all__ = ["PAGE", "Pages", "Text", "pages_of"]

_NUMBERS = itertools.count(1)


def pages_of(length: int) -> int:
    """How many pages hold so many positions."""
    return -(-length // PAGE)


@dataclasses.dataclass(eq=False)
class Text:
    """A text in pages.

    Args:
        seat: its row in the tables of pages.
        held_G: for each group of layers its pages, in the order of its positions; -1 for one that was given back, or
            was never there.
        length: how many positions are stored.
        near: where its pages would best begin.
        rank: above 0 each of its tokens takes in every routed layer its one expert of this rank
            (``turnout.models.Contrast``); what is stored is then of no use to a text of another rank.
        number: its own, of all texts of this process, from 1.

    Source: none; plain bookkeeping.
    """

    seat: int
    held_G: list[list[int]]
    length: int = 0
    near: int | None = None
    rank: int = 0
    number: int = dataclasses.field(default_factory=_NUMBERS.__next__)


class Pages:
    """For each layer what attention looks at, (heads, slots, width); a page is ``PAGE`` slots of every head.

    That is keys and values; of latent attention latents and the rotated keys that all heads share, side by side in the
    same memory. Layers with the same window have the same tables; one with a window gives pages back that no further
    position sees.

    Args:
        lm: the model.
        counts: how many pages there are for the layers of each window: see ``windows``.
    """

    def __init__(self, lm: LM, counts: list[int]) -> None:
        config, dtype = lm.config, lm.embedding.dtype
        windows = [config.window_of(layer) for layer in range(len(lm.blocks))]
        self.windows = self.windows_of(lm)
        self.group_L = [self.windows.index(window) for window in windows]
        self.latent = None if config.mla is None else config.mla.kv_rank
        heads, width = config.key_heads, config.head_width
        if config.mla is not None:
            heads, width = 1, config.mla.kv_rank + config.mla.rope_dim
        self._shape = heads, width
        self.pools = [Pool(count) for count in counts]
        parts = range(2 if self.latent is None else 1)
        slots = [counts[group] * PAGE for group in self.group_L]
        self._held_L = [
            tuple(torch.empty(heads, size, width, dtype=dtype, device="cpu") for _ in parts) for size in slots
        ]
        in_large_pages(part for held in self._held_L for part in held)
        self.page_GXP = np.full((len(self.windows), 1, 1), -1, np.int64)
        self._seats: list[int] = [0]
        self.moved = 0  # how often memory became another

    @staticmethod
    def windows_of(lm: LM) -> list[int | None]:
        """The windows that layers have, each once: a group of layers each."""
        return list(dict.fromkeys(lm.config.window_of(layer) for layer in range(len(lm.blocks))))

    @staticmethod
    def page_bytes(lm: LM) -> list[int]:
        """For each group of layers what a page of all of them takes."""
        config = lm.config
        each = 2 * config.key_heads * config.head_width
        if config.mla is not None:
            each = config.mla.kv_rank + config.mla.rope_dim
        windows = [config.window_of(layer) for layer in range(len(lm.blocks))]
        size = each * PAGE * lm.embedding.element_size()
        return [windows.count(window) * size for window in Pages.windows_of(lm)]

    @property
    def looked_L(self) -> list[tuple[Tensor, Tensor]]:
        """(heads, slots, width) for each layer what queries meet, and what is summed."""
        if self.latent is None:
            return [(held[0], held[1]) for held in self._held_L]
        return [(held[0], held[0][..., : self.latent]) for held in self._held_L]

    @property
    def pairs_L(self) -> list[tuple[Tensor, Tensor]]:
        """The same as the model's modules have it: keys and values, or latents and rotated keys."""
        if self.latent is None:
            return [(held[0], held[1]) for held in self._held_L]
        return [(held[0][..., : self.latent], held[0][..., self.latent :]) for held in self._held_L]

    @property
    def memory_bytes(self) -> int:
        """What is set aside in all."""
        return sum(part.nbytes for held in self._held_L for part in held)

    def begin(self, near: int | None = None) -> Text:
        """A text without positions."""
        if not self._seats:
            seats = self.page_GXP.shape[1]
            wider = np.full((self.page_GXP.shape[0], 2 * seats, self.page_GXP.shape[2]), -1, np.int64)
            wider[:, :seats] = self.page_GXP
            self.page_GXP, self._seats = wider, list(range(2 * seats - 1, seats - 1, -1))
        return Text(self._seats.pop(), [[] for _ in self.windows], near=near)

    def needed(self, text: Text, end: int, *, steps: bool) -> list[list[int]]:
        """For each group the pages that the text lacks, by their place in it, to hold positions up to ``end``.

        Args:
            text: which.
            end: how many positions it is to have.
            steps: whether each of the new positions is to look at those before it in the pages; otherwise only what
                further ones see need be there.
        """
        found = []
        for window, held in zip(self.windows, text.held_G, strict=True):
            first = 0 if window is None or steps else max(0, end - window + 1) // PAGE
            found.append(list(range(max(len(held), first), pages_of(end))))
        return found

    def extend(self, text: Text, end: int, *, steps: bool) -> bool:
        """Gives it those pages; whether there were enough of them. If not, nothing has changed."""
        if all(len(held) * PAGE >= end for held in text.held_G):  # mostly: a page is for many steps
            return True
        lacking = self.needed(text, end, steps=steps)
        if any(len(places) > pool.free for places, pool in zip(lacking, self.pools, strict=True)):
            return False
        if pages_of(end) > self.page_GXP.shape[2]:
            more = max(pages_of(end), 2 * self.page_GXP.shape[2]) - self.page_GXP.shape[2]
            self.page_GXP = np.pad(self.page_GXP, ((0, 0), (0, 0), (0, more)), constant_values=-1)
        for group, (places, held) in enumerate(zip(lacking, text.held_G, strict=True)):
            for place in places:
                held.extend([-1] * (place - len(held)))
                near = None if text.near is None or held else text.near
                page = self.pools[group].take(held[-1] if held and held[-1] >= 0 else None, near)
                held.append(page)
                self.page_GXP[group, text.seat, place] = page
        return True

    def share(self, text: Text, held_G: list[dict[int, int]], length: int) -> None:
        """Lets a text that has none yet begin with so many positions that lie in these pages, by their place in it."""
        most = pages_of(length)
        if most > self.page_GXP.shape[2]:
            self.page_GXP = np.pad(
                self.page_GXP, ((0, 0), (0, 0), (0, most - self.page_GXP.shape[2])), constant_values=-1
            )
        for group, held in enumerate(held_G):
            text.held_G[group] = [held.get(place, -1) for place in range(most)]
            self.page_GXP[group, text.seat, :most] = text.held_G[group]
            for page in held.values():
                self.pools[group].hold(page)
        text.length = length

    def trim(self, text: Text) -> None:
        """Gives back what no further position of the text sees."""
        for group, (window, held) in enumerate(zip(self.windows, text.held_G, strict=True)):
            if window is None:
                continue
            place = max(0, text.length - window + 1) // PAGE - 1
            while 0 <= place < len(held) and held[place] >= 0:
                self.pools[group].give(held[place])
                held[place], place = -1, place - 1

    def free(self, text: Text) -> None:
        """Gives all of it back; the text is no more."""
        for pool, held in zip(self.pools, text.held_G, strict=True):
            for page in held:
                if page >= 0:
                    pool.give(page)
        text.held_G, text.length = [[] for _ in self.windows], 0
        self._seats.append(text.seat)

    def grow(self, counts: list[int]) -> None:
        """So many pages in each group, what they hold with them."""
        for layer, held in enumerate(self._held_L):
            slots = counts[self.group_L[layer]] * PAGE
            if slots > held[0].shape[1]:
                self._held_L[layer] = tuple(_longer(part, slots) for part in held)
        for pool, count in zip(self.pools, counts, strict=True):
            pool.grow(max(count, pool.count))
        self.moved += 1

    def write(self, text: Text, layer: int, start: int, new_BGSW: tuple[Tensor, Tensor]) -> None:
        """Takes a text's positions from ``start``, as far as there are pages for them."""
        group, end = self.group_L[layer], start + new_BGSW[0].shape[2]
        held = text.held_G[group]
        for slot, first, last in self._stretches(held, start, end):
            for kept, new in zip(self.pairs_L[layer], new_BGSW, strict=True):
                kept[:, slot : slot + last - first] = new[0, :, first - start : last - start]

    def read(self, text: Text, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """(1, heads, positions, width) each, the text's positions from ``start`` to ``end``."""
        parts = self._stretches(text.held_G[self.group_L[layer]], start, end)
        found = []
        for kept in self.pairs_L[layer]:
            some = [kept[:, slot : slot + last - first] for slot, first, last in parts]
            found.append((some[0] if len(some) == 1 else torch.cat(some, 1))[None])
        return found[0], found[1]

    @staticmethod
    def _stretches(held: list[int], start: int, end: int) -> list[tuple[int, int, int]]:
        """Where positions lie after each other: the first slot, and from which position to which."""
        found: list[tuple[int, int, int]] = []
        at = start
        while at < end:
            page, last = held[at // PAGE], min(end, (at // PAGE + 1) * PAGE)
            slot = page * PAGE + at % PAGE
            if page >= 0 and found and found[-1][2] == at and found[-1][0] + at - found[-1][1] == slot:
                found[-1] = (*found[-1][:2], last)
            elif page >= 0:
                found.append((slot, at, last))
            at = last
        return found


def _longer(held_GTW: Tensor, slots: int) -> Tensor:
    heads, before, width = held_GTW.shape
    room = held_GTW.new_empty(heads, slots, width)
    room[:, :before] = held_GTW
    return room
