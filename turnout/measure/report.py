"""Reports and results as text: markdown, comparisons, and the table of runs side by side."""

import math
from collections.abc import Callable, Sequence
from typing import TypeGuard

from turnout.errors import UsageError, word
from turnout.expects import NUMBER, expects, several
from turnout.measure.ranking import one_machine, unranked
from turnout.measure.runs import RunData, number
from turnout.types import Report

__all__ = ["compare", "duration", "markdown", "quantity", "results_rows", "results_table"]

_NONE = "–"


@expects(before=Report, after=Report)
def compare(before: Report, after: Report) -> Report:
    """Two reports of the same meter, side by side: each number before and after, and the change.

    Args:
        before: the first report.
        after: the second; values that only one of them has are named in the notes.

    Returns:
        A Report whose values are ``{"before", "after", "change"}``, with ``ratio`` (after / before) where the first
        is not zero.

    Raises:
        UsageError: the two have no number in common.

    >>> compare(Report("load", {"max_vio": 0.5}), Report("load", {"max_vio": 0.25}))["max_vio"]["ratio"]
    0.5

    Source: none; plain bookkeeping.
    """
    values, lonely = {}, []
    for name in [*before.values, *(name for name in after.values if name not in before.values)]:
        first, second = before.values.get(name), after.values.get(name)
        if _is_number(first) and _is_number(second):
            if not math.isfinite(first) or not math.isfinite(second):
                lonely.append(f"{name} is not compared: {first:g} and {second:g} are not both finite")
                continue
            values[name] = {"before": first, "after": second, "change": second - first}
            if first:
                values[name]["ratio"] = second / first
        elif name not in before.values or name not in after.values:
            lonely.append(f"only the {'second' if name in after.values else 'first'} has {name}")
    if not values:
        raise UsageError(
            word(
                "the reports",
                got=f"{before.title!r} and {after.title!r}",
                allowed="have at least one number in common",
                where="turnout.measure.compare",
                fix="compare two reports of the same meter",
            )
        )
    notes = (*before.notes, *(note for note in after.notes if note not in before.notes), *lonely)
    title = before.title if before.title == after.title else f"{before.title} -> {after.title}"
    return Report(title, values, notes, {"before": dict(before.context), "after": dict(after.context)})


@expects(report=Report)
def markdown(report: Report) -> str:
    """The report as markdown: a heading, a table and its notes; a comparison gets a column for each part.

    >>> print(markdown(Report("load", {"max_vio": 0.25}, notes=("two layers",))))
    ### load
    <BLANKLINE>
    |  | value |
    |---|---:|
    | max_vio | 0.25 |
    <BLANKLINE>
    - two layers

    Source: none; plain text.
    """
    parts: list[str] = []
    for value in report.values.values():
        parts += [part for part in value if part not in parts] if isinstance(value, dict) else []
    columns = parts or ["value"]
    rows = []
    for name, value in report.values.items():
        cells = [value.get(part) for part in parts] if isinstance(value, dict) else [value, *columns[1:]][:1]
        rows.append([name, *(_NONE if cell is None else _plain(cell) for cell in cells)])
    lines = [f"### {report.title}", "", *_markdown(["", *columns], rows)]
    return "\n".join(lines + ([""] if report.notes else []) + [f"- {note}" for note in report.notes])


@expects(runs=several(RunData))
def results_rows(runs: Sequence[RunData]) -> list[dict[str, object]]:
    """One dict per run with everything that the results table shows, as plain JSON numbers; None where unknown.

    >>> results_rows([RunData("x", result={"bits_per_byte": 2.0})])[0]["bits_per_byte"]
    2.0

    Source: none; plain bookkeeping.
    """
    return [
        {
            "name": run.name,
            "bits_per_byte": run.bits_per_byte,
            "by_domain": run.by_domain,
            "bits_per_byte_before": number(run.before.get("bits_per_byte")),
            "bits_per_byte_after": number(run.after.get("bits_per_byte")),
            "params_active": run.cost.params_active,
            "params": run.cost.params,
            "flops_per_token": run.cost.flops,
            "steps": run.step,
            "tokens": run.tokens,
            "tokens_per_s": number(run.tokens_per_s),
            "seconds": run.seconds,
            "peak_memory_bytes": run.peak_memory_bytes,
            "experts": run.num_experts or None,
            "max_vio": number(run.measured.get("max_vio")),
            "entropy": number(run.measured.get("entropy")),
            "dropped": number(run.measured.get("dropped")),
        }
        for run in runs
    ]


@expects(runs=several(RunData))
def results_table(runs: Sequence[RunData], *, style: str = "text") -> str:
    """The results of several runs side by side, one column each.

    Args:
        runs: in the order of their columns.
        style: ``"text"`` for a terminal, ``"markdown"`` for a document.

    Raises:
        UsageError: another style.

    >>> print(results_table([RunData("dense", result={"bits_per_byte": 2.0}), RunData("moe", tokens_per_s=1500.0)]))
                            dense    moe
    held-out bits per byte  2.000      –
    training tokens/s           –  1,500

    Source: none; plain text.
    """
    if style not in ("text", "markdown"):
        raise UsageError(
            word("style", got=style, allowed="be 'text' or 'markdown'", where="results_table", fix="pass style='text'")
        )
    head = ["", *(run.name for run in runs)]
    rows = [[label, *cells] for label, cells, _ in result_lines(runs)]
    why = unranked(runs)
    if style == "markdown":
        return "\n".join(_markdown(head, rows) + (["", f"Not ranked: {why}."] if why else []))
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines + ([f"not ranked: {why}"] if why else []))


def result_lines(runs: Sequence[RunData]) -> list[tuple[str, list[str], int | None]]:
    """The lines of the results table: label, one text per run, and which run is best (None where none is).

    What was measured on other text has no best, nor has speed on another machine.
    """
    text = not unranked(runs)
    machine = one_machine([run for run in runs if number(run.tokens_per_s) is not None])
    rows = results_rows(runs)
    domains = list(dict.fromkeys(name for run in runs for name in run.by_domain))
    least, most, fastest = (min, max, max if machine else None) if text else (None, None, max if machine else None)
    lines = [_line("held-out bits per byte", [row["bits_per_byte"] for row in rows], _decimals, least)]
    lines += [_line(f"  {domain}", [run.by_domain.get(domain) for run in runs], _decimals, least) for domain in domains]
    for label, key in (("before the first step", "before"), ("after the last, same text", "after")):
        lines.append(_line(label, [row[f"bits_per_byte_{key}"] for row in rows], _decimals, None))
    wanted: list[tuple[str, str, Callable[[float], str], Callable | None]] = [
        ("active parameters", "params_active", quantity, None),
        ("parameters", "params", quantity, None),
        ("forward FLOPs a token", "flops_per_token", quantity, None),
        ("training tokens", "tokens", quantity, None),
        ("training tokens/s", "tokens_per_s", lambda value: f"{value:,.0f}", fastest),
        ("training time", "seconds", duration, None),
        ("peak memory", "peak_memory_bytes", lambda value: f"{quantity(value)}B", None),
        ("experts", "experts", lambda value: f"{value:.0f}", None),
        ("load MaxVio", "max_vio", _decimals, least),
        ("load entropy", "entropy", _decimals, most),
        ("dropped", "dropped", lambda value: f"{100 * value:.2g} %", least),
    ]
    lines += [_line(label, [row[key] for row in rows], show, best) for label, key, show, best in wanted]
    return [line for line in lines if any(cell != _NONE for cell in line[1])]


def duration(seconds: float) -> str:
    """Seconds as a clock shows them.

    >>> duration(75), duration(3723)
    ('1:15', '1:02:03')

    Source: none; plain bookkeeping.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@expects(value=NUMBER)
def quantity(value: float) -> str:
    """A count with three digits and its letter.

    >>> quantity(1_234_567), quantity(999), quantity(2.5e9)
    ('1.23 M', '999', '2.50 G')

    Source: none; plain text.
    """
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - (abs(scaled) >= 9.995) - (abs(scaled) >= 99.95))}f} {letter}"
    return f"{value:.0f}"


def _line(label: str, values: list, show: Callable[[float], str], best: Callable | None) -> tuple:
    known = [value for value in values if _is_number(value)]
    winner = values.index(best(known)) if best and len(known) > 1 and len(set(map(show, known))) > 1 else None
    return label, [show(value) if _is_number(value) else _NONE for value in values], winner


def _decimals(value: float) -> str:
    return f"{value:.3f}"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|---|" + "---:|" * (len(head) - 1), *map(line, rows)]
