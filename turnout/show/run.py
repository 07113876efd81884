"""The page: one self-contained html file about one or more runs, which opens without a network."""

from collections.abc import Sequence
from html import escape

from turnout.expects import expects
from turnout.measure.passage import Passage
from turnout.measure.ranking import unranked
from turnout.measure.report import duration, quantity, result_lines
from turnout.measure.runs import ReportData, RunData
from turnout.show import palette
from turnout.show.beside import Other, beside, beside_headline, colours, title_of
from turnout.show.charts import Drawing, tracks
from turnout.show.headline import at_equal_time, headline
from turnout.show.page import dot, flat, fold, frame, missing, table
from turnout.show.panels import curves, domains, loads
from turnout.show.passages import excerpts, passages
from turnout.show.passages import payload as routes

__all__ = ["report_html"]


@expects(data=ReportData)
def report_html(data: ReportData, *, others: Sequence[Other] = ()) -> str:
    """One html page: the result, loss curves, expert load, expert x domain maps, a passage by expert, the set-up.

    It holds its own style, script and drawings, and asks no network for anything (its content security policy
    forbids it). Every text from a run or a document is escaped. What is missing is said where it would stand.

    Args:
        data: the runs, in the order of their columns; there may be none where there are others.
        others: conversions and choices of adapters, which follow the runs: side by side first, then each by itself.

    Returns:
        The text of the file, to be written as UTF-8.

    >>> page = report_html(ReportData("demo", [RunData("<b>x</b>", result={"bits_per_byte": 1.5})]))
    >>> "<b>x</b>" in page, "1.500 bits per byte" in page
    (False, True)

    Source: none; the drawings are our own.
    """
    drawings: list[Drawing] = []
    routed = data.passages or next((run.passages for run in data.runs if run.passages), ())
    experts = max([run.num_experts for run in data.runs] + [one.num_experts for one in routed], default=0)
    own = [
        lambda: _results(data.runs),
        lambda: curves(data.runs, drawings),
        lambda: loads(data.runs, drawings),
        lambda: domains(data.runs, drawings),
        lambda: passages(routed, data.runs),
        lambda: _setup(data),
    ]
    sections = [section() for section in own] if data.runs or not others else []
    if others:
        sections += beside(others)
        experts = max(experts, *(colours(one) for one in others))
    charts = [drawing.data for drawing in drawings]
    payload = {"colors": min(max(experts, 1), palette.EXPERTS), "charts": charts, "passages": routes(excerpts(routed))}
    head = _head(data, tracks(experts, _taken(routed)), others)
    return frame(data.title, head, sections, experts=experts, payload=payload)


def _taken(routed: Sequence[Passage]) -> list[int]:
    """The experts of the first passage's first token: the tracks that the heading shows as taken."""
    if not routed or not routed[0].routes or not routed[0].tokens:
        return [1]
    return [expert for expert, _, _ in routed[0].routes[0][0]]


def _head(data: ReportData, ornament: str, others: Sequence[Other]) -> str:
    facts, said = [], [headline(data.runs)] if data.runs or not others else []
    if others:
        count = f"{len(others)} model{'s' if len(others) > 1 else ''} made of others"
        beside_runs = f"beside {'it' if len(data.runs) == 1 else 'them'} {count}"
        said.append(beside_runs if data.runs else beside_headline(others))
    for n, run in enumerate(data.runs):
        parts = [f"{run.bits_per_byte:.3f} bits per byte"] if run.bits_per_byte is not None else []
        parts += [f"{quantity(run.cost.flops)} FLOPs a token"] if run.cost.flops else []
        parts += [f"{quantity(run.cost.params)} parameters"] if run.cost.params else []
        parts += [f"{quantity(run.tokens)} training tokens"] if run.tokens else []
        parts += [f"trained in {duration(run.seconds)}"] if run.seconds else []
        parts += [f"{quantity(run.peak_memory_bytes)}B at its peak"] if run.peak_memory_bytes else []
        facts += [f"<li>{dot(n)}<b>{escape(run.name)}</b> {escape(' · '.join(parts))}</li>"] if parts else []
    facts += [f"<li>{dot(n)}<b>{escape(title_of(one))}</b></li>" for n, one in enumerate(others, len(data.runs))]
    lead = f'<ul class="lead">{"".join(facts)}</ul>' if facts else ""
    also = at_equal_time(data.runs)
    lead = (f'<p class="also">{escape(also)}</p>' if also else "") + lead
    return (
        f'<header>{ornament}<div class="inner"><p class="eyebrow">{escape(data.title)}</p>'
        f"<h1>{escape('; '.join(said))}.</h1>{lead}</div></header>"
    )


def _results(runs: Sequence[RunData]) -> str:
    stopped = "".join(
        f'<div class="card stopped"><b>{escape(run.name)} stopped with an error.</b>'
        f'<details><summary>What it said</summary><pre class="command">{escape(run.error)}</pre></details></div>'
        for run in runs
        if run.error
    )
    lines = result_lines(runs)
    if not lines:
        return f'<section><h2>Results</h2>{stopped}<p class="missing">No numbers yet.</p></section>'
    names = "".join(f"<th>{dot(index)}{escape(run.name)}</th>" for index, run in enumerate(runs))
    rows = []
    for label, cells, best in lines:
        shape = ' class="main"' if label == lines[0][0] else ' class="sub"' if label.startswith(" ") else ""
        columns = "".join(
            f'<td class="best" style="--c:{palette.run_color(n)}">{escape(cell)}</td>'
            if n == best
            else f"<td>{escape(cell)}</td>"
            for n, cell in enumerate(cells)
        )
        rows.append(f"<tr{shape}><td>{escape(label.strip())}</td>{columns}</tr>")
    return (
        f"<section><h2>Results</h2>"
        f'<p class="about">Lower bits per byte are better. {_dots(runs)} MaxVio is how far the '
        f"busiest expert is above the even share (0 is even); entropy is 1 when the load is even. Training time has "
        f"evaluations and checkpoints in it; peak memory is the accelerator's, or the whole process's.</p>{stopped}"
        f'<div class="card scroll"><table><thead><tr><th></th>{names}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _dots(runs: Sequence[RunData]) -> str:
    """What a dot in the table means, or why there is none."""
    why = unranked(runs)
    return f"No best is marked: {escape(why)}." if why else "The dot marks the best of a row."


def _setup(data: ReportData) -> str:
    configs = [flat(run.config) for run in data.runs]
    keys = list(dict.fromkeys(key for one in configs for key in one))
    differing = [key for key in keys if len({one.get(key, "–") for one in configs}) > 1]
    parts = []
    if len(data.runs) > 1 and any(configs):
        head = "".join(f"<th>{dot(n)}{escape(run.name)}</th>" for n, run in enumerate(data.runs))
        rows = [[key, *(one.get(key, "–") for one in configs)] for key in differing]
        parts.append(fold("What differs between the runs", table(rows, head), opened=True))
    for run, config in zip(data.runs, configs, strict=True):
        inside = table([[key, value] for key, value in config.items()]) if config else missing("No run.json was given.")
        parts.append(fold(f"{run.name}: all of its configuration", inside))
    hardware = data.hardware or next((run.hardware for run in data.runs if run.hardware), {})
    inside = table([[key, value] for key, value in flat(hardware).items()]) if hardware else missing("Not recorded.")
    parts.append(fold("Hardware and versions", inside, opened=True))
    commands = [data.command] if data.command else list(dict.fromkeys(run.command for run in data.runs if run.command))
    inside = f'<pre class="command">{escape(chr(10).join(commands))}</pre>' if commands else missing("Not recorded.")
    parts.append(fold("Command", inside, opened=True))
    notes = [*data.notes, *(f"{run.name}: {note}" for run in data.runs for note in run.notes)]
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(fold("Notes", f"<ul>{items}</ul>", opened=True))
    return f"<section><h2>How it was made</h2>{''.join(parts)}</section>"
