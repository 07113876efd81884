"""Held-out text as batches: the same rows every time, one document a row, every domain in its share."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnout.errors import DataError, word

__all__ = ["HeldOutBatch", "held_out_batches"]


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOutBatch:
    """Rows of held-out text.

    Args:
        id_BS: int64, the tokens; padded with 0.
        target_BS: int64, the token that follows each; -100 where there is nothing to predict.
        domain_B: int64, the domain of each row.

    >>> HeldOutBatch(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1)).target_BS.shape
    torch.Size([1, 2])

    Source: none; plain bookkeeping.
    """

    id_BS: Tensor
    target_BS: Tensor
    domain_B: Tensor


def held_out_batches(tokens: Any, *, batch: int, seq: int, limit: int | None = None) -> Iterator[HeldOutBatch]:
    """The held-out documents cut into rows of ``seq`` tokens, none of which spans two documents.

    Every token but the first of a document is predicted once. With a ``limit``, rows are taken evenly spaced over
    all documents, so that every domain keeps its share; which ones depends on nothing but the text and the sizes.

    Args:
        tokens: a TokenSet.
        batch: rows at once.
        seq: S, tokens a row.
        limit: about how many tokens to predict; None takes all.

    Returns:
        The batches, in the documents' order.

    Raises:
        DataError: no held-out document has two tokens.

    >>> import types
    >>> split = types.SimpleNamespace(
    ...     token_T=np.array([5, 6, 7, 8, 9]), document_N=np.array([0, 4, 5]), domain_N=np.array([0, 1])
    ... )
    >>> [(b.id_BS.tolist(), b.target_BS.tolist()) for b in
    ...  held_out_batches(types.SimpleNamespace(held_out=split), batch=8, seq=2)]
    [([[5, 6], [7, 0]], [[6, 7], [8, -100]])]

    Source: Gao et al., 2020, "The Pile", section 3.1; rows do not overlap.
    """
    split = tokens.held_out
    offset_N = np.asarray(split.document_N, dtype=np.int64)
    # A document of n tokens has n - 1 to predict, in ceil((n - 1) / S) rows.
    rows_N = -(-np.maximum(np.diff(offset_N) - 1, 0) // seq)
    total = int(rows_N.sum())
    if total == 0:
        raise DataError(
            word(
                "the held-out text",
                got=f"{len(rows_N)} documents with {int(offset_N[-1]) if len(offset_N) else 0} tokens in all",
                allowed="have a document of at least two tokens",
                where="turnout.train.held_out_batches",
                fix="hold out more documents, or add text",
            )
        )
    picked = np.arange(total)
    if limit is not None:
        # As many rows as hold `limit` tokens on average, spread over all of them.
        count = max(1, min(total, round(limit * total / max(1, int((np.diff(offset_N) - 1).clip(0).sum())))))
        picked = (np.arange(count) * total) // count
    last_N = np.cumsum(rows_N)
    for first in range(0, len(picked), batch):
        yield _rows(split, picked[first : first + batch], offset_N, rows_N, last_N, seq)


def _rows(split: Any, row_B: Any, offset_N: Any, rows_N: Any, last_N: Any, seq: int) -> HeldOutBatch:
    document_B = np.searchsorted(last_N, row_B, side="right")
    start_B = offset_N[document_B] + (row_B - (last_N[document_B] - rows_N[document_B])) * seq
    id_BS = torch.zeros(len(row_B), seq, dtype=torch.long)
    target_BS = torch.full((len(row_B), seq), -100)
    for b, (document, start) in enumerate(zip(document_B, start_B, strict=True)):
        stop = min(int(start) + seq + 1, int(offset_N[document + 1]))
        piece = torch.from_numpy(np.asarray(split.token_T[int(start) : stop]).astype(np.int64))
        id_BS[b, : len(piece) - 1] = piece[:-1]
        target_BS[b, : len(piece) - 1] = piece[1:]
    return HeldOutBatch(id_BS, target_BS, torch.from_numpy(np.asarray(split.domain_N)[document_B].astype(np.int64)))
