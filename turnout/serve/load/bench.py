"""Puts a server under one load after another: finds out what it is, how it counts, then measures."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Sequence

from turnout.errors import UsageError, word
from turnout.serve.load.answer import Answer
from turnout.serve.load.ask import ask, fetch
from turnout.serve.load.drive import closed_loop, open_loop
from turnout.serve.load.exchange import Target
from turnout.serve.load.report import LoadPoint, LoadReport, point
from turnout.serve.load.slo import Slo
from turnout.serve.load.traffic import WORDS, Traffic, arrivals

__all__ = ["Told", "bench", "calibrated", "find_model"]

# Words of the two prompts by which tokens are counted before anything is timed; fewer where these are too many.
_PROBES = ((len(WORDS) // 2, 2 * len(WORDS)), (12, 36), (3, 9))
Told = Callable[[str, int, int], None]
"""Is told a load, and how many of how many requests are over."""


def bench(
    target: Target,
    traffic: Traffic,
    *,
    model: str | None = None,
    rates: Sequence[float] = (),
    streams: Sequence[int] = (),
    requests: int = 100,
    slo: Slo | None = None,
    seed: int = 0,
    timeout_s: float = 600.0,
    told: Told | None = None,
) -> LoadReport:
    """Measures any server of OpenAI's protocol.

    Args:
        target: the server.
        traffic: what is asked.
        model: the name to ask for; default the first that it lists.
        rates: requests a second, of streams that do not wait for answers.
        streams: numbers of users, each of whom asks again when answered.
        requests: how many for each of these, at least 1.
        slo: what an answer must keep to.
        seed: of prompts and arrivals; the same for every load, so that they can be compared.
        timeout_s: the longest that a request may take.
        told: is told how far it is.

    Returns:
        The numbers of each load. Failures are counted, by kind.

    Raises:
        UsageError: the server is not there, or does not answer the first two questions; no load was asked for.

    >>> from turnout.serve.load import LengthMix
    >>> bench(Target("http://127.0.0.1:1"), Traffic(LengthMix.parse("8"), LengthMix.parse("8")), rates=[0])
    Traceback (most recent call last):
    turnout.errors.UsageError: the load must be above 0, with at least one request in turnout bench-serve; got 0...

    Source: Schroeder et al., "Open versus closed: a cautionary tale", 2006; where we differ: lengths are calibrated by
        two questions, not by a tokenizer.
    """
    _check((*rates, *streams), requests)
    name = find_model(target) if model is None else model
    traffic, notes = asyncio.run(calibrated(target, traffic, name, timeout_s))
    points, early = list[LoadPoint](), list[float]()
    for number, (level, is_open) in enumerate([*((rate, True) for rate in rates), *((n, False) for n in streams)]):
        # The prompts of one load are not those of the one before, whose beginnings a server may have kept.
        asked = traffic.draw(requests, target, name, seed=seed + 1000 * number)
        load = f"{level:g} requests/s" if is_open else f"{level:g} streams"
        tell = None if told is None else lambda done, load=load: told(load, done, requests)
        if is_open:
            due_s = arrivals(level, requests, seed=seed)
            work = open_loop(target, asked, due_s, timeout_s=timeout_s, fixed=traffic.fixed, told=tell)
        else:
            work = closed_loop(target, asked, int(level), timeout_s=timeout_s, fixed=traffic.fixed, told=tell)
        points.append(point(driven := asyncio.run(work), level=level, is_open=is_open, slo=slo))
        early += _early(driven.answers)
    about = _about(target, traffic) | {"objectives": "none" if slo is None else str(slo), "seed": str(seed)}
    return LoadReport(target.url, name, about, points, [*notes, *_notes(points, early)])


def _check(levels: Sequence[float], requests: int) -> None:
    bad = [level for level in levels if not 0 < level < float("inf")]
    if bad or requests < 1 or not levels:
        got = f"{bad[0]:g}" if bad else f"{requests} requests" if requests < 1 else "none"
        allowed, fix = "be above 0, with at least one request", "pass --rate 2 or --streams 4"
        raise UsageError(word("the load", got=got, allowed=allowed, where="turnout bench-serve", fix=fix))


def _about(target: Target, traffic: Traffic) -> dict[str, str]:
    alike = f", the first {traffic.shared} of {traffic.prefixes} shared beginning(s)" if traffic.shared else ""
    return {
        "prompts": f"{traffic.prompt} tokens{alike}",
        "answers": f"{traffic.output} tokens" + (", no fewer" if traffic.fixed else " at most"),
        "endpoint": target.path(traffic.path),
        "begun": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


def find_model(target: Target) -> str:
    """The first model that a server lists.

    Args:
        target: the server.

    Raises:
        UsageError: it is not there, or lists none.
    """
    try:
        status, body = asyncio.run(fetch(target, target.request("models")))
        if status == 200:
            return str(json.loads(body)["data"][0]["id"])
        got = f"status {status} for {target.path('models')}: {body[:200].decode(errors='replace')}"
    except OSError as error:
        got = f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, IndexError, TypeError):
        got = f"no list of models at {target.path('models')}"
    fix = "start it, look at its address, or name a --model that it has"
    raise UsageError(_unfit(target, got, fix))


async def calibrated(target: Target, traffic: Traffic, model: str, timeout_s: float) -> tuple[Traffic, list[str]]:
    """How many tokens a word has, by the server's own count; these requests wake it up, too."""
    for probes in _PROBES:
        counts = list[int]()
        for words in probes:
            text = " ".join(WORDS[at % len(WORDS)] for at in range(words))
            body = dataclasses.replace(traffic, fixed=False).body(model, text, 1)
            request = target.request(traffic.path, json.dumps(body).encode())
            answer = await ask(target, request, asked_tokens=1, timeout_s=timeout_s)
            if answer.error == "HTTP 400" and probes != _PROBES[-1]:
                break  # a model of short texts
            if answer.error not in ("", "empty", "short"):
                fix = "see that it serves this model at this endpoint"
                if answer.error == "HTTP 400" and words > min(_PROBES[-1]):
                    fix = "serve a model that reads longer texts: this one is asked for nine words at the least"
                raise UsageError(_unfit(target, f"{answer.error}: {answer.message.rstrip('.')}", fix))
            counts += [answer.prompt_tokens] if answer.prompt_tokens is not None else []
        else:
            break
    if len(counts) < 2 or counts[1] <= counts[0]:
        return traffic, ["The server does not say how many tokens it read: lengths of prompts are in words."]
    each = (counts[1] - counts[0]) / (probes[1] - probes[0])
    overhead = max(0.0, counts[0] - each * probes[0])
    return dataclasses.replace(traffic, tokens_per_word=each, overhead_tokens=overhead), []


def _unfit(target: Target, got: str, fix: str) -> str:
    return word("URL", got=f"{target.url}, {got}", allowed="answer", where="turnout bench-serve", fix=fix)


def _early(answers: Sequence[Answer]) -> list[float]:
    """The tokens of a load's whole answers, on average, where they are fewer than these were asked for; else nothing.

    Of pieces that the server does not count nobody knows.
    """
    whole = [answer for answer in answers if not answer.error and answer.output_tokens is not None]
    given = sum(answer.tokens for answer in whole)
    return [given / len(whole)] if given < 0.98 * sum(answer.asked_tokens for answer in whole) else []


def _notes(points: Sequence[LoadPoint], early: Sequence[float]) -> list[str]:
    notes = [
        "The client took "
        + ", ".join(f"{100 * one.client_share:.1f} %" for one in points)
        + " of a core; its clock was late by at most "
        + ", ".join(f"{1000 * one.client_lag_s.p99:.1f} ms" for one in points)
        + " (p99)."
    ]
    late = [one for one in points if one.is_open and one.late_s.p99 > max(0.1 / one.level, 0.01)]
    for one in late:
        notes.append(f"{one.load}: requests were sent up to {one.late_s.most:.2f} s late; times count from when due.")
    if not all(one.counted for one in points):
        notes.append("The server does not say how many tokens it made: each piece counts as one.")
    if any(one.tokens_per_piece > 1.02 for one in points):
        most = max(one.tokens_per_piece for one in points)
        notes.append(
            f"Pieces hold up to {most:.2f} tokens on average: gaps (ITL) are between pieces; TPOT is per token."
        )
    if early:
        notes.append(
            f"Answers ended by themselves after {min(early):.0f} tokens on average or more: --fixed forbids it."
        )
    return notes
