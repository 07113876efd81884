"""The report of a cache of experts: every policy at every size, the bound, and which one to take."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from turnout.errors import UsageError, word
from turnout.measure.cache.compiled import why_plain
from turnout.measure.cache.replay import Replay, replay, replays
from turnout.types.accesses import Accesses
from turnout.types.expert_cache import CacheShape
from turnout.types.report import Report, Value

__all__ = ["Contender", "cache_report"]

BOUND = "belady"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A policy in a comparison.

    Args:
        name: what it is called.
        policy: itself; None for the bound, which needs to know what comes.
        ahead: how many further accesses of a pass it is told of.
        needs: what a model must have for it, in words; empty where any model will do.
        learnt: whether it learnt from other documents.

    >>> Contender("lru", object()).needs
    ''

    Source: none; plain bookkeeping.
    """

    name: str
    policy: Any
    ahead: int = 0
    needs: str = ""
    learnt: bool = False


def cache_report(
    accesses: Accesses,
    contenders: Sequence[Contender],
    sizes: Sequence[CacheShape],
    *,
    fetch_s: float,
    compute_s: float,
    best: Any,
) -> Report:
    """What every policy fetches and waits for at every size, beside the bound, and which to take at each size.

    ``hit_rate``: the share of experts asked for that are there or under way. ``moved_rate``: 1 less the fetches, early
    ones too, over the experts asked for; none is above the bound's. ``seconds``: with one fetch after the other; none
    is below the larger of the passes' own time and that of the bound's fetches. Recommended is the fastest of those
    that any model can have, the first in the list where it is within 1 %.

    Args:
        accesses: of documents that no policy learnt from.
        contenders: the policies, simple ones first.
        sizes: of the caches.
        fetch_s: how long one expert takes to come.
        compute_s: how long one layer's pass takes.
        best: the policy that is optimal where it is told all that comes.

    Returns:
        ``rows``: a dict for each; ``recommended``: by pool and slots.

    Raises:
        UsageError: times that are not positive, or a size that does not hold the largest access.

    >>> import numpy as np
    >>> from turnout.measure.cache import cache_report
    >>> told = Accesses.of_paths(np.array([[[0]], [[1]], [[0]]]), experts=2)
    >>> cache_report(told, [], [], fetch_s=1.0, compute_s=1.0, best=None)["accesses"]
    3

    Source: Liu et al., 2024, "A Survey on Inference Optimization Techniques for Mixture of Experts Models", for what is
    compared; Belady, 1966, for the bound.
    """
    for name, value in (("fetch_s", fetch_s), ("compute_s", compute_s)):
        if not (math.isfinite(value) and value > 0):
            got, fix = value, f"pass {name}=1e-3"
            raise UsageError(word(name, got=got, allowed="be above 0", where="cache_report", fix=fix))
    rows = _rows(accesses, contenders, sizes, fetch_s, compute_s, best)
    values = {
        "accesses": len(accesses),
        "steps": accesses.steps,
        "experts_asked": len(accesses.expert_R),
        "fetch_s": fetch_s,
        "compute_s": compute_s,
        "rows": rows,
        "recommended": [_recommended(rows, contenders, size) for size in sizes],
    }
    plain = why_plain()
    notes = [f"{one.name} needs {one.needs}" for one in contenders if one.needs]
    return Report("cache", values, tuple(notes + ([f"not compiled: {plain}"] if plain else [])))


def _rows(
    accesses: Accesses,
    contenders: Sequence[Contender],
    sizes: Sequence[CacheShape],
    fetch_s: float,
    compute_s: float,
    best: Any,
) -> list[dict[str, Value]]:
    rows: list[dict[str, Value]] = []
    least: dict[tuple[bool, int], Replay] = {}
    every = dataclasses.replace(accesses, step_I=accesses.step_I * 0)  # one pass: all of it is told
    for size in sizes:
        least[size.shared, size.slots] = found = replay(every, best, size, ahead=len(accesses))
        busy = max(found.fetches * fetch_s, len(accesses) * compute_s)
        rows.append(_row(BOUND, size, found) | {"seconds": busy, "waited_s": busy - len(accesses) * compute_s})
    for one in contenders:
        for size, found in zip(sizes, _replayed(accesses, one, sizes), strict=True):
            times = found.timing(fetch_s=fetch_s, compute_s=compute_s)
            assert found.fetches >= least[size.shared, size.slots].fetches, f"{one.name} is below the bound"
            rows.append(_row(one.name, size, found) | {name: getattr(times, name) for name in ("seconds", "waited_s")})
    return rows


def _replayed(accesses: Accesses, one: Contender, sizes: Sequence[CacheShape]) -> list[Replay]:
    """Foresight is of a size's pools alone, so that all sizes share it."""
    if hasattr(one.policy, "foretell"):
        return replays(accesses, one.policy, sizes)
    return [replay(accesses, one.policy, size, ahead=one.ahead) for size in sizes]


def _row(name: str, size: CacheShape, found: Replay) -> dict[str, Value]:
    return {
        "policy": name,
        "pool": "all layers" if size.shared else "each layer",
        "slots": size.slots,
        "capacity": size.capacity,
        "hit_rate": found.hit_rate,
        "moved_rate": found.moved_rate,
        "fetches": found.fetches,
        "prefetch_accuracy": found.accuracy,
    }


def _recommended(
    rows: Sequence[Mapping[str, Any]], contenders: Sequence[Contender], size: CacheShape
) -> dict[str, Value]:
    pool = "all layers" if size.shared else "each layer"
    here = {row["policy"]: row for row in rows if (row["pool"], row["slots"]) == (pool, size.slots)}
    able = [here[one.name] for one in contenders if not one.needs]
    if not able:
        return {"pool": pool, "slots": size.slots, "policy": None, "reason": "no policy was compared"}
    fastest = min(row["seconds"] for row in able)
    taken = next(row for row in able if row["seconds"] <= 1.01 * fastest)
    reason = f"{taken['seconds'] / here[BOUND]['seconds']:.2f} of the bound's time"
    lru = here.get("lru")
    if lru is not None and taken is not lru:
        reason += f", {taken['seconds'] / lru['seconds']:.2f} of LRU's"
    elif lru is not None and len(able) > 1:
        reason += ", and no other is more than 1 % faster"
    return {"pool": pool, "slots": size.slots, "policy": taken["policy"], "reason": reason}
