"""Decoder: what generation asks of a model, prompts once and then steps of one token a row."""

from typing import Any

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.models.contrast import Contrast
from turnout.models.decoding.compiled import CompiledSteps
from turnout.models.decoding.path import why_plain
from turnout.models.decoding.plain import PlainSteps
from turnout.models.decoding.sides import Sides
from turnout.models.lm import LM

__all__ = ["Decoder"]

_WHERE = "turnout.models.decoding.Decoder"


class Decoder:
    """The steps of one generation: ``prefill`` reads the prompts, each ``step`` one more token of every row.

    Rows have their own lengths; the padding after shorter prompts takes no part in anything, and each row goes on as it
    does alone. It reads the model as it is when the decoder is made: make another one after training or casting it.

    Args:
        lm: the model, in evaluation mode.
        batch: B, how many rows there are.
        room: for how many positions a row memory is set aside at first; there is more where more is needed.
        rank_B: (B,) int64 for rows whose tokens take one expert alone, its rank, as ``turnout.models.Contrast`` has it;
            0 for rows that are routed as ever. None for all of them.

    Raises:
        UsageError: a batch or a room below 1, a model that is training, or ranks that it does not have.

    >>> from turnout.models import LMConfig
    >>> decoder = Decoder(LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2)).eval(), batch=2, room=8)
    >>> decoder.prefill(torch.tensor([[3, 1, 4], [1, 5, 0]]), torch.tensor([3, 2])).shape
    torch.Size([2, 16])
    >>> decoder.step(torch.tensor([1, 2])).shape, decoder.length_B.tolist()
    (torch.Size([2, 16]), [4, 3])

    Source: none; the usual split into prefill and decoding.
    """

    def __init__(self, lm: LM, batch: int, room: int, *, rank_B: Tensor | None = None) -> None:
        for name, size in (("batch", batch), ("room", room)):
            if size < 1:
                raise UsageError(
                    word(name, got=size, allowed="be at least 1", where=_WHERE, fix=f"pass {name}=1 or more")
                )
        if lm.training:
            fix = "call lm.eval() first"
            raise UsageError(word("lm", got="a model in training", allowed="be evaluated", where=_WHERE, fix=fix))
        self.lm, self.batch, self.room, self._rank_B = lm, batch, room, rank_B
        if rank_B is not None:
            self._check_ranks(rank_B)
        self.length_B = torch.zeros(batch, dtype=torch.int64)
        self.why_plain = why_plain(lm)  # None where steps are compiled
        border = lm.rope.border
        self._steps: Any = self._made(batch) if border is None else Sides(self._made, border)

    def _made(self, batch: int) -> Any:
        if self.why_plain is not None:
            return PlainSteps(self.lm, self._rank_B)
        return CompiledSteps(self.lm, batch, self.room, self._rank_B)

    def _check_ranks(self, rank_B: Tensor) -> None:
        if rank_B.shape != (self.batch,) or rank_B.dtype != torch.int64 or bool((rank_B < 0).any()):
            got, allowed = f"{rank_B.dtype} {rank_B.tolist()}", f"be {self.batch} int64 of at least 0"
            raise UsageError(word("rank_B", got=got, allowed=allowed, where=_WHERE, fix="pass 0 for rows as ever"))
        if bool(rank_B.any()):
            Contrast(rank=int(rank_B.max())).check(self.lm)

    @torch.no_grad()
    def prefill(self, id_BS: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, V) the scores of the next token after each prompt; what was read before is forgotten.

        Args:
            id_BS: (B, S) the prompts, shorter ones with any ids after them.
            lengths: (B,) how many tokens each prompt has, 1 to S; None for S each.

        Raises:
            ShapeError: another B than the decoder's, not (B, S), or longer than ``config.max_seq``.
            UsageError: a prompt without tokens, lengths that do not fit, or ids outside the vocabulary.
        """
        if id_BS.ndim != 2 or len(id_BS) != self.batch:
            got, allowed = f"shape {tuple(id_BS.shape)}", f"be ({self.batch}, S), a row for each of the batch"
            fix = f"make a Decoder with batch={len(id_BS)}"
            raise ShapeError(word("id_BS", got=got, allowed=allowed, where=f"{_WHERE}.prefill", fix=fix))
        length_B = torch.full((self.batch,), id_BS.shape[1]) if lengths is None else lengths.cpu().long()
        if length_B.shape != (self.batch,) or bool(((length_B < 1) | (length_B > id_BS.shape[1])).any()):
            got, allowed = length_B.tolist(), f"be {self.batch} whole numbers from 1 to {id_BS.shape[1]}"
            fix = "give every prompt at least one token: the one that begins a text"
            raise UsageError(word("lengths", got=got, allowed=allowed, where=f"{_WHERE}.prefill", fix=fix))
        self.lm.check(id_BS[:, : int(length_B.max())], 0)  # before anything is forgotten
        logits_BV = self._steps.prefill(id_BS, length_B)
        self.length_B = length_B.clone()
        return logits_BV

    @torch.no_grad()
    def step(self, id_B: Tensor) -> Tensor:
        """(B, V) the scores of the next token after one more token of each row.

        The tensor is the decoder's own where the step is compiled: the next step writes into it again.

        Args:
            id_B: (B,) the tokens.

        Raises:
            ShapeError: not (B,), or a row longer than ``config.max_seq``.
            UsageError: nothing was prefilled, or ids outside the vocabulary.
        """
        where = f"{_WHERE}.step"
        if id_B.shape != (self.batch,):
            got, allowed = f"shape {tuple(id_B.shape)}", f"be ({self.batch},), a token for each row"
            raise ShapeError(word("id_B", got=got, allowed=allowed, where=where, fix="pass one token a row"))
        longest = int(self.length_B.max())
        if longest == 0:
            fix = "call prefill with the prompts first"
            raise UsageError(word("step", got="no prompts", allowed="follow prefill", where=where, fix=fix))
        if longest >= self.lm.config.max_seq:
            got, allowed = f"{longest + 1} tokens", f"end within max_seq={self.lm.config.max_seq}"
            fix = "stop before, or build the model with a longer max_seq"
            raise ShapeError(word("id_B", got=got, allowed=allowed, where=where, fix=fix))
        self.lm.check(id_B.unsqueeze(1), longest)  # all of them, before a part of the rows goes on
        logits_BV = self._steps.step(id_B)
        self.length_B += 1
        return logits_BV

    @torch.no_grad()
    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order: those that a text did not end in.

        Args:
            row_N: (N,) which rows, each at most once.

        Raises:
            UsageError: rows that there are not, or none.
        """
        rows = row_N.tolist()
        if not rows or len(set(rows)) < len(rows) or min(rows) < 0 or max(rows) >= self.batch:
            got, allowed = rows, f"be different rows from 0 to {self.batch - 1}, at least one"
            fix = "pass torch.tensor([0]) for the first"
            raise UsageError(word("row_N", got=got, allowed=allowed, where=f"{_WHERE}.keep", fix=fix))
        self._steps.keep(row_N)
        self.batch, self.length_B = len(rows), self.length_B[row_N.cpu()]
