"""The picture of a pipeline's step: a line for each device, a bar for each action; as drawing, page, and text."""

from collections.abc import Sequence
from html import escape

import numpy as np

from turnout.errors import ShapeError, word
from turnout.expects import expects
from turnout.show.page import card, frame, table
from turnout.show.palette import run_color
from turnout.solve.pipeline import PipelineTimes
from turnout.types.schedule import Action, Schedule

__all__ = ["timeline_html", "timeline_svg", "timeline_text"]

_WIDE, _LABEL, _HIGH, _GAP = 960, 74, 22, 6
_KINDS = {
    "F": "forward",
    "I": "gradient of the input",
    "W": "gradient of the weights",
    "B": "both gradients",
    "OVERLAP_F_B": "forward and backward together",
    "UNSHARD": "gathering parameters",
}
_COLOR = {kind: run_color(number) for number, kind in enumerate(_KINDS)}
# What a terminal shows: an F of a device's first stage is an F, of its later ones an f; so with the others.
_LETTER = {"F": "F", "I": "I", "W": "W", "B": "B", "OVERLAP_F_B": "X", "UNSHARD": "U"}


@expects(schedule=Schedule, times=PipelineTimes)
def timeline_svg(schedule: Schedule, times: PipelineTimes) -> str:
    """A drawing of a step, simulated or measured; time goes to the right.

    Args:
        schedule: whose actions they are.
        times: when each ran.

    Returns:
        Inline SVG: bars in the colours of their kinds, fainter for a device's later stages, with the microbatch where
        there is room, and what each is under the pointer.

    Raises:
        ShapeError: times of other actions.

    >>> from turnout.solve import pipeline
    >>> from turnout.types import StageCosts
    >>> one = Schedule("one", ((Action(0, "F", 0), Action(0, "B", 0)),), (0,), 1)
    >>> timeline_svg(one, pipeline(one, StageCosts.even(1))).count("<rect")
    2

    Source: none; the drawings of Huang et al., 2019, and of everyone after them.
    """
    _check(schedule, times)
    whole = times.makespan or 1.0
    scale = (_WIDE - _LABEL - 2) / whole
    parts = []
    for rank, order in enumerate(schedule.actions):
        top = rank * (_HIGH + _GAP)
        parts.append(f'<text x="0" y="{top + 15}">device {rank}</text>')
        parts.append(f'<path class="grid" d="M{_LABEL} {top + _HIGH}H{_WIDE}"/>')
        for action, start, end in zip(order, times.start_R[rank], times.end_R[rank], strict=True):
            if action.kind != "RESHARD":
                parts.append(_bar(schedule, action, float(start), float(end), scale, top))
    high = schedule.ranks * (_HIGH + _GAP)
    said = f"{schedule.name}: {schedule.ranks} devices, {whole:.6g} long, devices idle {100 * times.bubble:.1f} % of it"
    return f'<svg viewBox="0 0 {_WIDE} {high}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


@expects(schedule=Schedule, times=PipelineTimes)
def timeline_text(schedule: Schedule, times: PipelineTimes, *, width: int = 100) -> str:
    r"""The same for a terminal: a line of letters for each device, a dot where it waits.

    Args:
        schedule: whose actions they are.
        times: when each ran.
        width: letters that the step takes.

    Returns:
        Lines of F, I, W, B, and X for two actions at a time; small letters are a device's later stages.

    Raises:
        ShapeError: times of other actions, or no width.

    >>> from turnout.solve import pipeline
    >>> from turnout.types import StageCosts
    >>> two = Schedule.from_csv("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", name="two")
    >>> print(timeline_text(two, pipeline(two, StageCosts.even(2)), width=9))
    0 |FF..BB.BB| 33 % idle
    1 |.FBBFBB..| 33 % idle

    Source: none; plain bookkeeping.
    """
    _check(schedule, times)
    if width < 1:
        where, fix = "turnout.show.timeline_text", "pass width=100"
        raise ShapeError(word("width", got=width, allowed="be at least 1", where=where, fix=fix))
    whole, lines = times.makespan or 1.0, []
    wide = len(str(schedule.ranks - 1))
    for rank, order in enumerate(schedule.actions):
        own = [stage for stage, holder in enumerate(schedule.rank_of_stage) if holder == rank]
        letters = ["."] * width
        for action, start, end in zip(order, times.start_R[rank], times.end_R[rank], strict=True):
            if action.kind in ("UNSHARD", "RESHARD"):
                continue
            letter = _LETTER[action.kind]
            letter = letter.lower() if not action.parts and action.stage != own[0] else letter
            # A letter stands for the action that has its middle.
            first, last = (int(np.ceil(float(at) / whole * width - 0.5 - 1e-9)) for at in (start, end))
            letters[first:last] = letter * (last - first)
        idle = 1 - float(times.busy_R[rank]) / whole
        lines.append(f"{rank:>{wide}} |{''.join(letters)}| {100 * idle:.0f} % idle")
    return "\n".join(lines)


@expects(schedule=Schedule, times=PipelineTimes)
def timeline_html(schedule: Schedule, times: PipelineTimes, *, unit: str = "", measured: bool = False) -> str:
    """A page of its own with the drawing and its numbers, which opens without a network.

    Args:
        schedule: whose actions they are.
        times: when each ran.
        unit: of the times: "ms".
        measured: whether a run gave the times; else the page says that they are simulated.

    Returns:
        The text of the page.

    Raises:
        ShapeError: times of other actions.

    >>> from turnout.solve import pipeline
    >>> from turnout.types import StageCosts
    >>> one = Schedule("one", ((Action(0, "F", 0), Action(0, "B", 0)),), (0,), 1)
    >>> "simulated" in timeline_html(one, pipeline(one, StageCosts.even(1)))
    True

    Source: none; plain bookkeeping.
    """
    how = "measured" if measured else "simulated"
    rows = [
        ("makespan", f"{times.makespan:.6g} {unit}".strip()),
        ("longest of a device", f"{times.span:.6g} {unit}".strip()),
        ("idle", f"{100 * times.bubble:.2f} %"),
        ("idle without a barrier", f"{100 * times.span_bubble:.2f} %"),
        ("most held by a device", f"{float(times.peak_R.max()):.6g}"),
        ("stages, devices, microbatches", f"{schedule.stages}, {schedule.ranks}, {schedule.microbatches}"),
    ]
    drawing = card(schedule.name, how, f"{timeline_svg(schedule, times)}")
    head = (
        f'<header><div class="inner"><p class="eyebrow">a step of a pipeline, {how}</p>'
        f'<h1>{escape(schedule.name)}</h1><ul class="lead">{timeline_legend(schedule)}</ul></div></header>'
    )
    sections = [f"<section>{drawing}</section>", f"<section><h2>Numbers</h2>{table(rows)}</section>"]
    return frame(f"{schedule.name}, {how}", head, sections, experts=0, payload={})


def timeline_legend(schedule: Schedule) -> str:
    """What the colours of its drawing mean, as items of a list."""
    kinds = [kind for kind in _KINDS if any(a.kind == kind for order in schedule.actions for a in order)]
    return "".join(f'<li><i class="dot" style="--c:{_COLOR[kind]}"></i>{escape(_KINDS[kind])}</li>' for kind in kinds)


def _bar(schedule: Schedule, action: Action, start: float, end: float, scale: float, top: int) -> str:
    left, wide = _LABEL + start * scale, max((end - start) * scale, 0.5)
    holder = schedule.rank_of_stage[action.stage if not action.parts else action.parts[0].stage]
    own = [stage for stage, rank in enumerate(schedule.rank_of_stage) if rank == holder]
    later = 0 if action.parts else own.index(action.stage)
    faint = 1.0 - 0.45 * later / max(len(own) - 1, 1)
    high, drop = (4, _HIGH + 1) if action.kind == "UNSHARD" else (_HIGH, 0)
    box = f'x="{left:.2f}" y="{top + drop}" width="{wide:.2f}" height="{high}" rx="1.5"'
    about = f"<title>{escape(str(action))}: {start:.6g} to {end:.6g}</title>"
    bar = f'<rect style="fill:{_COLOR[action.kind]};fill-opacity:{faint:.2f}" {box}>{about}</rect>'
    shown = "" if action.microbatch is None else str(action.microbatch)
    if shown and wide >= 7 * len(shown) + 2:
        place = f'x="{left + wide / 2:.2f}" y="{top + 15}" text-anchor="middle" class="tick small"'
        bar += f"<text {place}>{shown}</text>"
    return bar


def _check(schedule: Schedule, times: PipelineTimes) -> None:
    counts = [len(order) for order in schedule.actions]
    for part in (times.start_R, times.end_R):
        if [len(each) for each in part] != counts:
            got = f"times of {_counts(part)} actions for {counts} of the schedule's devices"
            fix, where = "pass the schedule that was played", "turnout.show.timeline"
            raise ShapeError(word("times", got=got, allowed="be of the schedule's actions", where=where, fix=fix))


def _counts(part: Sequence[np.ndarray]) -> list[int]:
    return [len(each) for each in part]
