"""The compiled twin of a replay: the same loop over numbers, by numba where it is installed."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np

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
    types = numba.types
    whole, real, shape = types.int64[::1], types.float64[::1], types.Tuple([types.int64] * 3 + [types.boolean])
    tables = [whole] * 6 + [shape, types.float64, real, types.int64, types.boolean]
    return numba.njit(types.boolean(*tables, _worth_type(numba), *[whole] * 4))(by_worth)


def _worth_type(numba: Any) -> Any:
    whole, real, one = numba.types.int64[::1], numba.types.float64[::1], numba.types.int64
    return numba.types.FunctionType(real(whole, real, real, whole, one, one, one))


@functools.cache
def jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled where numba is there, and as it is otherwise: the numbers are the same.

    >>> jitted(why_plain) is why_plain or why_plain() is None
    True

    Source: none; numba.
    """
    return function if why_plain() else importlib.import_module("numba").njit(function)


def by_worth(
    layer_I: np.ndarray,
    start_J: np.ndarray,
    page_R: np.ndarray,
    next_R: np.ndarray,
    first_P: np.ndarray,
    end_I: np.ndarray,
    shape: tuple[int, int, int, bool],
    keep: float,
    told_P: np.ndarray,
    ahead: int,
    prefetch: bool,
    worth: Callable[..., np.ndarray],
    fetch_J: np.ndarray,
    fetch_R: np.ndarray,
    prefetch_J: np.ndarray,
    prefetch_R: np.ndarray,
) -> bool:
    """What ``History`` does access by access, for a rule of worth; False where ``prefetch_R`` is too short.

    Args:
        layer_I: the layer of each access.
        start_J: where its pages begin.
        page_R: the pages asked for.
        next_R: the access that asks for each again.
        first_P: the access that asks for each page first.
        end_I: the last access of the same pass.
        shape: layers, experts, slots, shared.
        keep: what a use counts an access later.
        told_P: what the policy was told beforehand; overwritten where ``ahead`` says that more is known.
        ahead: how many accesses of the same pass are known; 0 for none.
        prefetch: whether what is known to come is fetched.
        worth: the rule.
        fetch_J: (I + 1,) out.
        fetch_R: out, as long as page_R.
        prefetch_J: (I + 1,) out.
        prefetch_R: out.
    """
    layers, experts, slots, shared = shape
    pages = layers * experts
    held_P, asked_P = np.zeros(pages, np.bool_), np.zeros(pages, np.bool_)
    last_P, count_P, next_P = np.zeros(pages, np.int64), np.zeros(pages), first_P.copy()
    until_P, lowest_K = np.zeros(pages, np.int64), np.zeros(pages, np.int64)
    held_L = np.zeros(layers, np.int64)  # how many of each layer; of all in the first where they share
    fetched, early, began = 0, 0, 0
    for at in range(len(layer_I)):
        layer, tick = layer_I[at], at + 1
        if at > 0 and end_I[at] != end_I[at - 1]:
            began = at
        pool = 0 if shared else layer
        begin, end = (0, pages) if shared else (layer * experts, (layer + 1) * experts)
        missing = 0
        for r in range(start_J[at], start_J[at + 1]):
            page = page_R[r]
            count_P[page] = 1 + count_P[page] * keep ** (tick - last_P[page])
            last_P[page], next_P[page], asked_P[page] = tick, next_R[r], True
            missing += 0 if held_P[page] else 1
        over = held_L[pool] + missing - slots
        known = min(at + ahead, end_I[at])
        if over > 0 or (prefetch and known > at):
            both = prefetch and known > at
            for each in range(layers) if shared or both else range(layer, layer + 1):
                until_P[each * experts : (each + 1) * experts] = (each - layer - 1) % layers + 1
            if ahead > 0:
                for page in range(0 if both else begin, pages if both else end):
                    told_P[page] = -(next_P[page] + 1.0) if next_P[page] <= known else -np.inf
        if over > 0:
            worth_P = worth(last_P[begin:end], count_P[begin:end], told_P[begin:end], until_P[begin:end],
                            layers - 1 - layer, tick, began)  # fmt: skip
            found = 0  # of the lowest, ascending; a later page does not pass an equal one
            for page in range(begin, end):
                if held_P[page] and not asked_P[page]:
                    value = worth_P[page - begin]
                    if found == over and value >= worth_P[lowest_K[over - 1] - begin]:
                        continue
                    spot = found if found < over else over - 1
                    while spot > 0 and worth_P[lowest_K[spot - 1] - begin] > value:
                        lowest_K[spot] = lowest_K[spot - 1]
                        spot -= 1
                    lowest_K[spot] = page
                    found = min(found + 1, over)
            for k in range(over):
                held_P[lowest_K[k]] = False
            held_L[pool] -= over
        for r in range(start_J[at], start_J[at + 1]):
            if not held_P[page_R[r]]:
                held_P[page_R[r]] = True
                fetch_R[fetched] = page_R[r]
                fetched += 1
        held_L[pool] += missing
        first_early = early
        if prefetch and known > at:
            worth_P = worth(last_P, count_P, told_P, until_P, layers - 1 - layer, tick, began)
            for r in range(start_J[at + 1], start_J[known + 1]):
                page = page_R[r]
                if held_P[page]:
                    continue
                pool = 0 if shared else page // experts
                begin, end = (0, pages) if shared else (pool * experts, (pool + 1) * experts)
                if held_L[pool] >= slots:
                    victim = -1
                    for each in range(begin, end):
                        if held_P[each] and not asked_P[each]:
                            if victim < 0 or worth_P[each] < worth_P[victim]:
                                victim = each
                    if victim < 0 or told_P[victim] > -np.inf:  # known to come: Belady's rule would not give it up yet
                        continue
                    held_P[victim] = False
                    held_L[pool] -= 1
                held_P[page] = asked_P[page] = True
                held_L[pool] += 1
                if early == len(prefetch_R):
                    return False
                prefetch_R[early] = page
                early += 1
        for r in range(start_J[at], start_J[at + 1]):
            asked_P[page_R[r]] = False
        for r in range(first_early, early):
            asked_P[prefetch_R[r]] = False
        fetch_J[at + 1], prefetch_J[at + 1] = fetched, early
    return True


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
    pages = layers * experts
    asked_P = np.zeros(pages, np.bool_)
    begin, end = (0, pages) if shared else (layer * experts, (layer + 1) * experts)
    fetched, early, count = 0, 0, 0
    for page in page_K:
        asked_P[page] = True
        if not held_P[page]:
            fetch_K[fetched] = page
            fetched += 1
    for page in range(begin, end):
        count += 1 if held_P[page] else 0
    for _ in range(count + fetched - slots):
        victim = -1
        for page in range(begin, end):
            if held_P[page] and not asked_P[page]:
                if victim < 0 or worth_P[page] < worth_P[victim]:
                    victim = page
        held_P[victim] = False
    for k in range(fetched):
        held_P[fetch_K[k]] = True
    for page in wish_W:
        if held_P[page]:
            continue
        pool = page // experts
        begin, end = (0, pages) if shared else (pool * experts, (pool + 1) * experts)
        victim, count = -1, 0
        for each in range(begin, end):
            if held_P[each]:
                count += 1
                if not asked_P[each] and (victim < 0 or worth_P[each] < worth_P[victim]):
                    victim = each
        if count >= slots:
            if victim < 0 or worth_P[victim] >= worth_P[page]:
                continue
            held_P[victim] = False
        held_P[page] = asked_P[page] = True
        prefetch_W[early] = page
        early += 1
    return fetched, early


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
