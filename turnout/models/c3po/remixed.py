"""Decoding with re-mixed prompts: the scores of each prompt's last token are given, all else goes on as ever."""

import torch
from torch import Tensor

from turnout.models.attention import Cache
from turnout.models.c3po.c3po import C3PO
from turnout.models.c3po.rerouted import Rerouted
from turnout.models.decoding.plain import PlainSteps
from turnout.models.lm import LM

__all__ = ["Remixed"]


class Remixed(PlainSteps):
    """The steps of a generation by ``C3PO``, through the model's modules.

    Args:
        lm: the model, in evaluation mode.
        batch: not used.
        room: not used.
        remix: how.

    >>> issubclass(Remixed, PlainSteps)
    True

    Source: Li et al., 2025, "C3PO".
    """

    def __init__(self, lm: LM, batch: int, room: int, remix: C3PO) -> None:
        super().__init__(lm)
        remix.check(lm)
        self._remix = remix

    @torch.no_grad()
    def prefill(self, id_BS: Tensor, length_B: Tensor | None = None) -> Tensor:
        """(B, V) the scores after each prompt, its last token re-mixed."""
        length_B = torch.full((len(id_BS),), id_BS.shape[1]) if length_B is None else length_B.cpu()
        texts = [text[:length] for text, length in zip(id_BS.tolist(), length_B.tolist(), strict=True)]
        score_BLE = self._remix.scores(self._lm, texts)
        last_B = length_B.to(id_BS.device) - 1
        self._cache = Cache()
        detour = Rerouted(last_B, score_BLE, len(self._lm.routers))
        whole = bool((length_B == id_BS.shape[1]).all())
        hidden_BSD = self._lm.hidden(id_BS, None if whole else length_B, self._cache, detour=detour)[0]
        return self._lm.scores(hidden_BSD[torch.arange(len(id_BS), device=id_BS.device), last_B])
