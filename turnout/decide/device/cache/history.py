"""History: what every policy of a cache of experts remembers, and how it serves an access by what experts are worth."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from turnout.errors import UsageError, word
from turnout.types.expert_cache import Access, CacheShape, Decision, Seen

__all__ = ["History", "Worth", "by_worth", "other_text"]

_WHERE = "a cache policy's update"
# How many texts are remembered beside the one that is read: as many as a server reads in turn.
_ASIDE = 16
_State = TypeVar("_State", bound=Any)


class Worth(Protocol):
    """A rule that says what each expert is worth, of numbers alone, so that a replay can compile it.

    >>> def oldest(seen):
    ...     return seen.last_P * 1.0
    >>> History.empty(CacheShape(layers=1, experts=2, slots=1)).worths(oldest, 0).tolist()
    [0.0, 0.0]

    Source: none; plain bookkeeping.
    """

    def __call__(self, seen: Seen) -> np.ndarray:
        """(P,) the worth of each expert."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """Which experts are held, and when and how often each was used; P = L E of them, layer by layer.

    Args:
        sizes: of the cache.
        held_P: (P,) bool, whether each has a slot.
        last_P: (P,) the access that used it last, counted from 1; 0 for none.
        count_P: (P,) uses, old ones counting less where the policy says so.
        tick: accesses so far.
        step: the pass of the last access; -1 before the first.
        began: the access before that pass.

    >>> start = History.empty(CacheShape(layers=1, experts=4, slots=2))
    >>> now = start.touched(Access(0, (1, 3), step=0))
    >>> now, decision = now.served(Access(0, (1, 3), step=0), lambda: now.last_P)
    >>> decision.fetch, now.held_P.tolist(), start.held_P.any()
    (((0, 1), (0, 3)), [False, True, False, True], np.False_)

    Source: none; plain bookkeeping.
    """

    sizes: CacheShape
    held_P: np.ndarray
    last_P: np.ndarray
    count_P: np.ndarray
    tick: int = 0
    step: int = -1
    began: int = 0

    @classmethod
    def empty(cls, sizes: CacheShape) -> "History":
        """Nothing is held, nothing was used."""
        pages = sizes.layers * sizes.experts
        return cls(sizes, np.zeros(pages, bool), np.zeros(pages, np.int64), np.zeros(pages))

    def pages(self, access: Access) -> np.ndarray:
        """The numbers among all P of what is asked for.

        Raises:
            UsageError: an access that the sizes do not fit.
        """
        sizes, experts = self.sizes, access.experts
        fits = 0 <= access.layer < sizes.layers and len(experts) <= sizes.slots
        if not fits or any(not 0 <= one < sizes.experts for one in experts) or len(set(experts)) != len(experts):
            got = f"layer {access.layer}, experts {experts}"
            allowed = f"be of {sizes.layers} layers, at most {sizes.slots} different experts of {sizes.experts}"
            raise UsageError(word("the access", got=got, allowed=allowed, where=_WHERE, fix="split it, or add slots"))
        return access.layer * sizes.experts + np.array(experts, np.int64)

    def touched(self, access: Access, keep: float = 1.0) -> "History":
        """After these experts are used: each counts one more, what it had times ``keep`` for each access since."""
        page_K, tick = self.pages(access), self.tick + 1
        last_P, count_P = self.last_P.copy(), self.count_P.copy()
        count_P[page_K] = 1 + count_P[page_K] * keep ** (tick - last_P[page_K])
        last_P[page_K] = tick
        began = self.tick if access.step != self.step else self.began
        return dataclasses.replace(self, last_P=last_P, count_P=count_P, tick=tick, step=access.step, began=began)

    def served(
        self, access: Access, worth: Callable[[], np.ndarray], wish: Sequence[int] = (), below: float = np.inf
    ) -> tuple["History", Decision]:
        """What to give up and fetch: always the expert that is worth least, the first among equals.

        Args:
            access: what is asked for; it is neither given up nor wished for.
            worth: gives (P,) what each is worth; asked where something has to go.
            wish: further experts to fetch, the most urgent first; one of them takes a free slot, or that of an expert
                that is worth less than it, and less than ``below``.
            below: see there.
        """
        sizes, held_P, page_K = self.sizes, self.held_P.copy(), self.pages(access)
        missing = page_K[~held_P[page_K]]
        asked_P = np.zeros(len(held_P), bool)
        asked_P[page_K] = True
        evict: list[int] = []
        spare = np.nonzero(self._pool(held_P, access.layer) & ~asked_P)[0]
        over = int(self._pool(held_P, access.layer).sum()) + len(missing) - sizes.slots
        worth_P = worth() if over > 0 or wish else np.zeros(0)
        if over > 0:
            evict += spare[np.argsort(worth_P[spare], kind="stable")[:over]].tolist()
            held_P[evict] = False
        held_P[missing] = True
        fetched: list[int] = []
        for page in wish:
            pool_P = self._pool(held_P, int(page) // sizes.experts)
            if held_P[page]:
                continue
            if int(pool_P.sum()) >= sizes.slots:
                spare = np.nonzero(pool_P & ~asked_P)[0]
                victim = int(spare[np.argmin(worth_P[spare])]) if len(spare) else -1
                if victim < 0 or worth_P[victim] >= min(below, worth_P[page]):
                    continue
                held_P[victim] = False
                evict += [victim]
            held_P[page] = asked_P[page] = True
            fetched.append(int(page))
        decision = Decision(*(tuple(divmod(int(p), sizes.experts) for p in each) for each in (evict, missing, fetched)))
        return dataclasses.replace(self, held_P=held_P), decision

    def _pool(self, held_P: np.ndarray, layer: int) -> np.ndarray:
        """(P,) bool, what is held in the slots that this layer may use."""
        if self.sizes.shared:
            return held_P
        own_P = np.zeros(len(held_P), bool)
        first = layer * self.sizes.experts
        own_P[first : first + self.sizes.experts] = held_P[first : first + self.sizes.experts]
        return own_P

    def worths(self, worth: "Worth", layer: int, told_P: np.ndarray | None = None) -> np.ndarray:
        """(P,) what each is worth at an access of this layer, by a rule of what is remembered."""
        told_P = np.zeros(len(self.held_P)) if told_P is None else told_P
        left = self.sizes.layers - 1 - layer
        return worth(Seen(self.last_P, self.count_P, told_P, self.until(layer), left, self.tick, self.began))

    def until(self, layer: int) -> np.ndarray:
        """(P,) how many layers from now each expert's turn comes: 1 for the next layer's, L for this one's."""
        layer_P = np.arange(len(self.held_P)) // self.sizes.experts
        return (layer_P - layer - 1) % self.sizes.layers + 1


class _Ruled(Protocol):
    """A policy that is a rule of worth, and what a use counts an access later."""

    keep: float

    @property
    def worth(self) -> Worth: ...


def by_worth(policy: _Ruled, state: History, access: Access) -> tuple[History, Decision]:
    """Fetches what is missing, nothing before its time; what is worth least gives up its slot.

    A policy that is a rule of worth has this as its ``update``, and ``profile_P`` where it was told something.
    """
    now, told_P = state.touched(access, policy.keep), getattr(policy, "profile_P", None)
    return now.served(access, functools.partial(now.worths, policy.worth, access.layer, told_P))


def other_text(state: _State, sequence: int, begun: Callable[[], _State]) -> _State:
    """What is remembered of another text, its own from before where it comes again, with what the cache holds now.

    A server reads parts of prompts between steps, so that texts take turns.

    Args:
        state: a frozen dataclass with ``history``, ``sequence`` and ``aside``, what is remembered of other texts.
        sequence: the text's number.
        begun: gives what is remembered of a text that begins.
    """
    found = next((one for one in state.aside if one.sequence == sequence), None)
    others = [one for one in state.aside if one is not found]
    aside = (*others, dataclasses.replace(state, aside=()))[-_ASIDE:]
    return dataclasses.replace(begun() if found is None else found, history=state.history, aside=aside)
