"""Recorded traces through policies of a cache of experts: learnt from some documents, compared on others."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from turnout.decide.device import cache
from turnout.errors import UsageError, nearest, word
from turnout.measure.cache import Contender, cache_report
from turnout.types import Accesses, CacheShape, Report, Trace

__all__ = ["POLICIES", "cache_trace"]

_WHERE = "turnout cache"
# Simple ones first: at equal time the first is recommended.
POLICIES = ("lru", "lfu", "lfru", "least_stale", "static", "trace_matching", "expert_flow", "pre_gated")
_LEARNT = ("static", "trace_matching", "expert_flow")
_HELD_OUT = 4  # every fourth document is compared on, where policies learn from the others


def cache_trace(
    trace: str | Path,
    *,
    slots: Sequence[int] = (),
    shared: bool | None = None,
    memory_bytes: float | None = None,
    expert_bytes: float | None = None,
    policies: Sequence[str] = POLICIES,
    streams: int = 1,
    tokens: int = 20_000,
    fetch_s: float = 1e-3,
    compute_s: float = 1e-3,
    seed: int = 0,
) -> Report:
    """Every policy on the documents of a trace that none of them learnt from.

    Args:
        trace: the folder, as ``turnout eval --trace`` writes it.
        slots: experts held in each layer; a pool of all layers has as many in all. A quarter, a half and three quarters
            of the experts when neither this nor a memory is given.
        shared: whether all layers share their slots; both ways when None.
        memory_bytes: what the slots may take, in the place of ``slots``.
        expert_bytes: of one expert.
        policies: of ``POLICIES``.
        streams: documents decoded side by side.
        tokens: steps compared on, at most.
        fetch_s: how long one expert takes to come.
        compute_s: how long one layer's pass takes.
        seed: of what is learnt.

    Returns:
        ``measure.cache.cache_report``, with where its numbers are from.

    Raises:
        TurnoutError: a trace that cannot be read, an unknown policy, slots that do not hold one access.

    Source: none; plain bookkeeping.
    """
    for name in policies:
        if name not in POLICIES:
            raise nearest(name, POLICIES, kind="policy", where=_WHERE)
    opened = Trace.open(trace)
    learnt, compared = _split(opened, policies)
    bound_N, taken, read = opened.document_N, [], 0
    for document in compared:
        if read and read >= tokens * streams:
            break
        taken.append(document)
        read += int(bound_N[document + 1] - bound_N[document])
    told = Accesses.of_trace(opened, taken, streams=streams)
    sizes = _sizes(told, slots, shared, memory_bytes, expert_bytes)
    known = Accesses.of_trace(opened, learnt) if learnt else None
    contenders = [_make(name, told, known, seed) for name in policies]
    best = cache.PreGated(prefetch=False)
    report = cache_report(told, contenders, sizes, fetch_s=fetch_s, compute_s=compute_s, best=best)
    values = {"documents": len(taken), "documents_learnt": len(learnt), "streams": streams, "layers": told.layers}
    values |= {"experts": told.experts, "expert_bytes": expert_bytes}
    context = {"trace": str(trace), "seed": seed}
    return Report(report.title, values | dict(report.values), report.notes, context)


def _split(trace: Trace, policies: Sequence[str]) -> tuple[list[int], list[int]]:
    """Documents to learn from and to compare on; all are compared on where nothing learns."""
    every = [n for n in range(trace.num_documents) if trace.document_N[n + 1] > trace.document_N[n]]
    wanting = [name for name in policies if name in _LEARNT]
    if not every:
        raise UsageError(word("the trace", got="no tokens", allowed="have some", where=_WHERE, fix="record it again"))
    if not wanting:
        return [], every
    if len(every) < 2:
        fix = f"record more, or leave out {', '.join(wanting)}: --policy lru,lfu,lfru,least_stale"
        allowed = "have two documents: what is learnt from one is compared on the other"
        raise UsageError(word("the trace", got="one document", allowed=allowed, where=_WHERE, fix=fix))
    compared = every[1::_HELD_OUT]
    return [n for n in every if n not in set(compared)], compared


def _sizes(
    told: Accesses, slots: Sequence[int], shared: bool | None, memory: float | None, expert_bytes: float | None
) -> list[CacheShape]:
    least, experts = told.most, told.experts
    if (memory is None) != (expert_bytes is None) or (memory is not None and slots):
        flags = {"--memory": memory, "--expert-bytes": expert_bytes, "--slots": slots or None}
        got = " and ".join(flag for flag, value in flags.items() if value is not None)
        allowed, fix = "go together, in the place of --slots", "pass --memory 2GB --expert-bytes 4.7MB"
        raise UsageError(word("--memory and --expert-bytes", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if too_many := [one for one in slots if one > experts]:
        allowed, fix = f"be at most {experts}, the experts of a layer", f"pass --slots {experts}"
        raise UsageError(word("--slots", got=too_many[0], allowed=allowed, where=_WHERE, fix=fix))
    if memory is not None:
        assert expert_bytes is not None
        if memory < least * expert_bytes:
            got = f"{memory:,.0f} bytes, room for {memory // expert_bytes:.0f} experts"
            allowed = f"hold the {least} experts that one pass of a layer asks for"
            fix = f"pass --memory {least * expert_bytes:.0f} or more, or fewer --streams"
            raise UsageError(word("--memory", got=got, allowed=allowed, where=_WHERE, fix=fix))
        total = min(int(memory // expert_bytes), told.layers * experts)
        pools = [(total // told.layers, False), (total, True)]
    else:
        each = list(slots) or sorted({max(least, math.ceil(experts * share)) for share in (0.25, 0.5, 0.75)})
        pools = [(one, False) for one in each] + [(one * told.layers, True) for one in each]
    found = [CacheShape(told.layers, told.experts, max(n, 1), all_) for n, all_ in pools if shared in (None, all_)]
    small = [size for size in found if size.slots < least]
    if small:
        got = f"{small[0].slots} {'for all layers' if small[0].shared else 'in each layer'}"
        fix = f"pass at least {least}, or fewer --streams"
        raise UsageError(
            word("the slots", got=got, allowed="hold what one pass of a layer asks for", where=_WHERE, fix=fix)
        )
    return found


def _make(name: str, told: Accesses, known: Accesses | None, seed: int) -> Contender:
    plain: dict[str, Callable[[], Contender]] = {
        "lru": lambda: Contender(name, cache.LRU()),
        "lfu": lambda: Contender(name, cache.LFU()),
        "lfru": lambda: Contender(name, cache.LFRU(layers=told.layers)),
        "least_stale": lambda: Contender(name, cache.LeastStale()),
        "pre_gated": lambda: Contender(
            name, cache.PreGated(), ahead=told.layers, needs="a router that routes all layers before the first"
        ),
    }
    if name in plain:
        return plain[name]()
    assert known is not None, "what learns was given documents"
    if name == "static":
        return Contender(name, cache.Static(known.used().sum(0)), learnt=True)
    if name == "trace_matching":
        return Contender(name, cache.TraceMatching.learn(known), learnt=True)
    return Contender(name, cache.ExpertFlow.learn(known, seed=seed), learnt=True)
