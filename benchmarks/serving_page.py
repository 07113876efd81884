"""The page of benchmarks.serving: the bars, then what each server did."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.tables import heading, spread

__all__ = ["BARS", "page"]

# Throughput of turnout over another's, at least.
BARS = {"transformers": 3.0, "llama.cpp": 1.5}
LONG_GAP = 3.0  # p99 over median, at most


def page(record: dict[str, Any]) -> list[str]:
    """All of it."""
    about = record["about"]
    lines = heading("Servers under load", about)
    lines += [
        f"Each server has {about['threads_of_servers']} thread(s) for its products; {about['rounds']} round(s), all up "
        "at once and asked in turns; median (least-most) of the rounds, ratios of the same round. CPU: over the "
        "server's own processor time, which others on the machine change less.",
        "",
        "## bars",
        "",
        "| | bar | found | |",
        "|---|---|---|---|",
        *(line for piece in record["pieces"] for line in _bars(piece)),
        "",
    ]
    for piece in record["pieces"]:
        lines += ["", f"## {piece['model']}, {piece['kind']}", "", *_table(piece)]
        lines += [f"- **{one} failed**: {why}" for one, why in piece["failed"].items()]
        lines += [f"- {job.replace('_', ' ')} left out: {why}." for job, why in piece["left_out"].items()]
    return lines


def _bars(piece: dict[str, Any]) -> Iterator[str]:
    where, peers = f"{piece['model']}, {piece['kind']}", piece["peers"]
    for other, bar in BARS.items():
        for name, said in (("tokens_per_s", ""), ("tokens_per_cpu_s", ", CPU")):
            found = _ratios(peers, other, "throughput", lambda ours, theirs, name=name: ours[name] / theirs[name])
            if found:
                yield _line(f"{where}: throughput of 16 users over {other}{said}", f">= {bar}", found, ">=", bar)
        found = _ratios(peers, other, "low_load", lambda ours, theirs: ours["ttft_s"] / theirs["ttft_s"])
        if found:
            yield _line(f"{where}: first token of one user over {other}", "<= 1", found, "<=", 1.0)
    found = [
        one["long_prompts"]["p99_s"] / one["long_prompts"]["itl_s"]
        for one in peers.get("turnout", ())
        if "long_prompts" in one
    ]
    if found:
        yield _line(f"{where}: p99 gap over median, prompts of 2,048 beside", f"<= {LONG_GAP:g}", found, "<=", LONG_GAP)


def _line(what: str, bar: str, found: list[float], sign: str, limit: float) -> str:
    middle = statistics.median(found)
    met = middle >= limit if sign == ">=" else middle <= limit
    return f"| {what} | {bar} | {spread(found)} | {'met' if met else '**missed**'} |"


def _ratios(peers: dict[str, Any], other: str, job: str, of: Callable[[Any, Any], float]) -> list[float]:
    pairs = zip(peers.get("turnout", ()), peers.get(other, ()), strict=False)
    return [of(ours[job], theirs[job]) for ours, theirs in pairs if job in ours and job in theirs]


def _table(piece: dict[str, Any]) -> list[str]:
    head = ["", "16 users, tokens/s", "for a CPU s", "one user, first token", "then a token",
            "beside long prompts, median", "p99", "a prompt of 2,048", "resident"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one, rounds in piece["peers"].items():
        if not rounds:
            continue
        cells = [
            one,
            _cell(rounds, "throughput", "tokens_per_s", 1, ".1f"),
            _cell(rounds, "throughput", "tokens_per_cpu_s", 1, ".1f"),
            _cell(rounds, "low_load", "ttft_s", 1000, ".1f", " ms"),
            _cell(rounds, "low_load", "itl_s", 1000, ".1f", " ms"),
            _cell(rounds, "long_prompts", "itl_s", 1000, ".1f", " ms"),
            _cell(rounds, "long_prompts", "p99_s", 1000, ".1f", " ms"),
            _cell(rounds, "long_prompts", "long_ttft_s", 1, ".2f", " s"),
            f"{piece['resident_bytes'][one] / 1e6:,.0f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    shares = [
        round_["throughput"]["client"]
        for rounds in piece["peers"].values()
        for round_ in rounds
        if "throughput" in round_
    ]
    if shares:
        lines += ["", f"The load generator took {100 * max(shares):.1f} % of a core at most."]
    return lines


def _cell(rounds: list[dict[str, Any]], job: str, name: str, times: float, form: str, unit: str = "") -> str:
    found = [times * one[job][name] for one in rounds if job in one]
    return f"{spread(found, form)}{unit}" if found else ""
