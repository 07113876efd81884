"""Decoding by the model's own forward pass: today's path for everything that a model may be."""

import torch
from torch import Tensor

from turnout.models.attention import Cache
from turnout.models.lm import LM
from turnout.models.padding import find_places

__all__ = ["PlainSteps"]


class PlainSteps:
    """Prompts and steps through ``LM.hidden`` with its ``Cache``; shorter prompts have padding after them."""

    def __init__(self, lm: LM) -> None:
        self._lm, self._cache, self._seen_BP = lm, Cache(), torch.empty(0, 0, dtype=torch.int64)

    def prefill(self, id_BS: Tensor, length_B: Tensor) -> Tensor:
        """(B, V) the scores after each row's last token; what was there before is forgotten."""
        id_BS = id_BS[:, : int(length_B.max())]
        self._cache, self._seen_BP = Cache(), id_BS
        whole = bool((length_B == id_BS.shape[1]).all())
        hidden_BSD = self._lm.hidden(id_BS, None if whole else length_B, self._cache)[0]
        row_B = torch.arange(len(id_BS), device=id_BS.device)
        return self._lm.scores(hidden_BSD[row_B, length_B.to(id_BS.device) - 1])

    def step(self, id_B: Tensor) -> Tensor:
        """(B, V) the scores after one more token of each row."""
        new_B1, cache = id_B.unsqueeze(1), self._cache
        self._seen_BP = torch.cat((self._seen_BP, new_B1), 1)
        mask_BP, id_BS = None, new_B1
        if self._lm.rope.changes(cache.length, 1, find_places(new_B1, None, cache)):  # all keys are to be made anew
            held_BP = cache.real_BP
            mask_BP = None if held_BP is None else torch.nn.functional.pad(held_BP, (0, 1), value=True)
            self._cache, id_BS = Cache(), self._seen_BP
        return self._lm.scores(self._lm.hidden(id_BS, mask_BP, self._cache)[0][:, -1])

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        self._seen_BP = self._seen_BP[row_N]
        self._cache.keep(row_N)
