"""Accesses: in which order a model that decodes asks for its experts, as a trace recorded it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from turnout.errors import ShapeError, UsageError, word
from turnout.types.expert_cache import Access
from turnout.types.trace import Trace

__all__ = ["Accesses"]

_WHERE = "turnout.types.Accesses"


@dataclasses.dataclass(frozen=True, eq=False)
class Accesses:
    """One request for experts after the other: all layers of a step, then those of the next.

    Args:
        layers: L.
        experts: E, the most that a layer has.
        layer_I: (I,) the layer of each request.
        step_I: (I,) the pass through the model.
        sequence_I: (I,) the text; 0 where several are read side by side.
        start_J: (I + 1,) where each request's experts begin.
        expert_R: the experts asked for, ascending within a request, each once.
        token_S: (steps,) the id that each step reads; None where they are not known, or several are read at once.

    >>> told = Accesses.of_paths(np.array([[[1, 0], [0, 2]], [[1, 3], [0, 2]]]), experts=4)
    >>> [(one.layer, one.experts) for one in told]
    [(0, (0, 1)), (1, (0, 2)), (0, (1, 3)), (1, (0, 2))]

    Source: none; plain bookkeeping.
    """

    layers: int
    experts: int
    layer_I: np.ndarray
    step_I: np.ndarray
    sequence_I: np.ndarray
    start_J: np.ndarray
    expert_R: np.ndarray
    token_S: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.layer_I)

    def __iter__(self) -> Iterator[Access]:
        for at in range(len(self)):
            yield self.access(at)

    @property
    def page_R(self) -> np.ndarray:
        """(R,) layer E + expert of each entry: a number for each expert of the model."""
        return np.repeat(self.layer_I.astype(np.int64), np.diff(self.start_J)) * self.experts + self.expert_R

    @property
    def most(self) -> int:
        """The experts of the largest request: what has to fit."""
        return int(np.diff(self.start_J).max(initial=0))

    @property
    def steps(self) -> int:
        """Passes through the model."""
        return int(self.step_I[-1]) + 1 if len(self) else 0

    def access(self, at: int, ahead: int = 0) -> Access:
        """The request of this number, with as many of the next ones of its pass as are known then."""
        token = () if self.token_S is None else (int(self.token_S[self.step_I[at]]),)
        coming = tuple(
            (int(self.layer_I[j]), self._experts(j))
            for j in range(at + 1, min(at + 1 + ahead, len(self)))
            if self.step_I[j] == self.step_I[at]
        )
        layer, step, sequence = int(self.layer_I[at]), int(self.step_I[at]), int(self.sequence_I[at])
        return Access(layer, self._experts(at), step, token, sequence, coming)

    def _experts(self, at: int) -> tuple[int, ...]:
        return tuple(self.expert_R[self.start_J[at] : self.start_J[at + 1]].tolist())

    def used(self) -> np.ndarray:
        """(S, L, E) bool, which experts each step asks for."""
        used_SLE = np.zeros((self.steps, self.layers, self.experts), bool)
        count_I = np.diff(self.start_J)
        used_SLE[np.repeat(self.step_I, count_I), np.repeat(self.layer_I, count_I), self.expert_R] = True
        return used_SLE

    def sequence_S(self) -> np.ndarray:
        """(S,) the text of each step."""
        found = np.zeros(self.steps, np.int64)
        found[self.step_I] = self.sequence_I
        return found

    @classmethod
    def of_paths(cls, expert_TLK: np.ndarray, *, experts: int, document_T: np.ndarray | None = None) -> Self:
        """Of tokens that take K experts in each layer.

        Args:
            expert_TLK: (T, L, K) their numbers.
            experts: E.
            document_T: (T,) the text of each; one text when None.

        Raises:
            ShapeError: not three axes, or a number that is no expert's.
        """
        expert_TLK = np.asarray(expert_TLK)
        if expert_TLK.ndim != 3 or not expert_TLK.size or not 0 <= expert_TLK.min() <= expert_TLK.max() < experts:
            got, allowed = f"shape {expert_TLK.shape}", f"be (T, L, K) of numbers below {experts}"
            raise ShapeError(word("expert_TLK", got=got, allowed=allowed, where=_WHERE, fix="pass experts=E"))
        tokens, layers, _ = expert_TLK.shape
        used_TLE = np.zeros((tokens, layers, experts), bool)
        np.put_along_axis(used_TLE, expert_TLK, True, axis=2)
        sequence_T = np.zeros(tokens, np.int64) if document_T is None else np.asarray(document_T, np.int64)
        return cls.of_used(used_TLE, sequence_T)

    @classmethod
    def of_used(cls, used_SLE: np.ndarray, sequence_S: np.ndarray, token_S: np.ndarray | None = None) -> Self:
        """Of what each step asks for; a layer that asks for nothing makes no request."""
        steps, layers, experts = used_SLE.shape
        count_I = used_SLE.sum(2).reshape(-1)
        asks_I = count_I > 0
        step_I, layer_I = (each.reshape(-1) for each in np.indices((steps, layers)))
        start_J = np.concatenate([[0], np.cumsum(count_I[asks_I])])
        expert_R = np.nonzero(used_SLE.reshape(-1, experts))[1].astype(np.int64)
        return cls(
            layers, experts, layer_I[asks_I], step_I[asks_I], sequence_S[step_I[asks_I]], start_J, expert_R, token_S
        )

    @classmethod
    def of_trace(cls, trace: Trace, documents: Sequence[int], *, streams: int = 1) -> Self:
        """Of documents of a trace, decoded one after the other, or several side by side.

        Args:
            trace: as ``turnout eval --trace`` records it.
            documents: their numbers, in the order in which they are read.
            streams: how many are read at once; where one ends the next takes its place.

        Raises:
            UsageError: no documents, or a number of streams below 1.
        """
        if streams < 1 or not len(documents):
            got = f"{streams} streams of {len(documents)} documents"
            raise UsageError(word("streams", got=got, allowed="be at least 1 of each", where=_WHERE, fix="streams=1"))
        bound_N = trace.document_N
        lanes: list[list[int]] = [[] for _ in range(streams)]
        texts: list[list[int]] = [[] for _ in range(streams)]
        for document in documents:
            lane = min(range(streams), key=lambda each: len(lanes[each]))
            first, end = int(bound_N[document]), int(bound_N[document + 1])
            lanes[lane] += range(first, end)
            texts[lane] += [document] * (end - first)
        steps = max(map(len, lanes))
        used_SLE = np.zeros((steps, trace.num_layers, max(trace.num_experts_L)), bool)
        for layer in range(trace.num_layers):
            start_T, expert_R = np.asarray(trace.column("start", layer)), np.asarray(trace.column("expert", layer))
            for lane in lanes:
                token_S = np.asarray(lane, np.int64)
                count_S = start_T[token_S + 1] - start_T[token_S]
                entry_R = np.repeat(start_T[token_S] - np.cumsum(count_S) + count_S, count_S) + np.arange(count_S.sum())
                used_SLE[np.repeat(np.arange(len(lane)), count_S), layer, expert_R[entry_R]] = True
        ids = trace.column("token_id")[np.asarray(lanes[0])] if streams == 1 and trace.has_token_ids else None
        sequence_S = np.asarray(texts[0] if streams == 1 else [0] * steps, np.int64)
        return cls.of_used(used_SLE, sequence_S, ids)
