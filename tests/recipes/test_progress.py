"""What a conversion shows on the way."""

import io

from clocks import set_clock
from rich.console import Console

from turnout.recipes.progress import Bar, Lines, Silent, progress_for
from turnout.train import progress


def test_a_bar_shows_the_stretch_its_pieces_and_the_time_left():
    screen = io.StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, width=120))
    bar.say("step 1 of 2: split")
    for done in range(4):
        bar.part("dealing out neurons", done, 4)
        bar._bar.refresh()
    bar.part("comparing", 0, 2)
    bar.part("comparing", 1, 2)
    bar._bar.refresh()
    bar.stop()
    shown = screen.getvalue()
    for part in ("step 1 of 2: split", "dealing out neurons", "3/4", "0:00 left", "comparing", "1/2"):
        assert part in shown


def test_the_time_left_is_that_of_pieces_worked_out_now(monkeypatch):
    """Those found from before a stop took no time."""
    now = [0.0]
    set_clock(monkeypatch, progress, monotonic=lambda: now[0])
    bar = Bar(Console(file=io.StringIO(), force_terminal=True))
    bar.part("scoring experts", 10, 20)
    now[0] = 60.0
    bar.part("scoring experts", 11, 20)
    bar.stop()
    assert bar._bar.tasks[0].fields["left"] == "9:00 left"


def test_without_a_terminal_there_are_lines_and_no_bar(capsys):
    made = progress_for()
    assert isinstance(made, Lines)
    made.say("reading")
    made.part("scoring experts", 1, 2)
    made.stop()
    said = capsys.readouterr()
    assert said.err == "reading\n" and said.out == ""


def test_quiet_says_nothing(capsys):
    made = progress_for(quiet=True)
    assert type(made) is Silent
    made.say("reading")
    made.part("scoring experts", 1, 2)
    made.stop()
    assert capsys.readouterr().err == ""
