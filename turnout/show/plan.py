"""The page of a plan: its layouts in numbers, what the step of the best waits for, and its pipeline drawn."""

from collections.abc import Mapping
from html import escape

from turnout.show.bars import value_bars
from turnout.show.page import card, frame
from turnout.show.timeline import timeline_legend, timeline_svg
from turnout.solve.pipeline import PipelineTimes
from turnout.types.schedule import Schedule

__all__ = ["plan_html"]


def plan_html(
    model: str, text: str, seconds: Mapping[str, float], played: tuple[Schedule, PipelineTimes] | None = None
) -> str:
    """A page of its own, which opens without a network; all of it is foreseen, and it says so.

    Args:
        model: what the user called it.
        text: what ``turnout plan`` prints.
        seconds: of the best plan's step, by what takes them.
        played: its pipeline and when each of its tasks runs; None without one.

    Returns:
        The text of the page.

    >>> "simulated" in plan_html("tiny", "1. one device", {"compute": 1.0})
    True

    Source: none; plain bookkeeping.
    """
    lead = '<p class="lead">simulated, before anything was trained</p>'
    head = f'<header><div class="inner"><p class="eyebrow">a plan</p><h1>{escape(model)}</h1>{lead}</div></header>'
    rows = [(name, value, f"{value:.4g} s", n) for n, (name, value) in enumerate(seconds.items()) if value > 0]
    sections = [f"<section>{card('The step of the first', 'simulated', value_bars(rows))}</section>"]
    if played is not None:
        schedule, times = played
        drawing = f'<ul class="lead">{timeline_legend(schedule)}</ul>{timeline_svg(schedule, times)}'
        sections.append(f"<section>{card(f'Its pipeline: {schedule.name}', 'simulated', drawing)}</section>")
    sections.append(f'<section><h2>Layouts</h2><div class="scroll"><pre>{escape(text)}</pre></div></section>')
    return frame(f"plan of {model}", head, sections, experts=0, payload={})
