"""Trace matching: the recorded text whose experts are most like this one's says which come next."""

import dataclasses
import functools
from typing import Self

import numpy as np

from turnout.decide.device.cache.history import History, other_text
from turnout.errors import ShapeError, word
from turnout.types.accesses import Accesses
from turnout.types.expert_cache import Access, CacheShape, Decision

__all__ = ["Matched", "TraceMatching", "recorded_texts"]


@dataclasses.dataclass(frozen=True, eq=False)
class Matched:
    """What trace matching remembers.

    Args:
        history: of the cache.
        count_LE: (L, E) how often this text used each expert.
        like_NL: (N, L) how like each recorded text this one is in each layer.
        sequence: which text it is.
        aside: what is remembered of the texts before, which may come again.

    Source: none; plain bookkeeping.
    """

    history: History
    count_LE: np.ndarray
    like_NL: np.ndarray
    sequence: int = -1
    aside: tuple["Matched", ...] = ()


class TraceMatching:
    """Looks up the recorded text that used experts most like this one, and holds and fetches what that one used.

    A text is its table of uses a_LE. The match is the recorded text with the highest mean cosine over the layers that
    this text has used so far: in its first pass those up to the present one. An expert is worth its share of the
    match's uses in its layer, times 1 - (d - 1) / (L + 1), d layers before its turn.

    Args:
        library_NLE: (N, L, E) the uses of recorded texts.
        early: how many experts are fetched before their time at each access, at most.
        reach: of how many layers ahead.

    Raises:
        ShapeError: no texts, or not three axes.

    >>> library = np.array([[[3, 0], [0, 3]], [[0, 3], [3, 0]]])
    >>> policy = TraceMatching(library, early=1)
    >>> policy.update(policy.init(CacheShape(2, 2, 1)), Access(0, (1,), step=0))[1].prefetch
    ((1, 0),)

    Source: Xue et al., 2024, "MoE-Infinity: Efficient MoE Inference on Personal Machines with Sparsity-Aware Expert
    Cache". Their published code compares the layers that have not run yet, of which nothing is known in a first pass.
    """

    def __init__(self, library_NLE: np.ndarray, *, early: int = 4, reach: int = 2) -> None:
        library_NLE = np.asarray(library_NLE, np.float64)
        if library_NLE.ndim != 3 or not len(library_NLE):
            got, fix = f"shape {library_NLE.shape}", "use TraceMatching.learn(accesses)"
            raise ShapeError(word("library_NLE", got=got, allowed="be (N, L, E)", where="TraceMatching", fix=fix))
        self.early, self.reach = early, reach
        length_NL1 = np.linalg.norm(library_NLE, axis=2, keepdims=True)
        self._unit_NLE = library_NLE / np.maximum(length_NL1, 1e-12)
        self._share_NLE = library_NLE / np.maximum(library_NLE.sum(2, keepdims=True), 1e-12)

    @classmethod
    def learn(cls, accesses: Accesses, *, most: int = 128) -> Self:
        """From recorded texts; of more than ``most``, as many spread evenly."""
        return cls(recorded_texts(accesses, most=most))

    def init(self, sizes: CacheShape) -> Matched:
        """Nothing is held, no text has begun."""
        _, layers, experts = self._unit_NLE.shape
        if (layers, experts) != (sizes.layers, sizes.experts):
            got, allowed = f"{sizes.layers} x {sizes.experts}", f"be the recorded {layers} x {experts}"
            raise ShapeError(
                word("the sizes", got=got, allowed=allowed, where="TraceMatching", fix="record this model")
            )
        return self._begun(History.empty(sizes), -1)

    def _begun(self, history: History, sequence: int) -> Matched:
        sizes = history.sizes
        zeros_NL = np.zeros((len(self._unit_NLE), sizes.layers))
        return Matched(history, np.zeros((sizes.layers, sizes.experts)), zeros_NL, sequence)

    def match(self, state: Matched) -> int:
        """The number of the recorded text that is most like this one, in the layers that this one has used."""
        return int(state.like_NL[:, state.count_LE.any(1)].mean(1).argmax())

    def foretell(self, state: Matched, access: Access) -> tuple[Matched, np.ndarray, list[int]]:
        """The state after this access, what each expert is worth, and which should come early."""
        if access.sequence != state.sequence:
            begun = functools.partial(self._begun, state.history, access.sequence)
            state = other_text(state, access.sequence, begun)
        now, sizes, layer = state.history.touched(access), state.history.sizes, access.layer
        count_LE, like_NL = state.count_LE.copy(), state.like_NL.copy()
        count_LE[layer, list(access.experts)] += 1
        like_NL[:, layer] = self._unit_NLE[:, layer] @ (count_LE[layer] / np.linalg.norm(count_LE[layer]))
        state = Matched(now, count_LE, like_NL, access.sequence, state.aside)
        until_P = now.until(layer)
        share_P = self._share_NLE[self.match(state)].reshape(-1)
        worth_P = share_P * (1 - (until_P - 1) / (sizes.layers + 1)) + 1e-9 * now.last_P / now.tick
        near_W = np.nonzero((until_P <= min(self.reach, sizes.layers - 1)) & (share_P > 0))[0]
        return state, worth_P, near_W[np.argsort(-worth_P[near_W], kind="stable")[: self.early]].tolist()

    def update(self, state: Matched, access: Access) -> tuple[Matched, Decision]:
        """Fetches what is missing, and early what the match used in the next layers."""
        state, worth_P, wish = self.foretell(state, access)
        history, decision = state.history.served(access, lambda: worth_P, wish)
        return dataclasses.replace(state, history=history), decision


def recorded_texts(accesses: Accesses, *, most: int = 128) -> np.ndarray:
    """(N, L, E) how often each recorded text used each expert; of more than ``most``, as many spread evenly."""
    used_SLE, sequence_S = accesses.used(), accesses.sequence_S()
    texts = np.unique(sequence_S)
    texts = texts[np.unique(np.linspace(0, len(texts) - 1, min(most, len(texts))).round().astype(int))]
    return np.stack([used_SLE[sequence_S == text].sum(0) for text in texts])
