"""How far the preparation is: lines without a terminal, a bar on one, nothing when quiet."""

import io

from rich.console import Console

from turnout.train.data.display import Bar, Lines, Silent, display


def test_lines_come_now_and_then_with_the_time_left() -> None:
    now, file = [0.0], io.StringIO()
    lines = Lines(file, clock=lambda: now[0])
    for second in range(12):
        now[0] = float(second)
        lines("reading", second * 1_000_000, 20_000_000)
    lines("tokenising", 0, 10)
    assert file.getvalue().splitlines() == [
        "reading: 5.0 of 20.0 MB, 0:15 left",
        "reading: 10.0 of 20.0 MB, 0:10 left",
    ]


def test_lines_with_nothing_done_and_with_more_than_expected() -> None:
    now, file = [0.0], io.StringIO()
    lines = Lines(file, clock=lambda: now[0])
    for now[0], done in ((0.0, 0), (6.0, 0), (12.0, 3_000_000)):
        lines("reading", done, 2_000_000)
    assert file.getvalue().splitlines() == ["reading: 0.0 of 2.0 MB", "reading: 3.0 of 3.0 MB, 0:00 left"]


def test_a_bar_shows_stages_and_lets_notes_through() -> None:
    file = io.StringIO()
    bar = Bar(Console(file=file, force_terminal=True, width=100))
    bar("reading", 5_000_000, 10_000_000)
    bar.say("left out 1 [bold] file")
    bar("reading", 12_000_000, 10_000_000)
    bar.close()
    assert "reading" in file.getvalue() and "left out 1 [bold] file" in file.getvalue()


def test_a_function_an_object_or_nothing() -> None:
    calls = []
    with display(lambda *told: calls.append(told)) as tell:
        tell("reading", 1, 2)
        tell.say("nowhere to go")

    class Sayer:
        def say(self, text):
            calls.append(text)

    with display(Sayer()) as tell:
        tell("reading", 1, 2)
        tell.say("a note")
    assert calls == [("reading", 1, 2), "a note"]
    with display(quiet=True) as tell:
        assert isinstance(tell, Silent)
    with display() as tell:
        assert isinstance(tell, Lines)  # stderr is no terminal here
