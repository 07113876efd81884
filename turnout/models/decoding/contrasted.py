"""Decoding by self-contrast: the strong and the weak scores of every row, from one batch of twice as many rows."""

import torch
from torch import Tensor

from turnout.models.contrast import Contrast
from turnout.models.decoding.decoder import Decoder
from turnout.models.lm import LM

__all__ = ["Contrasted"]


class Contrasted:
    """The steps of a generation by ``Contrast``: each text is two rows of one ``Decoder``, routed as ever and by rank.

    Both are in every call, so that a weight that both need is read once. They have caches of their own: what a token
    is after the first routed layer differs.

    Args:
        lm: the model, in evaluation mode.
        batch: B, how many texts there are.
        room: as for ``Decoder``.
        contrast: how.

    Raises:
        UsageError: a model without experts of that rank.

    >>> from turnout.models import LMConfig, MoEConfig
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, moe=MoEConfig(4, 2, 8))).eval()
    >>> Contrasted(lm, 1, 8, Contrast()).prefill(torch.tensor([[3, 1, 4]])).shape
    torch.Size([1, 16])

    Source: Shi et al., 2024, "Unchosen Experts Can Contribute Too", with both passes in one.
    """

    def __init__(self, lm: LM, batch: int, room: int, contrast: Contrast) -> None:
        contrast.check(lm)
        rank_R = torch.tensor([0, contrast.rank]).repeat_interleave(batch)
        self._contrast, self._decoder = contrast, Decoder(lm, 2 * batch, room, rank_B=rank_R)

    def prefill(self, id_BS: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, V) the scores after each prompt; as ``Decoder``."""
        lengths = None if lengths is None else lengths.repeat(2)
        return self._scores(self._decoder.prefill(id_BS.repeat(2, 1), lengths))

    def step(self, id_B: Tensor) -> Tensor:
        """(B, V) the scores after one more token of each row."""
        return self._scores(self._decoder.step(id_B.repeat(2)))

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        self._decoder.keep(torch.cat([row_N, row_N + self._decoder.batch // 2]))

    def _scores(self, score_RV: Tensor) -> Tensor:
        return self._contrast.scores(*score_RV.chunk(2))
