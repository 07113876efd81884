"""Decoding with re-mixed prompts: the scores of each prompt's last token are given, all else goes on as ever."""

import torch
from torch import Tensor

from turnout.models.c3po.c3po import C3PO
from turnout.models.c3po.rerouted import Rerouted
from turnout.models.decoding.plain import PlainSteps
from turnout.models.lm import LM

__all__ = ["Remixed"]


class Remixed:
    """The steps of a generation by ``C3PO``, through the model's modules.

    Args:
        lm: the model, in evaluation mode.
        batch: not used.
        room: not used.
        remix: how.

    Raises:
        UsageError: a model that the pathways are not of.

    Source: Li et al., 2025, "C3PO".
    """

    def __init__(self, lm: LM, batch: int, room: int, remix: C3PO) -> None:
        remix.check(lm)
        self._lm, self._remix, self._steps = lm, remix, PlainSteps(lm)

    @torch.no_grad()
    def prefill(self, id_BS: Tensor, length_B: Tensor | None = None) -> Tensor:
        """(B, V) the scores after each prompt, its last token re-mixed."""
        length_B = torch.full((len(id_BS),), id_BS.shape[1]) if length_B is None else length_B.cpu()
        texts = [text[:length] for text, length in zip(id_BS.tolist(), length_B.tolist(), strict=True)]
        score_BLE = self._remix.scores(self._lm, texts)
        detour = Rerouted(length_B.to(id_BS.device) - 1, score_BLE, len(self._lm.routers))
        return self._steps.prefill(id_BS, length_B, detour=detour)

    def step(self, id_B: Tensor) -> Tensor:
        """(B, V) the scores after one more token of each row."""
        return self._steps.step(id_B)

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        self._steps.keep(row_N)
