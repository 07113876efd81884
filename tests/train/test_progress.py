"""Progress: a bar on a terminal, plain lines elsewhere."""

import io

from rich.console import Console

from turnout.train.progress import Bar, Lines, Silent, progress_for

TRAIN = {"kind": "train", "step": 10, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 12345.6}
EVAL = {"kind": "eval", "step": 10, "bits_per_byte": 1.5, "by_domain": {"a": 1.25, "b": 1.75}, "max_vio": 0.5}


def shown(teller):
    teller.start(0, 40)
    for step in range(1, 11):
        teller.advance(step)
    teller.train(TRAIN)
    teller.evaluated(EVAL)
    teller.say("[note] saved")
    teller.stop()


def test_lines_are_plain():
    file = io.StringIO()
    shown(Lines(file))
    first, second, third = file.getvalue().splitlines()
    assert first.startswith("step 10/40  loss 2.5000  lr 1.00e-03  12,346 tokens/s  0:0") and first.endswith(" left")
    assert second == "step 10/40  held-out 1.5000 bits per byte  (a 1.2500, b 1.7500)  MaxVio 0.50"
    assert third == "[note] saved"
    assert "\x1b" not in file.getvalue()


def test_lines_are_about_twenty():
    file = io.StringIO()
    teller = Lines(file)
    teller.start(0, 1000)
    for step in range(1, 1001):
        teller.advance(step)
        teller.train(TRAIN | {"step": step})
    assert 20 <= len(file.getvalue().splitlines()) <= 22
    assert "step 1000/1000" in file.getvalue().splitlines()[-1]


def test_bar_shows_loss_speed_and_time_left():
    file = io.StringIO()
    shown(Bar(Console(file=file, force_terminal=True, width=120)))
    for text in ("step 10/40", "loss 2.5000", "12,346 tokens/s", "left", "held-out 1.5000", "[note] saved"):
        assert text in file.getvalue()


def test_a_bar_that_never_started_can_be_stopped():
    Bar(Console(file=io.StringIO(), force_terminal=True)).stop()


def test_the_terminal_decides(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(progress_for(), Lines)
    assert isinstance(progress_for(quiet=True), Silent)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert isinstance(progress_for(), Bar)


def test_silence_is_silent(capsys):
    shown(Silent())
    assert capsys.readouterr() == ("", "")
