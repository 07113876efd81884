"""The picture of a step: a bar an action where it belongs, a page without a network, letters that add up."""

import re

import numpy as np
import pytest

from turnout.decide import device
from turnout.errors import ShapeError, UsageError
from turnout.show import timeline_html, timeline_svg, timeline_text
from turnout.solve import PipelineTimes, pipeline
from turnout.types import StageCosts

ALL = [
    device.gpipe(3, 4),
    device.zbv(3, 6),
    device.dual_pipe_v(2, 4),
    device.zeropp(2, 4, unit=4),
    device.interleaved(2, 4, chunks=3),
]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_every_action_has_its_bar(schedule) -> None:
    times = pipeline(schedule, StageCosts.even(schedule.stages, gather=0.5))
    svg = timeline_svg(schedule, times)
    shown = re.findall(r"<title>(.*?): (\S+) to (\S+)</title>", svg)
    wanted = [
        (str(action), float(start), float(end))
        for order, starts, ends in zip(schedule.actions, times.start_R, times.end_R, strict=True)
        for action, start, end in zip(order, starts, ends, strict=True)
        if action.kind != "RESHARD"
    ]
    assert [(name, float(start), float(end)) for name, start, end in shown] == wanted
    edges = [float(x) + float(wide) for x, wide in re.findall(r'x="(\S+)" y="\d+" width="(\S+)"', svg)]
    assert max(edges) <= 960 and len(edges) == len(wanted)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_the_page_stands_alone(schedule) -> None:
    times = pipeline(schedule, StageCosts.even(schedule.stages))
    page = timeline_html(schedule, times, unit="ms")
    assert "simulated" in page and "ms" in page and not re.search(r'(src|href)="http', page)
    assert "measured" in timeline_html(schedule, times, measured=True)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_letters_are_what_devices_do(schedule) -> None:
    times = pipeline(schedule, StageCosts.even(schedule.stages))
    width = round(times.makespan)
    lines = timeline_text(schedule, times, width=width).splitlines()
    for line, busy in zip(lines, times.busy_R, strict=True):
        letters = line.split("|")[1]
        assert len(letters) == width and width - letters.count(".") == round(busy)


def test_a_later_stage_is_a_small_letter() -> None:
    schedule = device.zbv(2, 2)
    text = timeline_text(schedule, pipeline(schedule, StageCosts.even(4)), width=14)
    assert text.splitlines()[1] == "1 |.FfFfiwIWiwIW.| 14 % idle", text


def test_times_of_others_are_refused() -> None:
    schedule, other = device.gpipe(2, 3), device.gpipe(2, 4)
    times = pipeline(other, StageCosts.even(2))
    for draw in (timeline_svg, timeline_text, timeline_html):
        with pytest.raises(ShapeError, match=r"times of \[8, 8\] actions"):
            draw(schedule, times)
    with pytest.raises(ShapeError, match="width=100"):
        timeline_text(other, times, width=0)
    with pytest.raises(UsageError, match="Schedule"):
        timeline_svg("gpipe", times)


def test_nothing_takes_no_time() -> None:
    schedule = device.gpipe(1, 1)
    nothing = PipelineTimes((np.zeros(2),), (np.zeros(2),), np.zeros(1), np.zeros(1))
    assert timeline_text(schedule, nothing, width=5) == "0 |.....| 100 % idle"
