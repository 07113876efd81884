"""Recorded traces through policies of a cache of experts: learnt from some documents, compared on others."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from turnout.decide.device import cache
from turnout.decide.device.cache.named import LEARNING, NAMES
from turnout.errors import UsageError, nearest, word
from turnout.measure.cache import Contender, cache_report
from turnout.recipes.cache_times import ExpertTimes, expert_times
from turnout.types import Accesses, CacheShape, Report, Trace

__all__ = ["cache_trace", "trace_in"]

_WHERE = "turnout cache"
_AHEAD = "a router that routes all layers before the first"
_HELD_OUT = 4  # every fourth document is compared on, where policies learn from the others


def cache_trace(
    trace: str | Path,
    *,
    slots: Sequence[int] = (),
    shared: bool | None = None,
    memory_bytes: float | None = None,
    expert_bytes: float | None = None,
    policies: Sequence[str] = NAMES,
    streams: int = 1,
    tokens: int = 20_000,
    fetch_s: float | None = None,
    compute_s: float | None = None,
    model: str | Path | None = None,
    save: str | Path | None = None,
    seed: int = 0,
) -> Report:
    """Every policy on the documents of a trace that none of them learnt from.

    Args:
        trace: the folder, as ``turnout eval --trace`` writes it.
        slots: experts held in each layer; a pool of all layers has as many in all. A quarter, a half and three quarters
            of the experts when neither this nor a memory is given.
        shared: whether all layers share their slots; both ways when None.
        memory_bytes: what the slots may take, in the place of ``slots``.
        expert_bytes: of one expert; ``model`` tells it too.
        policies: by their names (``turnout.decide.device.cache.named_policy``).
        streams: documents decoded side by side.
        tokens: compared on are documents that hold so many steps together; they are not cut.
        fetch_s: how long an expert takes to come; None to measure it with ``model``, 1 ms without one.
        compute_s: how long one layer's pass takes; None likewise.
        model: the run or folder of the model.
        save: a file for what policies learnt, as ``turnout serve --expert-profile`` takes it.
        seed: of what is learnt.

    Returns:
        ``measure.cache.cache_report``, with where its numbers are from.

    Raises:
        TurnoutError: no such trace, model or policy, slots that hold no access, or a model of other sizes.

    Source: none; plain bookkeeping.
    """
    opened = _opened(trace, policies)
    learnt, compared = _split(opened, policies if save is None else LEARNING)
    taken = _first(opened, compared, tokens * streams)
    told = Accesses.of_trace(opened, taken, streams=streams)
    wanting = fetch_s is None or compute_s is None or (memory_bytes is not None and expert_bytes is None)
    times = _times(model if wanting else None, fetch_s, compute_s, streams, told)
    each = expert_bytes if memory_bytes is None else expert_bytes or times.expert_bytes or None
    sizes = _sizes(told, slots, shared, memory_bytes, each)
    known = _known(opened, learnt, seed, save)
    contenders = [_make(name, told, known) for name in policies]
    best = cache.PreGated(prefetch=False)
    report = cache_report(told, contenders, sizes, fetch_s=times.fetch_s, compute_s=times.compute_s, best=best)
    values = {"documents": len(taken), "documents_learnt": len(learnt), "streams": streams, "layers": told.layers,
              "experts": told.experts, "expert_bytes": each}  # fmt: skip
    context = {"trace": str(trace), "seed": seed, "model": None if model is None else str(model)}
    notes = *report.notes, *_told(model, fetch_s, compute_s)
    return Report(report.title, values | dict(report.values), notes, context)


def _opened(trace: str | Path, policies: Sequence[str]) -> Trace:
    if strange := [name for name in policies if name not in NAMES]:
        raise nearest(strange[0], NAMES, kind="policy", where=_WHERE)
    return Trace.open(trace)


def _known(trace: Trace, documents: Sequence[int], seed: int, save: str | Path | None) -> cache.Learnt | None:
    """What is learnt from these documents, which is written where that was asked; None from none."""
    if not documents:
        return None
    known = cache.Learnt.of(Accesses.of_trace(trace, documents), seed=seed)
    if save is not None:
        known.save(save)
    return known


def _first(trace: Trace, documents: Sequence[int], tokens: int) -> list[int]:
    """The first of these documents, as many as hold so many tokens, one at least."""
    bound_N, taken, read = trace.document_N, [], 0
    for document in documents:
        if read and read >= tokens:
            break
        taken.append(document)
        read += int(bound_N[document + 1] - bound_N[document])
    return taken


def _times(
    model: str | Path | None, fetch_s: float | None, compute_s: float | None, streams: int, told: Accesses
) -> ExpertTimes:
    """What was said; what was not is measured, or is a millisecond where there is no model to measure it with."""
    found = ExpertTimes(1e-3, 1e-3, 0, 0, 0) if model is None else expert_times(model, streams=streams)
    if model is not None and (found.layers, found.experts) != (told.layers, told.experts):
        got = f"{model}, {found.layers} layers of {found.experts} experts"
        allowed = f"be what the trace was recorded of, {told.layers} layers of {told.experts}"
        fix = "name that model, or leave --model out and pass --fetch-ms and --compute-ms"
        raise UsageError(word("--model", got=got, allowed=allowed, where=_WHERE, fix=fix))
    fetch_s = found.fetch_s if fetch_s is None else fetch_s
    return dataclasses.replace(found, fetch_s=fetch_s, compute_s=found.compute_s if compute_s is None else compute_s)


def _told(model: str | Path | None, fetch_s: float | None, compute_s: float | None) -> tuple[str, ...]:
    """Where the times are from, where nobody said them."""
    left = [flag for flag, value in (("--fetch-ms", fetch_s), ("--compute-ms", compute_s)) if value is None]
    if not left:
        return ()
    names, verb = " and ".join(left), "are" if len(left) > 1 else "is"
    if model is None:
        return (f"{names} {verb} assumed, 1 ms: name the model, --model RUN, to have this machine's measured",)
    return (f"{names} {verb} measured here, with {model}, its files in the system's memory",)


def trace_in(folder: str | Path) -> tuple[Path, Path | None]:
    """The trace in a folder, which is one or a run that holds one, and the run.

    Raises:
        UsageError: a run or model without a trace.

    Source: none; plain bookkeeping.
    """
    folder = Path(folder)
    if folder.is_file():
        got, fix = f"{folder}, a file", "name the folder that turnout eval RUN --trace FOLDER wrote"
        raise UsageError(word("TRACE", got=got, allowed="be a folder", where=_WHERE, fix=fix))
    has_model = any((folder / name / "config.json").is_file() for name in (".", "model"))
    if (folder / "trace.json").is_file() or not (has_model or (folder / "run.json").is_file()):
        above = folder.absolute().parent
        return folder, above if (above / "run.json").is_file() and (above / "model" / "config.json").is_file() else None
    found = sorted(path.parent for path in folder.glob("*/trace.json"))
    if len(found) == 1:
        return found[0], folder if has_model else None
    where = f"{folder}/trace"
    got = f"{folder}, a run or a model {f'with {len(found)} traces' if found else 'without a trace'}"
    fix = f"name one: turnout cache {found[0]}" if found else (
        f"record one: turnout eval {folder} --trace {where}, then turnout cache {where}"
    )  # fmt: skip
    raise UsageError(word("TRACE", got=got, allowed="be a recorded trace, or hold one", where=_WHERE, fix=fix))


def _split(trace: Trace, policies: Sequence[str]) -> tuple[list[int], list[int]]:
    """Documents to learn from and to compare on; all are compared on where nothing learns."""
    every = [n for n in range(trace.num_documents) if trace.document_N[n + 1] > trace.document_N[n]]
    wanting = [name for name in dict.fromkeys(policies) if name in LEARNING]
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


def _make(name: str, told: Accesses, known: cache.Learnt | None) -> Contender:
    policy = cache.named_policy(name, CacheShape(told.layers, told.experts, told.experts), known)
    if name == "pre_gated":
        return Contender(name, policy, ahead=told.layers, needs=_AHEAD)
    return Contender(name, policy, learnt=name in LEARNING)
