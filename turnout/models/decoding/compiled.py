"""Decoding by the compiled step: prompts through the model, every further token in one call."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnout.models.decoding.entries import Entries
from turnout.models.decoding.ring import Rings, Taken
from turnout.models.lm import LM
from turnout.run.compiled.engine import threads
from turnout.run.compiled.formats import blocks
from turnout.run.compiled.kept import Kept
from turnout.run.compiled.step import step
from turnout.run.compiled.tables import CODES, INS, OUTS

__all__ = ["CompiledSteps"]


class CompiledSteps:
    """Prompts and steps for a model that ``why_plain`` has nothing against.

    Of longrope all rows are on the same side of its border; ``turnout.models.decoding.sides`` sees to that.
    """

    def __init__(self, lm: LM, batch: int, room: int) -> None:
        self._lm, self._entries, self._rings = lm, Entries(lm), Rings(lm, batch, room)
        self._begin(batch)

    def _begin(self, batch: int) -> None:
        """Sets aside what a step writes to."""
        self._logits_BV = torch.empty(batch, self._lm.config.vocab_size)
        self._place_B = np.zeros(batch, np.int64)
        self._point()

    def _point(self) -> None:
        """Says where the caches are, and sets aside room for sums between weights."""
        self._parts = threads()
        layers, table, kept = self._entries.layers, self._entries.matrices, Kept()
        for layer, (keys, values) in zip(layers, self._rings.looked_L, strict=True):
            table[layer["keys"]] = kept.matrix(keys, by_input=False)
            table[layer["values"]] = kept.matrix(values.transpose(1, 2), by_input=True)
            layer["cache_code"] = CODES[keys.dtype]
        self._room_F = torch.zeros(self._numbers(self._parts))
        self._room_I = np.zeros(len(self._place_B) * max(1, int(layers["top_k"].max())) * 4 + 1, np.int64)

    def _numbers(self, parts: int) -> int:
        """How many a step writes between weights, when it is shared by so many threads."""
        model, layers, table = self._entries.models[0], self._entries.layers, self._entries.matrices
        rows, width = len(self._place_B), self._lm.config.width
        looking = feeding = rows * blocks(width)  # for the output layer
        for layer in layers:
            looking = max(looking, self._numbers_looking(layer, parts))
            most = max(1, int(layer["top_k"]))
            for up, down in (("up", "down"), ("shared_up", "shared_down")):
                wide, hidden = int(table[layer[up], OUTS]), int(table[layer[down], INS])
                each = 2 + width + blocks(width) + wide + blocks(hidden)
                feeding = max(feeding, rows * most * each)
            routes = int(table[layer["router"], OUTS]) if layer["routed"] else 0
            feeding = max(feeding, rows * (2 * most + routes + blocks(width)))
        return rows * (3 * width + 4 * int(model["pairs"])) + max(looking, feeding)

    def _numbers_looking(self, layer: np.void, parts: int) -> int:
        """The same of a layer's attention."""
        table, rows, config = self._entries.matrices, len(self._place_B), self._lm.config
        heads, out = int(layer["heads"]), int(table[layer["out"], INS])
        laid = rows * blocks(max(config.width, out))
        if layer["latent"]:
            latent, wide = int(layer["latent"]), int(layer["head_width"])
            rank = int(table[layer["q_down"], OUTS]) if layer["q_down"] >= 0 else 0
            made = rank + int(table[layer["q_up"], OUTS]) + wide + heads * (wide + latent) + out
            laid = max(laid, rows * blocks(rank), parts * rows * blocks(latent))
        else:
            wide, made, heads = (
                config.head_width,
                int(table[layer["qkv"], OUTS]) + out,
                heads // int(layer["key_heads"]),
            )
        return rows * made + max(laid, parts * heads * (self._rings.room + blocks(wide)))

    def prefill(self, id_BS: Tensor, length_B: Tensor) -> Tensor:
        """(B, V) the scores after each row's last token; what was there before is forgotten."""
        lengths = length_B.tolist()
        id_BS = id_BS[:, : max(lengths)]
        self._entries.of_texts(id_BS.shape[1])
        if self._rings.grow(id_BS.shape[1]):
            self._point()
        whole = min(lengths) == id_BS.shape[1]
        taken: Any = Taken(self._rings, lengths)
        # What can be compiled routes each token for itself.
        hidden_B1D = self._lm.hidden(id_BS, None if whole else length_B, taken, only_B=length_B - 1)[0]
        self._place_B[:] = lengths
        return self._lm.scores(hidden_B1D[:, 0]).float()

    def step(self, id_B: Tensor) -> Tensor:
        """(B, V) the scores after one more token of each row, in memory that the next step writes to again.

        Nobody looks here whether there are such tokens.
        """
        ids, entries = id_B.detach().numpy(), self._entries
        if ids.dtype != np.int64:
            ids = ids.astype(np.int64)
        if self._rings.grow(int(self._place_B.max()) + 1):
            self._point()
        tables = entries.models, entries.layers, entries.norms, entries.matrices
        parts = threads()
        if parts != self._parts:
            self._point()
        rooms = self._room_F.numpy(), self._room_I, self._logits_BV.numpy()
        step(*tables, np.ascontiguousarray(ids), self._place_B, *rooms, parts)
        self._place_B += 1
        return self._logits_BV

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        place_N = self._place_B[row_N.numpy()]
        self._rings.keep(row_N)
        self._begin(len(place_N))
        self._place_B[:] = place_N
