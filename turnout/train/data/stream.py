"""Batches of tokens: a seeded order for training, a fixed one for evaluation, both pure functions of an index."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from turnout.errors import DataError, UsageError, word
from turnout.train.data.shards import Split

__all__ = ["Batch", "Stream", "shuffled", "windows"]

_IGNORE = -100
_ROUNDS = 6
_MASK = 0xFFFFFFFFFFFFFFFF


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens with what follows each.

    Args:
        id_BS: (B, S) int64.
        target_BS: (B, S) int64, the token after each; -100 where there is nothing to predict.
        domain_B: (B,) int64, the domain of each row, for evaluation; None where rows may span documents.
        real_BS: (B, S) bool, false at padding; None where every position is a token.

    >>> Batch(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).num_targets
    2

    Source: none; plain bookkeeping.
    """

    id_BS: Tensor
    target_BS: Tensor
    domain_B: Tensor | None = None
    real_BS: Tensor | None = None

    @property
    def num_targets(self) -> int:
        """Tokens to predict."""
        return int((self.target_BS != _IGNORE).sum())


class Stream:
    """Training batches, each a pure function of its index, so that a run resumes anywhere without being replayed.

    The split's tokens are cut into W = floor((T - 1) / S) windows of S + 1 tokens at stride S, documents packed one
    after the other. Row b of batch i is window p(n mod W) with n = i·B + b, where p is a permutation drawn from
    (seed, n div W): every window comes once an epoch, in another order each time. p is computed, not stored.

    Args:
        split: the tokens.
        batch: B, rows.
        seq: S, tokens a row.
        seed: of the order, 0 or more.

    Raises:
        UsageError: a size below 1, or a negative seed.
        DataError: the split holds no S + 1 tokens.

    >>> split = Split("train", np.arange(9, dtype="<u2"), np.array([0, 9]), np.array([0]))
    >>> stream = Stream(split, batch=2, seq=2, seed=0)
    >>> stream.num_windows, sorted(stream.batch(0).id_BS[:, 0].tolist() + stream.batch(1).id_BS[:, 0].tolist())
    (4, [0, 2, 4, 6])

    Source: the permutation is the network of Luby & Rackoff, 1988, "How to Construct Pseudorandom Permutations from
    Pseudorandom Functions", walked along its cycles to any size as in Black & Rogaway, 2002, "Ciphers with Arbitrary
    Finite Domains". Our round function is a 64-bit mixer: even, not secret.
    """

    def __init__(self, split: Split, *, batch: int, seq: int, seed: int) -> None:
        for name, value, least in (("batch", batch, 1), ("seq", seq, 1), ("seed", seed, 0)):
            if value < least:
                fix = f"pass {name}={least}"
                raise UsageError(word(name, got=value, allowed=f"be {least} or more", where="Stream", fix=fix))
        self.split, self.seq, self.seed, self._rows = split, seq, seed, batch
        self.num_windows = (split.num_tokens - 1) // seq
        if self.num_windows < 1:
            longest = split.num_tokens - 1
            raise DataError(
                word(
                    "seq",
                    got=seq,
                    allowed=f"be at most {max(longest, 0)}, one less than the {split.num_tokens} {split.name} tokens,",
                    where="Stream",
                    fix=f"pass seq={longest}, or give more text" if longest > 0 else "give more text",
                )
            )

    def batch(self, index: int) -> Batch:
        """The batch of this index, from 0; there is no last one."""
        at_B = [index * self._rows + row for row in range(self._rows)]
        window_B = [shuffled(n % self.num_windows, self.num_windows, self.seed, n // self.num_windows) for n in at_B]
        rows = np.stack([self.split.token_T[w * self.seq : (w + 1) * self.seq + 1] for w in window_B])
        token_BS = torch.from_numpy(rows.astype(np.int64))
        return Batch(token_BS[:, :-1].contiguous(), token_BS[:, 1:].contiguous())


def shuffled(index: int, size: int, seed: int, epoch: int = 0) -> int:
    """Where ``index`` goes in a permutation of ``range(size)`` drawn from (seed, epoch), in O(1) memory and time.

    Args:
        index: in [0, size).
        size: how many things are permuted.
        seed: whole number.
        epoch: whole number; another one gives an unrelated permutation.

    >>> sorted(shuffled(n, 5, seed=1) for n in range(5))
    [0, 1, 2, 3, 4]

    Source: Luby & Rackoff, 1988; Black & Rogaway, 2002; see Stream.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = _mix(_mix(seed) ^ epoch)
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(key ^ (right * _ROUNDS + turn)) & mask)
        index = left << half | right
        if index < size:  # else outside: walk on along the cycle, which leads back inside
            return index


def _mix(value: int) -> int:
    """64 well-mixed bits (the finaliser of Steele et al., 2014, "Fast Splittable Pseudorandom Number Generators")."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


def windows(split: Split, *, batch: int, seq: int, limit: int | None = None) -> Iterator[Batch]:
    """Batches for evaluation: documents cut into rows that do not overlap and never span two of them.

    Every token of a document but its first, the separator, is predicted exactly once. With a ``limit``, each domain
    keeps its share of the rows, at least one, and they are spread evenly over its documents; which ones depends on
    nothing but the text and the sizes.

    Args:
        split: the tokens.
        batch: B, rows at once; the last batch may have fewer.
        seq: S, tokens a row; shorter rows are padded with token 0 and target -100.
        limit: about how many tokens to predict; None takes all.

    Returns:
        The batches with their ``domain_B``, in the documents' order.

    Raises:
        UsageError: a size below 1.
        DataError: no document has two tokens.

    >>> split = Split("held_out", np.array([0, 6, 7, 8, 0, 9]), np.array([0, 4, 6]), np.array([0, 1]))
    >>> [(b.id_BS.tolist(), b.target_BS.tolist(), b.domain_B.tolist()) for b in windows(split, batch=2, seq=2)]
    [([[0, 6], [7, 0]], [[6, 7], [8, -100]], [0, 0]), ([[0, 0]], [[9, -100]], [1])]

    Source: Gao et al., 2020, "The Pile", section 3.1; rows do not overlap.
    """
    for name, value in (("batch", batch), ("seq", seq), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise UsageError(
                word(name, got=value, allowed="be 1 or more", where="turnout.train.data.windows", fix=f"pass {name}=1")
            )
    offset_N = np.asarray(split.document_N, np.int64)
    target_N = np.maximum(np.diff(offset_N) - 1, 0)
    last_N = np.cumsum(-(-target_N // seq))  # of each document, the row after its last
    if not target_N.any():
        raise DataError(
            word(
                "the held-out text",
                got=f"{split.num_documents} documents with {split.num_tokens} tokens in all",
                allowed="have a document of at least two tokens",
                where="turnout.train.data.windows",
                fix="hold out more documents, or add text",
            )
        )
    row_R = np.arange(last_N[-1])
    if limit is not None and limit < target_N.sum():
        row_R = _spread(
            row_R, np.asarray(split.domain_N)[np.searchsorted(last_N, row_R, side="right")], limit, target_N
        )
    for first in range(0, len(row_R), batch):
        row_B = row_R[first : first + batch]
        document_B = np.searchsorted(last_N, row_B, side="right")
        begin_B = np.concatenate([[0], last_N])[document_B]
        start_B = offset_N[document_B] + (row_B - begin_B) * seq
        yield _rows(split, start_B, offset_N[document_B + 1], document_B, seq)


def _spread(row_R: np.ndarray, domain_R: np.ndarray, limit: int, target_N: np.ndarray) -> np.ndarray:
    """Rows for about ``limit`` tokens, sorted: each domain in its share and at least once, evenly spaced within it."""
    share = limit / int(target_N.sum())
    kept = []
    for domain in np.unique(domain_R):
        own_R = row_R[domain_R == domain]
        count = max(1, round(len(own_R) * share))
        kept.append(own_R[np.arange(count) * len(own_R) // count])
    return np.sort(np.concatenate(kept))


def _rows(split: Split, start_B: np.ndarray, stop_B: np.ndarray, document_B: np.ndarray, seq: int) -> Batch:
    id_BS = torch.zeros(len(start_B), seq, dtype=torch.int64)
    target_BS = torch.full((len(start_B), seq), _IGNORE)
    for row, (start, stop) in enumerate(zip(start_B.tolist(), stop_B.tolist(), strict=True)):
        token_S = torch.from_numpy(np.asarray(split.token_T[start : min(start + seq + 1, stop)]).astype(np.int64))
        id_BS[row, : len(token_S) - 1] = token_S[:-1]
        target_BS[row, : len(token_S) - 1] = token_S[1:]
    real_BS = target_BS != _IGNORE  # every token has its next: the last of a document is only predicted
    return Batch(id_BS, target_BS, torch.from_numpy(np.asarray(split.domain_N)[document_B].astype(np.int64)), real_BS)
