"""The compiled twin of a replay: the same loop over numbers, by numba where it is installed."""

import functools
import importlib
import importlib.util
import os
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from turnout.types.expert_cache import Seen

__all__ = [
    "by_foresight",
    "by_worth",
    "jitted",
    "jitted_by_worth",
    "jitted_worth",
    "timed",
    "used_in_time",
    "why_plain",
]


@functools.cache
def why_plain() -> str | None:
    """Why replays are not compiled; None where they are.

    >>> why_plain() is None or "numba" in why_plain() or "TURNOUT_COMPILED" in why_plain()
    True

    Source: none; plain bookkeeping.
    """
    if os.environ.get("TURNOUT_COMPILED") == "0":
        return "TURNOUT_COMPILED=0 is set"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install 'turnout[cpu]'"
    try:
        importlib.import_module("numba")
    except Exception as error:  # an import that fails may fail in any way: it refuses a numpy, or a library is missing
        return f"numba cannot be imported: {error}"
    return None


@functools.cache
def jitted_worth(worth: Callable[..., Any]) -> Callable[..., Any]:
    """A rule of worth, compiled by itself, so that the replay around it is compiled once for all of them.

    Source: none; numba.
    """
    if why_plain():
        return worth
    numba = importlib.import_module("numba")
    return numba.njit(_worth_type(numba).signature)(worth)


@functools.cache
def jitted_by_worth() -> Callable[..., Any]:
    """``by_worth``, compiled for whatever rule ``jitted_worth`` gives.

    Source: none; numba.
    """
    if why_plain():
        return by_worth
    numba = importlib.import_module("numba")
    whole, real, one = numba.types.int64[::1], numba.types.float64[::1], numba.types.int64
    told, shape = numba.types.UniTuple(whole, 5), numba.types.Tuple([one, one, one, numba.types.boolean])
    tables = [told, shape, numba.types.float64, real, whole, one, numba.types.boolean]
    signature = numba.types.boolean(*tables, _worth_type(numba), numba.types.UniTuple(whole, 4))
    return numba.njit(signature)(with_compiled(by_worth))


def _worth_type(numba: Any) -> Any:
    whole, real, one = numba.types.int64[::1], numba.types.float64[::1], numba.types.int64
    seen = numba.types.NamedTuple([whole, real, real, whole, one, one, one], Seen)
    return numba.types.FunctionType(real(seen))


@functools.cache
def jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled where numba is there, and as it is otherwise: the numbers are the same.

    >>> jitted(_over)(np.array([1]), np.array([True, False]), 0, 1)
    1

    Source: none; numba.
    """
    return function if why_plain() else importlib.import_module("numba").njit(with_compiled(function))


def with_compiled(function: Any) -> Callable[..., Any]:
    """The function where every other of this file that it calls is compiled.

    Source: none; numba, which sees functions and not what calls them.
    """
    names = [name for name in function.__code__.co_names if isinstance(globals().get(name), types.FunctionType)]
    known = function.__globals__ | {name: jitted(globals()[name]) for name in names}
    return types.FunctionType(function.__code__, known, function.__name__)


def by_worth(
    told: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    shape: tuple[int, int, int, bool],
    keep: float,
    told_P: np.ndarray,
    next_P: np.ndarray,
    ahead: int,
    prefetch: bool,
    worth: Callable[..., np.ndarray],
    out: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> bool:
    """What ``History`` does access by access, for a rule of worth; False where ``prefetch_R`` is too short.

    Args:
        told: (I,) layers, (I + 1,) where each access's pages begin, (R,) the pages, (R,) the access that asks for each
            again, (I,) the last access of the same pass.
        shape: layers, experts, slots, shared.
        keep: what a use counts an access later.
        told_P: what the policy was told; overwritten where ``ahead`` is not 0. ``next_P`` is too.
        next_P: the access that asks for each page first.
        ahead: how many accesses of the same pass are known; 0 for none.
        prefetch: whether it fetches what is known to come, by the rule ``worth``.
        out: ``fetch_J``, ``fetch_R``, ``prefetch_J``, ``prefetch_R``.
    """
    layer_I, start_J, page_R, next_R, end_I = told
    fetch_J, fetch_R, prefetch_J, prefetch_R = out
    (layers, experts, slots, shared), pages, fetched, early, began = shape, shape[0] * shape[1], 0, 0, 0
    held_P, asked_P, last_P = np.zeros(pages, np.bool_), np.zeros(pages, np.bool_), np.zeros(pages, np.int64)
    count_P, until_P, lowest_K = np.zeros(pages), np.zeros(pages, np.int64), np.zeros(pages, np.int64)
    for at in range(len(layer_I)):
        layer, tick, known = layer_I[at], at + 1, min(at + ahead, end_I[at])
        began = at if at > 0 and end_I[at] != end_I[at - 1] else began
        begin, end = (0, pages) if shared else (layer * experts, (layer + 1) * experts)
        for r in range(start_J[at], start_J[at + 1]):
            page = page_R[r]
            count_P[page] = 1 + count_P[page] * keep ** (tick - last_P[page])
            last_P[page], next_P[page], asked_P[page] = tick, next_R[r], True
        over = _over(page_R[start_J[at] : start_J[at + 1]], held_P[begin:end], begin, slots)
        if over > 0 or (prefetch and known > at):
            _see(layer, known if ahead > 0 else -1, (layers, experts), until_P, next_P, told_P)
        if over > 0:
            worth_P = worth(Seen(last_P[begin:end], count_P[begin:end], told_P[begin:end], until_P[begin:end],
                                 layers - 1 - layer, tick, began))  # fmt: skip
            _give_up(over, held_P[begin:end], asked_P[begin:end], worth_P, lowest_K)
        for r in range(start_J[at], start_J[at + 1]):
            if not held_P[page_R[r]]:
                held_P[page_R[r]], fetch_R[fetched] = True, page_R[r]
                fetched += 1
        first = early
        if prefetch and known > at:
            worth_P = worth(Seen(last_P, count_P, told_P, until_P, layers - 1 - layer, tick, began))
            wish_W = page_R[start_J[at + 1] : start_J[known + 1]]
            if early + len(wish_W) > len(prefetch_R):
                return False
            early += _fetch_early(wish_W, held_P, asked_P, worth_P, shape, -1e14, prefetch_R[first:])
        asked_P[page_R[start_J[at] : start_J[at + 1]]] = False
        asked_P[prefetch_R[first:early]] = False
        fetch_J[at + 1], prefetch_J[at + 1] = fetched, early
    return True


def _over(page_K: np.ndarray, held_P: np.ndarray, begin: int, slots: int) -> int:
    """How many of a pool's pages have to go; ``held_P`` is the pool's part, which begins at ``begin``."""
    count = 0
    for held in held_P:
        count += 1 if held else 0
    for page in page_K:
        count += 0 if held_P[page - begin] else 1
    return count - slots


def _see(
    layer: int, known: int, shape: tuple[int, int], until_P: np.ndarray, next_P: np.ndarray, told_P: np.ndarray
) -> None:
    """How far away each page's turn is, and when it is asked for again if that is known."""
    layers, experts = shape
    for each in range(layers):
        until_P[each * experts : (each + 1) * experts] = (each - layer - 1) % layers + 1
    if known >= 0:
        for page in range(layers * experts):
            told_P[page] = -(next_P[page] + 1.0) if next_P[page] <= known else -np.inf


def _give_up(over: int, held_P: np.ndarray, asked_P: np.ndarray, worth_P: np.ndarray, lowest_K: np.ndarray) -> None:
    """The ``over`` pages of one pool that are worth least go, the first among equals."""
    found = 0  # of the lowest, ascending; a later page does not pass an equal one
    for page in range(len(held_P)):
        if held_P[page] and not asked_P[page]:
            value = worth_P[page]
            if found == over and value >= worth_P[lowest_K[over - 1]]:
                continue
            spot = found if found < over else over - 1
            while spot > 0 and worth_P[lowest_K[spot - 1]] > value:
                lowest_K[spot] = lowest_K[spot - 1]
                spot -= 1
            lowest_K[spot] = page
            found = min(found + 1, over)
    for k in range(over):
        held_P[lowest_K[k]] = False


def _fetch_early(
    wish_W: np.ndarray,
    held_P: np.ndarray,
    asked_P: np.ndarray,
    worth_P: np.ndarray,
    shape: tuple[int, int, int, bool],
    below: float,
    prefetch_R: np.ndarray,
) -> int:
    """The wishes of ``History.served``; how many entries of the last it has written."""
    layers, experts, slots, shared = shape
    early = 0
    for page in wish_W:
        if held_P[page]:
            continue
        pool = page // experts
        begin, end = (0, layers * experts) if shared else (pool * experts, (pool + 1) * experts)
        victim, count = -1, 0
        for each in range(begin, end):
            if held_P[each]:
                count += 1
                if not asked_P[each] and (victim < 0 or worth_P[each] < worth_P[victim]):
                    victim = each
        if count >= slots:
            if victim < 0 or worth_P[victim] >= min(below, worth_P[page]):
                continue
            held_P[victim] = False
        held_P[page] = asked_P[page] = True
        prefetch_R[early] = page
        early += 1
    return early


def by_foresight(
    held_P: np.ndarray,
    layer: int,
    page_K: np.ndarray,
    worth_P: np.ndarray,
    wish_W: np.ndarray,
    shape: tuple[int, int, int, bool],
    fetch_K: np.ndarray,
    prefetch_W: np.ndarray,
) -> tuple[int, int]:
    """One access of what ``History.served`` does, in place; how many entries of the last two it has written.

    Args:
        held_P: what is held.
        layer: of the access.
        page_K: what is asked for.
        worth_P: of each page.
        wish_W: what is wished for.
        shape: layers, experts, slots, shared.
        fetch_K: out.
        prefetch_W: out.
    """
    layers, experts, slots, shared = shape
    asked_P, lowest_K = np.zeros(layers * experts, np.bool_), np.zeros(layers * experts, np.int64)
    begin, end = (0, layers * experts) if shared else (layer * experts, (layer + 1) * experts)
    fetched, over = 0, _over(page_K, held_P[begin:end], begin, slots)
    asked_P[page_K] = True
    if over > 0:
        _give_up(over, held_P[begin:end], asked_P[begin:end], worth_P[begin:end], lowest_K)
    for page in page_K:
        if not held_P[page]:
            held_P[page], fetch_K[fetched] = True, page
            fetched += 1
    return fetched, _fetch_early(wish_W, held_P, asked_P, worth_P, shape, np.inf, prefetch_W)


def used_in_time(
    start_J: np.ndarray,
    page_R: np.ndarray,
    fetch_J: np.ndarray,
    fetch_R: np.ndarray,
    prefetch_J: np.ndarray,
    prefetch_R: np.ndarray,
    pages: int,
) -> int:
    """How many of ``prefetch_R`` were asked for before they were fetched again; arguments as in ``Replay``."""
    waiting_P = np.zeros(pages, np.bool_)
    right = 0
    for at in range(len(start_J) - 1):
        for r in range(fetch_J[at], fetch_J[at + 1]):
            waiting_P[fetch_R[r]] = False
        for r in range(start_J[at], start_J[at + 1]):
            right += 1 if waiting_P[page_R[r]] else 0
            waiting_P[page_R[r]] = False
        for r in range(prefetch_J[at], prefetch_J[at + 1]):
            waiting_P[prefetch_R[r]] = True
    return right


def timed(
    start_J: np.ndarray,
    page_R: np.ndarray,
    fetch_J: np.ndarray,
    fetch_R: np.ndarray,
    prefetch_J: np.ndarray,
    prefetch_R: np.ndarray,
    pages: int,
    fetch_s: float,
    compute_s: float,
) -> tuple[float, float, int]:
    """Seconds in all, seconds waited, and experts that were under way when they were asked for.

    One fetch after the other, each ``fetch_s``. What is asked for goes before what is only foreseen and has not begun;
    a fetch that has begun goes on. A pass begins when all its experts are there, and takes ``compute_s``.
    """
    clock, free, waited, late, head = 0.0, 0.0, 0.0, 0, 0
    ready_P, entry_P = np.zeros(pages), np.full(pages, -1)
    since_R = np.zeros(len(prefetch_R))
    for at in range(len(start_J) - 1):
        while head < prefetch_J[at] and max(free, since_R[head]) < clock:
            page = prefetch_R[head]
            if entry_P[page] == head:
                free = max(free, since_R[head]) + fetch_s
                ready_P[page], entry_P[page] = free, -1
            head += 1
        for r in range(fetch_J[at], fetch_J[at + 1]):
            free = max(free, clock) + fetch_s
            ready_P[fetch_R[r]], entry_P[fetch_R[r]] = free, -1
        begin = clock
        asked_late = 0
        for r in range(start_J[at], start_J[at + 1]):
            page = page_R[r]
            if entry_P[page] >= 0:
                free = max(free, clock) + fetch_s
                ready_P[page], entry_P[page] = free, -1
            if ready_P[page] > clock:
                asked_late += 1
            begin = max(begin, ready_P[page])
        late += asked_late - (fetch_J[at + 1] - fetch_J[at])
        for r in range(prefetch_J[at], prefetch_J[at + 1]):
            since_R[r] = clock
            ready_P[prefetch_R[r]], entry_P[prefetch_R[r]] = np.inf, r
        waited += begin - clock
        clock = begin + compute_s
    return clock, waited, late
