"""Decoding by the model's own forward pass: today's path for everything that a model may be."""

from typing import Any

import torch
from torch import Tensor

from turnout.models.attention import Cache
from turnout.models.contrast import ranked
from turnout.models.lm import LM

__all__ = ["PlainSteps"]


class PlainSteps:
    """Prompts and steps through ``LM.hidden`` with its ``Cache``; shorter prompts have padding after them."""

    def __init__(self, lm: LM, rank_B: Tensor | None = None) -> None:
        self._lm, self._cache, self._rank_B = lm, Cache(), rank_B

    def prefill(self, id_BS: Tensor, length_B: Tensor, *, detour: Any = None) -> Tensor:
        """(B, V) the scores after each row's last token; what was there before is forgotten.

        A ``detour`` of ``LM.hidden`` decides for the prompts alone.
        """
        id_BS = id_BS[:, : int(length_B.max())]
        self._cache = Cache()
        whole = bool((length_B == id_BS.shape[1]).all())
        hidden_BSD = self._lm.hidden(id_BS, None if whole else length_B, self._cache, detour=detour or self._detour)[0]
        row_B = torch.arange(len(id_BS), device=id_BS.device)
        return self._lm.scores(hidden_BSD[row_B, length_B.to(id_BS.device) - 1])

    def step(self, id_B: Tensor) -> Tensor:
        """(B, V) the scores after one more token of each row."""
        return self._lm.scores(self._lm.hidden(id_B.unsqueeze(1), None, self._cache, detour=self._detour)[0][:, -1])

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        self._cache.keep(row_N)
        self._rank_B = None if self._rank_B is None else self._rank_B[row_N.cpu()]

    @property
    def _detour(self) -> Any:
        return None if self._rank_B is None else ranked(self._rank_B)
