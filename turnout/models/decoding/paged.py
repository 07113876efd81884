"""The compiled step over texts in pages, and their prompts: each has the bits that it has alone."""

import itertools
from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from turnout.models.decoding.chunk import Chunk, read_chunk
from turnout.models.decoding.entries import Entries
from turnout.models.decoding.pages import Pages, Text
from turnout.models.lm import LM
from turnout.run.compiled.engine import threads
from turnout.run.compiled.formats import blocks
from turnout.run.compiled.kept import Kept
from turnout.run.compiled.step import step
from turnout.run.compiled.tables import CODES, INS, OUTS

__all__ = ["PagedSteps"]

# Up to so many tokens the end of a prompt is read by the compiled step; beyond, torch's products in 16 bits win.
# AMD Zen 4, 32 tokens over the modules' time: mixtures 0.62 to 0.92, a dense model 0.67 in fp32 and 0.98 in bf16.
_FEW, _FEW_SHORT = 64, 32
# A layer of so few products a token costs modules more to call than to compute: all ends of prompts are read by steps.
# Intel Cascade Lake, the demo's model of 100,000, 128 tokens: 13 ms by the step and 24 by the modules.
_SMALL = 1 << 18
# Prompts are read in parts of so many positions, the last of what is left: whole pages.
CHUNK = 256
# The room for scores grows by so many positions.
_SEEN = 512


class PagedSteps:
    """Reads texts of one model that ``why_plain`` has nothing against.

    What comes of a text depends on its own tokens alone, to the bit: a prompt is read in parts between fixed positions,
    each by itself and in a way that its length decides; and a row of a step has the same bits whoever stands beside it.

    Of longrope all texts are on the same side of its border (``turnout.models.decoding.sides`` sees to that), and each
    prompt is one part.

    Args:
        lm: the model, as it is now.
        pages: its memory.
    """

    def __init__(self, lm: LM, pages: Pages) -> None:
        self.lm, self.pages, self.entries = lm, pages, Entries(lm)
        self.is_small = _is_small(lm)
        self.few = _few(lm, self.is_small)
        self.chunk = CHUNK if lm.rope.border is None else lm.config.max_seq
        layers = self.entries.layers
        layers["group"] = pages.group_L
        self.routed_L = np.flatnonzero(layers["routed"])
        self._told_LI: np.ndarray | None = None
        self._rows, self._seen, self._parts, self._moved = 0, 0, 0, -1

    def tell_routes(self) -> None:
        """From here on each step says which experts its rows take."""
        self._told_LI, self._rows = np.zeros((len(self.routed_L), 0), np.int64), 0

    def parts_of(self, start: int, end: int) -> list[tuple[int, int]]:
        """How the tokens of a prompt between these positions are read, of which the first begins a part."""
        bounds = [*range(start, end, self.chunk), end]
        return list(itertools.pairwise(bounds))

    def is_short(self, count: int) -> bool:
        """Whether a part of so many tokens is read by the compiled step."""
        return count <= self.few

    def read(self, text: Text, id_S: Sequence[int]) -> Generator[None, None, Chunk]:
        """Reads a part that is not short with the model's modules, half a layer at a time; pages are there already."""
        return read_chunk(self.lm, self.pages, text, id_S)

    def step(self, texts: Sequence[Text], id_RN: Sequence[Sequence[int]]) -> Tensor:
        """(B, V) the scores after some more tokens of each text, for which there are pages; all in one call.

        The memory is the next step's too.
        """
        counts = [len(id_N) for id_N in id_RN]
        each = list(zip(texts, counts, strict=True))
        end_B, rows = np.array([*itertools.accumulate(counts)], np.int64), sum(counts)
        self._make_room(rows, max(text.length + n for text, n in each))
        # Lists first: for few rows numpy costs more to call than to compute.
        place_R = np.array([place for text, n in each for place in range(text.length, text.length + n)], np.int64)
        seat_R = np.array([text.seat for text, n in each for _ in range(n)], np.int64)
        rank_R = np.array([text.rank for text, n in each for _ in range(n)], np.int64)
        page_GRP = np.ascontiguousarray(self.pages.page_GXP[:, seat_R])
        id_R = np.array([one for id_N in id_RN for one in id_N], np.int64)
        logits_BV, entries = self._logits_RV[: len(texts)], self.entries
        told = entries.models, entries.layers, entries.norms, entries.matrices
        with entries.turn(id_R, texts[0].number if len(texts) == 1 else 0):
            step(*told, id_R, place_R, page_GRP, rank_R, end_B - 1, *self._rooms, logits_BV.numpy(), self._parts)
        for text, count in zip(texts, counts, strict=True):
            text.length += count
        return logits_BV

    def routes(self, rows: int) -> list[np.ndarray]:
        """(rows, K) for each routed layer, the experts that the rows of the last step took, by the router's numbers."""
        assert self._told_LI is not None
        most_L = self.entries.layers["top_k"][self.routed_L]
        return [told_I[: rows * k].reshape(rows, k) for told_I, k in zip(self._told_LI, most_L, strict=True)]

    def _make_room(self, rows: int, seen: int) -> None:
        """Says where the memory is, and sets aside room for what a step writes between weights."""
        if self._moved != self.pages.moved:
            self._point()
        if rows <= self._rows and seen <= self._seen and self._parts == threads():
            return
        self._rows, self._parts = max(rows, self._rows), threads()
        self._seen = max(self._seen, -(-seen // _SEEN) * _SEEN)
        most = max(1, int(self.entries.layers["top_k"].max()))
        numbers = torch.zeros(self._numbers(self._rows), dtype=torch.float32, device="cpu").numpy()
        self._rooms = numbers, np.zeros(self._rows * most * 5 + 1, np.int64)
        if self._told_LI is not None:
            self._told_LI = np.zeros((len(self.routed_L), self._rows * most), np.int64)
            for layer, told_I in zip(self.routed_L, self._told_LI, strict=True):
                self.entries.layers["routes"][layer] = told_I.ctypes.data
        self._logits_RV = torch.empty(self._rows, self.lm.config.vocab_size, dtype=torch.float32, device="cpu")

    def _point(self) -> None:
        layers, table, self._kept = self.entries.layers, self.entries.matrices, Kept()
        for layer, (keys, values) in zip(layers, self.pages.looked_L, strict=True):
            table[layer["keys"]], table[layer["values"]] = self._kept.slots(keys, values)
            layer["cache_code"], layer["slots"] = CODES[keys.dtype], keys.shape[1]
        self._moved = self.pages.moved

    def _numbers(self, rows: int) -> int:
        """How many a step writes between weights."""
        model, layers, table = self.entries.models[0], self.entries.layers, self.entries.matrices
        width = self.lm.config.width
        looking = feeding = rows * blocks(width)  # for the output layer
        for layer in layers:
            looking = max(looking, self._numbers_looking(layer, rows))
            most = max(1, int(layer["top_k"]))
            for up, down in (("up", "down"), ("shared_up", "shared_down")):
                wide, hidden = int(table[layer[up], OUTS]), int(table[layer[down], INS])
                each = 2 + width + blocks(width) + wide + blocks(hidden)
                feeding = max(feeding, rows * most * each)
            routes = int(table[layer["router"], OUTS]) if layer["routed"] else 0
            feeding = max(feeding, rows * (2 * most + routes + blocks(width)))
        return rows * (3 * width + 4 * int(model["pairs"])) + max(looking, feeding)

    def _numbers_looking(self, layer: np.void, rows: int) -> int:
        """The same of a layer's attention."""
        table, config, parts = self.entries.matrices, self.lm.config, self._parts
        heads, out = int(layer["heads"]), int(table[layer["out"], INS])
        laid = rows * blocks(max(config.width, out))
        if layer["latent"]:
            latent, wide = int(layer["latent"]), int(layer["head_width"])
            rank = int(table[layer["q_down"], OUTS]) if layer["q_down"] >= 0 else 0
            made = rank + int(table[layer["q_up"], OUTS]) + wide + heads * (wide + latent) + out
            laid = max(laid, rows * blocks(rank), parts * rows * blocks(latent))
        else:
            wide, made = config.head_width, int(table[layer["qkv"], OUTS]) + out
            heads //= int(layer["key_heads"])
        return rows * made + max(laid, parts * heads * (self._seen + blocks(wide)))


def _is_small(lm: LM) -> bool:
    """Whether a layer's products of a token cost little beside the calls around them."""
    config, flops = lm.config, lm.cost(seq=1).flops
    return flops is not None and flops / 2 - config.width * config.vocab_size <= _SMALL * config.layers


def _few(lm: LM, is_small: bool) -> int:
    """Up to how many tokens the compiled step reads the end of a prompt: the model decides it, not the machine."""
    if is_small:
        return CHUNK - 1
    return _FEW if lm.embedding.dtype == torch.float32 else _FEW_SHORT
