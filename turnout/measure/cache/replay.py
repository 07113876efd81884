"""A replay: recorded accesses through a policy, and what it fetched when."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from turnout.errors import UsageError, word
from turnout.measure.cache.compiled import by_foresight, jitted, jitted_by_worth, jitted_worth, timed, used_in_time
from turnout.types.accesses import Accesses
from turnout.types.expert_cache import CachePolicy, CacheShape

__all__ = ["Replay", "Timing", "following", "replay", "replays"]

_WHERE = "turnout.measure.replay"
_NEVER = np.int64(1) << 60  # the time of a use that does not come


@dataclasses.dataclass(frozen=True, eq=False)
class Replay:
    """What a policy did at each access; experts as numbers layer E + expert.

    Args:
        accesses: what was asked for.
        sizes: of the cache.
        fetch_J: (I + 1,) where each access's entries of ``fetch_R`` begin.
        fetch_R: what was fetched because it was asked for and not held.
        prefetch_J: (I + 1,) the same of ``prefetch_R``.
        prefetch_R: what was fetched before it was asked for.

    >>> told = Accesses.of_paths(np.array([[[0]], [[1]], [[0]]]), experts=2)
    >>> sizes, none = CacheShape(1, 2, 1), np.zeros(0, np.int64)
    >>> found = Replay(told, sizes, np.arange(4), np.array([0, 1, 0]), np.zeros(4, np.int64), none)
    >>> found.fetches, found.hit_rate
    (3, 0.0)

    Source: none; plain bookkeeping.
    """

    accesses: Accesses
    sizes: CacheShape
    fetch_J: np.ndarray
    fetch_R: np.ndarray
    prefetch_J: np.ndarray
    prefetch_R: np.ndarray

    @property
    def misses(self) -> int:
        """Experts that were waited for from the beginning of their fetch."""
        return len(self.fetch_R)

    @property
    def prefetches(self) -> int:
        """Experts fetched before they were asked for."""
        return len(self.prefetch_R)

    @property
    def fetches(self) -> int:
        """All experts fetched, which is what Belady's rule bounds."""
        return self.misses + self.prefetches

    @property
    def hit_rate(self) -> float:
        """The share of experts asked for that were held then, or under way."""
        return 1 - self.misses / max(1, len(self.accesses.expert_R))

    @property
    def moved_rate(self) -> float:
        """1 less all fetches over the experts asked for; no policy's is above Belady's."""
        return 1 - self.fetches / max(1, len(self.accesses.expert_R))

    @property
    def accuracy(self) -> float | None:
        """The share of prefetched experts that were asked for before they were fetched again; None without any."""
        if not self.prefetches:
            return None
        return jitted(used_in_time)(*self._arrays()) / self.prefetches

    def timing(self, *, fetch_s: float, compute_s: float) -> "Timing":
        """How long it takes where one expert comes in ``fetch_s`` and a layer's pass takes ``compute_s``."""
        seconds, waited, late = jitted(timed)(*self._arrays(), fetch_s, compute_s)
        return Timing(float(seconds), float(waited), int(late))

    def _arrays(self) -> tuple[np.ndarray | int, ...]:
        told = self.accesses
        pages = self.sizes.layers * self.sizes.experts
        return told.start_J, told.page_R, self.fetch_J, self.fetch_R, self.prefetch_J, self.prefetch_R, pages


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a replay takes.

    Args:
        seconds: from the first access to the end of the last pass.
        waited_s: of those, spent waiting for experts.
        late: experts that were under way, or about to be, when they were asked for.

    >>> Timing(2.0, 0.5, 3).waited_s
    0.5

    Source: none; plain bookkeeping.
    """

    seconds: float
    waited_s: float
    late: int


def replay(
    accesses: Accesses, policy: CachePolicy, sizes: CacheShape, *, ahead: int = 0, compiled: bool = True
) -> Replay:
    """What a policy does with recorded accesses.

    Args:
        accesses: what is asked for.
        policy: of the cache.
        sizes: of the cache; as many layers and experts as the accesses have.
        ahead: how many further accesses of the same pass the policy is told of.
        compiled: whether a policy that offers a rule of worth or a foresight is replayed by that, which gives the same
            decisions in less time; its ``update`` is called access by access otherwise.

    Returns:
        What was fetched.

    Raises:
        UsageError: a cache that does not hold the largest access, or of another model.

    >>> from turnout.types.expert_cache import Decision
    >>> class Never:  # holds what is asked for and nothing else
    ...     def init(self, sizes):
    ...         return ()
    ...     def update(self, state, access):
    ...         asked = tuple((access.layer, expert) for expert in access.experts)
    ...         gone = tuple(page for page in state if page not in asked)
    ...         return asked, Decision(gone, tuple(page for page in asked if page not in state))
    >>> told = Accesses.of_paths(np.array([[[0]], [[1]], [[1]]]), experts=2)
    >>> replay(told, Never(), CacheShape(1, 2, 1)).misses
    2

    Source: none; plain bookkeeping.
    """
    _fits(accesses, sizes)
    if compiled and hasattr(policy, "worth"):
        return _by_worth(accesses, policy, sizes, ahead)
    if compiled and hasattr(policy, "foretell"):
        return replays(accesses, policy, [sizes])[0]
    state = policy.init(sizes)
    fetches: list[int] = []
    prefetches: list[int] = []
    ends = [(0, 0)]
    for at in range(len(accesses)):
        state, decision = policy.update(state, accesses.access(at, ahead))
        fetches += [layer * sizes.experts + expert for layer, expert in decision.fetch]
        prefetches += [layer * sizes.experts + expert for layer, expert in decision.prefetch]
        ends.append((len(fetches), len(prefetches)))
    fetch_J, prefetch_J = np.array(ends, np.int64).T.copy()
    return Replay(accesses, sizes, fetch_J, np.array(fetches, np.int64), prefetch_J, np.array(prefetches, np.int64))


def _fits(accesses: Accesses, sizes: CacheShape) -> None:
    if sizes.slots < accesses.most:
        fix = f"give it slots={accesses.most}, or read fewer streams at once"
        raise UsageError(word("slots", got=sizes.slots, allowed="hold the largest access", where=_WHERE, fix=fix))
    if (sizes.layers, sizes.experts) != (accesses.layers, accesses.experts):
        got, allowed = f"{sizes.layers} x {sizes.experts}", f"be the accesses' {accesses.layers} x {accesses.experts}"
        raise UsageError(word("the sizes", got=got, allowed=allowed, where=_WHERE, fix="take them from the trace"))


def _by_worth(accesses: Accesses, policy: Any, sizes: CacheShape, ahead: int) -> Replay:
    page_R, pages = accesses.page_R, sizes.layers * sizes.experts
    next_R, first_P = following(accesses)
    profile_P = getattr(policy, "profile_P", None)
    looks = hasattr(policy, "prefetch")  # no other is told of what comes; that nothing is known is no number
    ahead = ahead if looks else 0
    steps_I = np.append(accesses.step_I, -1)
    last_I = np.nonzero(steps_I[1:] != steps_I[:-1])[0]
    end_I = last_I[np.searchsorted(last_I, np.arange(len(accesses)))]
    shape = (sizes.layers, sizes.experts, sizes.slots, sizes.shared)
    fetch_R, room = np.empty(len(page_R), np.int64), len(page_R) if ahead else 0
    fetch_J, prefetch_J = np.zeros(len(accesses) + 1, np.int64), np.zeros(len(accesses) + 1, np.int64)
    while True:
        nothing_P = np.full(pages, -np.inf if looks else 0.0)
        told_P = nothing_P if profile_P is None else np.asarray(profile_P, np.float64).copy()
        prefetch_R = np.empty(room, np.int64)
        early = bool(ahead and policy.prefetch)
        told = (accesses.layer_I, accesses.start_J, page_R, next_R, end_I)
        out = (fetch_J, fetch_R, prefetch_J, prefetch_R)
        rule, run = jitted_worth(policy.worth), jitted_by_worth()
        if run(told, shape, float(policy.keep), told_P, first_P.copy(), ahead, early, rule, out):
            break
        room *= 2
    return Replay(accesses, sizes, fetch_J, fetch_R[: fetch_J[-1]].copy(), prefetch_J, prefetch_R[: prefetch_J[-1]])


def following(accesses: Accesses) -> tuple[np.ndarray, np.ndarray]:
    """(R,) the access that asks for each entry's expert again, and (P,) that asks for each first; far away for none."""
    page_R, pages = accesses.page_R, accesses.layers * accesses.experts
    at_R = np.repeat(np.arange(len(accesses)), np.diff(accesses.start_J))
    order_R = np.argsort(page_R, kind="stable")
    sorted_R, when_R = page_R[order_R], at_R[order_R]
    next_R, first_P = np.full(len(page_R), _NEVER), np.full(pages, _NEVER)
    same = sorted_R[1:] == sorted_R[:-1]
    next_R[order_R[:-1][same]] = when_R[1:][same]
    heads = np.concatenate([[True], ~same])[: len(page_R)]
    first_P[sorted_R[heads]] = when_R[heads]
    return next_R, first_P


def replays(accesses: Accesses, policy: Any, sizes: Sequence[CacheShape]) -> list[Replay]:
    """A policy that foretells, in caches of several sizes at once: what it foresees does not hang on what is held.

    Args:
        accesses: what is asked for.
        policy: one with ``foretell(state, access) -> (state, worth_P, wish)``.
        sizes: of the caches.

    Returns:
        One for each.

    Raises:
        UsageError: a cache that does not hold the largest access, or of another model.

    >>> from turnout.measure.cache.replay import replays
    >>> replays(Accesses.of_paths(np.array([[[0]]]), experts=2), None, [])
    []

    Source: none; plain bookkeeping.
    """
    if not sizes:
        return []
    for each in sizes:
        _fits(accesses, each)
    serve, state = jitted(by_foresight), policy.init(sizes[0])
    held_CP = np.zeros((len(sizes), sizes[0].layers * sizes[0].experts), bool)
    shapes = [(each.layers, each.experts, each.slots, each.shared) for each in sizes]
    page_R, start_J = accesses.page_R, accesses.start_J
    fetch_K, prefetch_W = np.empty(max(1, accesses.most), np.int64), np.empty(held_CP.shape[1], np.int64)
    found: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in sizes]
    counts = np.zeros((len(sizes), 2, len(accesses) + 1), np.int64)
    for at in range(len(accesses)):
        state, worth_P, wish = policy.foretell(state, accesses.access(at))
        page_K, wish_W = page_R[start_J[at] : start_J[at + 1]], np.asarray(wish, np.int64)
        for c, shape in enumerate(shapes):
            fetched, early = serve(
                held_CP[c], int(accesses.layer_I[at]), page_K, worth_P, wish_W, shape, fetch_K, prefetch_W
            )
            counts[c, :, at + 1] = fetched, early
            found[c][0].append(fetch_K[:fetched].copy())
            found[c][1].append(prefetch_W[:early].copy())
    ends = counts.cumsum(2)
    return [
        Replay(accesses, each, ends[c, 0], np.concatenate(found[c][0]), ends[c, 1], np.concatenate(found[c][1]))
        for c, each in enumerate(sizes)
    ]
