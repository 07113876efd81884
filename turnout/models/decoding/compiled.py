"""Decoding by the compiled step: prompts through the model, every further token in one call."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnout.models.contrast import ranked
from turnout.models.decoding.entries import Entries
from turnout.models.decoding.ring import Rings, Taken
from turnout.models.lm import LM
from turnout.run.compiled.engine import threads
from turnout.run.compiled.formats import blocks
from turnout.run.compiled.kept import Kept
from turnout.run.compiled.step import step
from turnout.run.compiled.tables import CODES, INS, OUTS

__all__ = ["CompiledSteps"]

# Up to so many tokens of all rows prompts are read by the compiled step; beyond, torch's products in 16 bits win.
# AMD Zen 4, 32 tokens over the modules' time: mixtures 0.62 to 0.92, a dense model 0.67 in fp32 and 0.98 in bf16.
_FEW, _FEW_SHORT = 64, 32


class CompiledSteps:
    """Prompts and steps for a model that ``why_plain`` has nothing against.

    Of longrope all rows are on the same side of its border; ``turnout.models.decoding.sides`` sees to that.
    """

    def __init__(self, lm: LM, batch: int, room: int, rank_B: Tensor | None = None) -> None:
        self._lm, self._entries, self._rings = lm, Entries(lm), Rings(lm, batch, room)
        self._rank_B = np.zeros(batch, np.int64) if rank_B is None else rank_B.numpy().astype(np.int64)
        self._begin(batch)

    def _begin(self, batch: int) -> None:
        """Sets aside what a step writes to."""
        self._logits_BV = torch.empty(batch, self._lm.config.vocab_size, dtype=torch.float32, device="cpu")
        self._place_B, self._row_B = np.zeros(batch, np.int64), np.arange(batch)
        self._point()

    def _point(self) -> None:
        """Says where the caches are, and sets aside room for sums between weights."""
        layers, table, kept = self._entries.layers, self._entries.matrices, Kept()
        for layer, (keys, values) in zip(layers, self._rings.looked_L, strict=True):
            table[layer["keys"]] = kept.matrix(keys, by_input=False)
            table[layer["values"]] = kept.matrix(values.transpose(1, 2), by_input=True)
            layer["cache_code"] = CODES[keys.dtype]
        self._parts = threads()
        self._rooms = self._made_rooms(len(self._place_B), self._parts)

    def _made_rooms(self, rows: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """The memory for what a step of so many rows writes between weights, and for which experts it takes."""
        most = max(1, int(self._entries.layers["top_k"].max()))
        numbers = torch.zeros(self._numbers(rows, parts), dtype=torch.float32, device="cpu")
        return numbers.numpy(), np.zeros(rows * most * 4 + 1, np.int64)

    def _numbers(self, rows: int, parts: int) -> int:
        """How many a step writes between weights, when it is shared by so many threads."""
        model, layers, table = self._entries.models[0], self._entries.layers, self._entries.matrices
        width = self._lm.config.width
        looking = feeding = rows * blocks(width)  # for the output layer
        for layer in layers:
            looking = max(looking, self._numbers_looking(layer, rows, parts))
            most = max(1, int(layer["top_k"]))
            for up, down in (("up", "down"), ("shared_up", "shared_down")):
                wide, hidden = int(table[layer[up], OUTS]), int(table[layer[down], INS])
                each = 2 + width + blocks(width) + wide + blocks(hidden)
                feeding = max(feeding, rows * most * each)
            routes = int(table[layer["router"], OUTS]) if layer["routed"] else 0
            feeding = max(feeding, rows * (2 * most + routes + blocks(width)))
        return rows * (3 * width + 4 * int(model["pairs"])) + max(looking, feeding)

    def _numbers_looking(self, layer: np.void, rows: int, parts: int) -> int:
        """The same of a layer's attention."""
        table, config = self._entries.matrices, self._lm.config
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
        most = _FEW if self._lm.embedding.dtype == torch.float32 else _FEW_SHORT
        few = sum(lengths) <= most and self._rings.hold(id_BS.shape[1])
        logits_BV = self._read(id_BS, lengths) if few else self._run(id_BS, length_B)
        self._place_B[:] = lengths
        return logits_BV

    def _run(self, id_BS: Tensor, length_B: Tensor) -> Tensor:
        """The same by the model's modules."""
        lengths = length_B.tolist()
        whole = min(lengths) == id_BS.shape[1]
        taken: Any = Taken(self._rings, lengths)
        detour = ranked(torch.from_numpy(self._rank_B)) if self._rank_B.any() else None
        # What can be compiled routes each token for itself.
        how: Any = {"only_B": length_B - 1, "detour": detour}
        hidden_B1D = self._lm.hidden(id_BS, None if whole else length_B, taken, **how)[0]
        return self._lm.scores(hidden_B1D[:, 0]).float()

    def _read(self, id_BS: Tensor, lengths: list[int]) -> Tensor:
        """The same by one step of all tokens, which is faster where they are few."""
        row_R = np.repeat(self._row_B, lengths)
        place_R, end_B = np.concatenate([np.arange(length) for length in lengths]), np.cumsum(lengths) - 1
        id_R = id_BS.detach().numpy()[row_R, place_R].astype(np.int64)
        logits_BV, parts = torch.empty_like(self._logits_BV), threads()
        rows = id_R, place_R, row_R, self._rank_B[row_R], end_B
        step(*self._tables, *rows, *self._made_rooms(len(id_R), parts), logits_BV.numpy(), parts)
        return logits_BV

    @property
    def _tables(self) -> tuple[np.ndarray, ...]:
        entries = self._entries
        return entries.models, entries.layers, entries.norms, entries.matrices

    def step(self, id_B: Tensor) -> Tensor:
        """(B, V) the scores after one more token of each row, in memory that the next step writes to again.

        Nobody looks here whether there are such tokens.
        """
        id_B = id_B.detach().to(torch.int64).contiguous()
        if self._rings.grow(int(self._place_B.max()) + 1):
            self._point()
        parts = threads()
        if parts != self._parts:
            self._point()
        rows = id_B.numpy(), self._place_B, self._row_B, self._rank_B, self._row_B
        step(*self._tables, *rows, *self._rooms, self._logits_BV.numpy(), parts)
        self._place_B += 1
        return self._logits_BV

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        place_N = self._place_B[row_N.numpy()]
        self._rings.keep(row_N)
        self._rank_B = self._rank_B[row_N.numpy()]
        self._begin(len(place_N))
        self._place_B[:] = place_N
